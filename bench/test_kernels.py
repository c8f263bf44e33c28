"""`pytest bench/` on a GPU: every op against the reference in float64, then its time against the reference and against
torch.compile of it.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import measure
import pytest
import torch
import torch._functorch.config
from kernel_cases import CASES, EAGER, GOAL_SHAPE, OWN, SHAPES, STEP, Case, Ops, Rows, compiled, rows_for
from mteditflow_kernels import STD
from mteditflow_kernels.triton_common import NORMAL_ERROR
from near import ROUNDING, ROW_ROUNDING, assert_near
from rich.console import Console
from torch import Tensor
from torch._inductor.exc import InductorError

FOLDER = Path(__file__).parent
_compiling = [0.0]  # seconds so far
COMPILE_SECONDS = 40  # of a session, after which torch.compile is left out; the large shapes come first

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA GPU: only static figures and eager CPU times"
)


@pytest.fixture(scope="module")
def rows(record: measure.Record) -> Iterator[list[measure.Row]]:
    """The rows that the tests of this file have found, shown at the end."""
    found: list[measure.Row] = []
    yield found
    Console(width=160, stderr=True).print("\n", measure.table(record.found, found))


def test_parity_of_every_case() -> None:
    """The cases that the interpreter runs elsewhere, on this GPU."""
    files = [FOLDER.parent / "tests" / name for name in ("triton_cases.py", "triton_block_cases.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    command += ["-n", str(min(8, os.cpu_count() or 1))] if find_spec("xdist") else []  # what takes long is to compile
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-8000:]


def assert_parity(case: Case, latents: Tensor, rows: Rows) -> None:
    """Ours against the reference in float64, on latents (n, B, L, C)."""
    own, eager, exact = (
        case.prepare(ops, x.unbind(), rows)()
        for ops, x in ((OWN, latents), (EAGER, latents), (EAGER, latents.double()))
    )
    scale = exact.abs().max()
    extra = {"noise": NORMAL_ERROR, "step, noisy": float(rows.table[STEP, STD]) * NORMAL_ERROR}.get(
        case.name, ROW_ROUNDING
    )
    assert_near(own / scale, eager / scale, exact / scale, ROUNDING[own.dtype], extra / min(1.0, scale.item()))


def time_case(case: Case, shape: tuple[int, ...], device: torch.device, compiled_ops: Ops | None) -> measure.Row:
    """Parity, no host sync, then time, in bfloat16."""
    count = measure.num_sets(case.num_bytes(shape))
    sets = torch.randn(count, case.num_latents, *shape, device=device, dtype=torch.bfloat16)
    rows = rows_for(sets[0])
    assert_parity(case, sets[0], rows)

    def replay(ops: Ops) -> measure.Call:
        return measure.replay_of(lambda: [case.prepare(ops, x.unbind(), rows) for x in sets], device)

    own, eager = (case.prepare(ops, sets[0].unbind(), rows) for ops in (OWN, EAGER))
    with measure.no_syncs(device):
        own()
    replays = {"own": replay(OWN), "eager": replay(EAGER)}
    if compiled_ops is not None:
        # Inductor of torch 2.11 cannot compile counted noise: its words of 32 bits are out of range for its integers.
        with suppress(InductorError):
            replays["compiled"] = replay(compiled_ops)
    us = {name: 1e6 * seconds / count for name, seconds in measure.medians(replays, device).items()}
    return measure.Row(
        case=case.name, shape=shape, dtype="bfloat16", num_bytes=case.num_bytes(shape), us=us["own"],
        eager_us=us["eager"], compiled_us=us.get("compiled"), launches=measure.count_launches(own, device),
        eager_launches=measure.count_launches(eager, device), syncs=measure.count_syncs(own, device),
        eager_syncs=measure.count_syncs(eager, device), goal_us=case.goal_us if shape == GOAL_SHAPE else None,
    )  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_time(
    case: Case, shape: tuple[int, ...], record: measure.Record, rows: list[measure.Row], benchmark: Any
) -> None:
    torch.compiler.reset()  # else a function compiled for eight shapes runs eagerly at the ninth
    start = time.perf_counter()
    with torch._functorch.config.patch(donated_buffer=False):  # backward passes are repeated
        row = time_case(case, shape, torch.device("cuda"), compiled() if _compiling[0] < COMPILE_SECONDS else None)
    _compiling[0] += time.perf_counter() - start
    rows.append(row)
    goals = {} if row.goal_us is None else {"us": measure.Goal(value=row.goal_us)}
    record.add("kernels", row.figures(record.found["ceilings"]["copy_gb_per_s"]), goals)
    latents = torch.randn(case.num_latents, *shape, device="cuda", dtype=torch.bfloat16)
    call = case.prepare(OWN, latents.unbind(), rows_for(latents))
    benchmark.pedantic(call, rounds=20, iterations=10, warmup_rounds=1)  # what a call costs the host
    assert row.launches <= 1 + len(case.kernels) and row.syncs == 0
