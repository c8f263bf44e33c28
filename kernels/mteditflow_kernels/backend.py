"""Which implementation runs: Triton or the eager reference."""

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "reference")
_chosen = "auto"
HAS_TRITON = find_spec("triton") is not None  # torch.compile reads a constant, and cannot look for a package


def use_backend(name: str) -> None:
    """Choose: 'auto', Triton for CUDA tensors where it is installed; 'triton', it or an error; 'reference', eager."""
    global _chosen
    if name not in BACKENDS:
        raise ValueError(f"backend is {name!r}: must be one of {', '.join(BACKENDS)}")
    if name == "triton" and not HAS_TRITON:
        raise ValueError("backend is 'triton': triton is not installed, pip install triton")
    _chosen = name


def is_triton(tensor: Tensor) -> bool:
    """Say whether Triton runs on this tensor: float64 is always eager."""
    if _chosen == "reference" or tensor.dtype == torch.float64:
        return False
    return _chosen == "triton" or (tensor.is_cuda and HAS_TRITON)


@cache
def triton(part: str) -> ModuleType:
    """Import the Triton implementation of a part of the ops when it first runs."""
    return import_module(f"mteditflow_kernels.triton_{part}")
