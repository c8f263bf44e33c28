"""Tensors that are cut over ranks, on disk: torch.distributed.checkpoint in safetensors, one file per rank.

A file says where in each tensor its part lies, so that any number of ranks puts together what another wrote, cut
otherwise or whole. No pickle: the metadata are the files' own headers. What every rank holds whole beside what is cut,
an optimizer's count of steps, is written once.
"""

import hashlib
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from mteditflow.distributed import Ranks

CHUNK = 2**24  # bytes of a file that are hashed at once


def is_cut(tensors: Mapping[str, Tensor]) -> bool:
    """Whether any of some tensors is held in parts."""
    return any(isinstance(tensor, DTensor) for tensor in tensors.values())


def write_shards(folder: Path, state: Mapping[str, Mapping[str, Tensor]], ranks: Ranks) -> dict[str, str]:
    """Write groups of tensors into a folder that all ranks see, each rank its own parts; all ranks at once. Returns the
    sha256 of this rank's file by its name; a rank whose parts another has too may write none.
    """
    flat = {f"{group}/{name}": tensor.detach() for group, tensors in state.items() for name, tensor in tensors.items()}
    try:
        save(flat, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except CheckpointException as error:  # on all ranks, whichever failed
        raise next(iter(error.failures.values()))[0] from None
    mine = folder.glob(f"shard-{ranks.rank + 1:05d}-*.safetensors")
    return {path.name: sha256(path) for path in mine}


def read_shards(folder: Path, group: str, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read a group: a tensor that has its like, of the same shape, cut as that is and where that is; else whole, on the
    host. Every rank reads for itself.
    """
    reader = HuggingFaceStorageReader(str(folder))
    state: dict[str, Tensor] = {}
    for key, found in reader.read_metadata().state_dict_metadata.items():
        name = key.removeprefix(f"{group}/")
        if name != key:
            assert isinstance(found, TensorStorageMetadata), key
            is_like = name in like and like[name].shape == found.size
            state[key] = (
                torch.zeros_like(like[name]) if is_like else torch.empty(found.size, dtype=found.properties.dtype)
            )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # so it is meant
        load(state, storage_reader=reader, no_dist=True)
    return {key.removeprefix(f"{group}/"): tensor for key, tensor in state.items()}


def sha256(path: Path) -> str:
    """Hash a file, '' where there is none."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while content := file.read(CHUNK):
                digest.update(content)
    except FileNotFoundError:
        return ""
    return digest.hexdigest()
