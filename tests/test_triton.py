"""The Triton kernels without a GPU: under the interpreter in another process, and compiled ahead of time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mteditflow_kernels.static import BLOCK_VARIANTS, CACHE_VARIANTS, LATENTS, VARIANTS, figures, is_target
from mteditflow_kernels.triton_common import tickets

# SASS instructions of the whole kernel per element of a thread: what was reached, and a tenth more.
INSTRUCTIONS = {
    "noise": 73,
    "step, noisy": 115,
    "step, ODE": 41,
    "log-prob": 41,
    "log-prob, backward": 24,
    "GRPO": 70,
    "GRPO, KL": 86,
    "GRPO-Guard": 86,
    "GRPO, backward": 24,
    "GRPO, KL, backward": 30,
    "GRPO-Guard, backward": 24,
    "NFT": 94,
    "NFT, KL": 110,
    "NFT, backward": 49,
    "NFT, KL, backward": 55,
}


def test_the_ops_under_the_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    files = [str(Path(__file__).parent / name) for name in ("triton_cases.py", "triton_block_cases.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-8000:]


@pytest.mark.parametrize("capability", [90, 100])
@pytest.mark.parametrize("name", VARIANTS)
def test_what_the_compiler_made(name: str, capability: int) -> None:
    """No spill, no local memory, no float64, whole 128-bit loads and stores; for sm_90 within the budget."""
    if not is_target(capability):
        pytest.skip(f"this Triton's assembler does not know sm_{capability}")
    f = figures(VARIANTS[name], capability)
    assert f.stack == 0 and f.local == 0 and f.float64 == 0
    if capability == 90:
        assert f.registers <= 48 and f.instructions_per_element <= INSTRUCTIONS[name], f
    latents = [n for n in VARIANTS[name].kernel.arg_names if n in LATENTS]
    stored = [n for n in latents if n == "grad_velocity" or (n == "next_latents" and name.startswith("step"))]
    unused = {"ref_velocity": "KL" not in name, "old_velocity": "GRPO" in name and "Guard" not in name}
    unused["velocity"] = name == "GRPO-Guard, backward"  # the residual to the old mean is all it takes
    assert f.loads_128 == len(latents) - len(stored) - sum(unused[n] for n in latents if n in unused)
    assert f.loads_narrow == 0
    assert f.stores_128 == (2 if name == "noise" else len(stored))  # noise is float32


# Registers, instructions as above, 128-bit loads (x, gradient, weight, two of angles) and stores; a row to quantise is
# read in loops that the assembler unrolls, and written as 8 bytes a thread.
IN_BLOCKS = {
    "rows to 8 bits": (40, 100, None, 0),
    "norm and rope": (40, 24, 4, 1),
    "norm and rope, backward": (40, 34, 5, 1),
}


@pytest.mark.parametrize("capability", [90, 100])
@pytest.mark.parametrize("name", BLOCK_VARIANTS)
def test_what_the_compiler_made_for_the_blocks(name: str, capability: int) -> None:
    if not is_target(capability):
        pytest.skip(f"this Triton's assembler does not know sm_{capability}")
    f, (registers, instructions, loads, stores) = figures(BLOCK_VARIANTS[name], capability), IN_BLOCKS[name]
    assert f.stack == 0 and f.local == 0 and f.float64 == 0 and f.loads_narrow == 0
    assert f.registers <= registers and f.instructions_per_element <= instructions, f
    assert f.loads_128 == (loads or f.loads_128) and f.loads_128 >= 2 and f.stores_128 == stores


@pytest.mark.parametrize("capability", [90, 100])
@pytest.mark.parametrize("name", CACHE_VARIANTS)
def test_what_the_compiler_made_for_a_cache(name: str, capability: int) -> None:
    """No spill, and two programs of 128 threads in a multiprocessor's 65,536 registers, so that one loads while the
    other computes.
    """
    if not is_target(capability):
        pytest.skip(f"this Triton's assembler does not know sm_{capability}")
    f = figures(CACHE_VARIANTS[name], capability)
    assert f.stack == 0 and f.local == 0 and f.float64 == 0 and f.registers <= 128, f


def test_sums_have_one_order() -> None:
    """The log-prob has the bits of the step that made it only if both sum in the same layout."""
    step, *others = (figures(VARIANTS[name]).reduced[:2] for name in ("step, noisy", "step, ODE", "log-prob", "GRPO"))
    assert len(step) == 2 and all(own == step for own in others)


def test_tickets_outlive_larger_ones() -> None:
    """A CUDA graph holds the address of those it was captured with."""
    first = tickets(10, torch.device("cpu"))
    address, kept = first.data_ptr(), first.untyped_storage()._weak_ref()  # pyright: ignore
    larger = tickets(len(first), torch.device("cpu"))
    assert len(larger) > len(first) and larger.data_ptr() != address
    del first
    assert not torch.UntypedStorage._expired(kept)  # pyright: ignore
    torch.UntypedStorage._free_weak_ref(kept)  # pyright: ignore
