"""Which implementation runs: Triton or the eager reference."""

import os
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "reference")
_chosen = "auto"
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's interpreter runs on the host
HAS_TRITON = find_spec("triton") is not None  # torch.compile reads a constant, and cannot look for a package


def use_backend(name: str) -> None:
    """Choose: 'auto', Triton for CUDA tensors where it is installed; 'triton', the same or an error where it cannot be
    had; 'reference', eager. Tensors on the host are always eager.
    """
    global _chosen
    if name not in BACKENDS:
        raise ValueError(f"backend is {name!r}: must be one of {', '.join(BACKENDS)}")
    if name == "triton" and not HAS_TRITON:
        raise ValueError("backend is 'triton': triton is not installed, pip install triton")
    if name == "triton" and not (IS_INTERPRETED or torch.cuda.is_available()):
        raise ValueError("backend is 'triton': it needs a GPU, and there is none; take 'auto'")
    _chosen = name


def is_triton(tensor: Tensor) -> bool:
    """Say whether Triton runs on this tensor: float64 is always eager, as is the host without the interpreter."""
    if _chosen == "reference" or tensor.dtype == torch.float64:
        return False
    return HAS_TRITON and (tensor.is_cuda or (IS_INTERPRETED and _chosen == "triton"))


@cache
def triton(part: str) -> ModuleType:
    """Import the Triton implementation of a part of the ops when it first runs."""
    return import_module(f"mteditflow_kernels.triton_{part}")
