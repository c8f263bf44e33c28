"""`pytest bench/` on a GPU: every op against the reference in float64, then its time against the reference and against
torch.compile of it. The figures become one file of bench/results/, which is committed.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
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

from mteditflow.config import Config, ObjectiveConfig
from mteditflow.data import training_tasks
from mteditflow.distributed import Ranks
from mteditflow.noise import Place
from mteditflow.objective import build_objective
from mteditflow.policy import Policy, build_policy
from mteditflow.rollout import denoise, denoise_by_graph, sample_rollout
from mteditflow.types import Rollout

FOLDER = Path(__file__).parent
COMPILE_SECONDS = 240  # of a session, after which torch.compile is left out; the large shapes come first

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA GPU: only static figures and eager CPU times"
)


@dataclass(kw_only=True)
class Session:
    """What the tests of a session have found."""

    facts: dict[str, Any]
    rows: list[measure.Row] = field(default_factory=list)
    rollout_s: dict[str, float] = field(default_factory=dict)
    compile_seconds: float = 0.0


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    found = Session(facts=measure.session(torch.device("cuda")))
    yield found
    path = measure.write(FOLDER / "results", found.facts, found.rows, found.rollout_s)
    table = measure.table(found.facts, found.rows)
    rollouts = f"seconds of a rollout by rollout.cuda_graph: {found.rollout_s}"
    Console(width=160, stderr=True).print("\n", table, rollouts, f"written to {path}", sep="\n")


def test_parity_of_every_case() -> None:
    """The cases that the interpreter runs elsewhere, on this GPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", FOLDER.parent / "tests/triton_cases.py"]
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
def test_time(case: Case, shape: tuple[int, ...], session: Session, benchmark: Any) -> None:
    torch.compiler.reset()  # else a function compiled for eight shapes runs eagerly at the ninth
    start = time.perf_counter()
    with torch._functorch.config.patch(donated_buffer=False):  # backward passes are repeated
        ops = compiled() if session.compile_seconds < COMPILE_SECONDS else None
        row = time_case(case, shape, torch.device("cuda"), ops)
    session.compile_seconds += time.perf_counter() - start
    session.rows.append(row)
    latents = torch.randn(case.num_latents, *shape, device="cuda", dtype=torch.bfloat16)
    call = case.prepare(OWN, latents.unbind(), rows_for(latents))
    benchmark.pedantic(call, rounds=20, iterations=10, warmup_rounds=1)  # what a call costs the host
    assert row.launches <= 1 + len(case.kernels) and row.syncs == 0


def time_rollout(policy: Policy, config: Config, choices: tuple[str, str]) -> dict[str, float]:
    """Median seconds of a rollout for each of two choices of rollout.cuda_graph, after a look at their bits."""
    tasks = training_tasks(config, 0, Ranks(rank=0, world_size=1, device=policy.device))

    def roll(choice: Any) -> Rollout:
        chosen = replace(config, rollout=replace(config.rollout, cuda_graph=choice))
        return sample_rollout(policy, build_objective(chosen), tasks, chosen, 0)

    for own, other in zip(*(roll(choice).turns for choice in choices), strict=True):
        assert torch.equal(own.latents, other.latents) and torch.equal(own.image, other.image)
        assert torch.equal(own.old_log_prob.nan_to_num(), other.old_log_prob.nan_to_num())
    return measure.medians({choice: lambda choice=choice: roll(choice) for choice in choices}, policy.device)


def denoise_without_sync(policy: Policy, rollout: Rollout, run: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """The denoising steps of the first turn, noisy ones and others, once to warm up and once with syncs forbidden."""
    turn, schedule = rollout.turns[0], rollout.schedule
    keys = rollout.keys(turn=0, place=Place.DENOISING_STEP).to(policy.device)
    step_keys = [keys if step in schedule.trained_steps else None for step in range(len(schedule.table))]
    arguments = (policy, turn.condition, turn.latents[0], schedule, step_keys)
    with torch.no_grad():
        run(*arguments)
        with measure.no_syncs(policy.device):
            run(*arguments)


def test_rollout_by_graph(session: Session) -> None:
    """The default config, GRPO: the same bits, no sync between the denoising steps, and both times."""
    config = replace(Config(), objective=ObjectiveConfig(name="grpo"))
    policy = build_policy(config.model, config.lora, seed=0, has_old=False)
    session.rollout_s |= time_rollout(policy, config, ("on", "off"))
    tasks = training_tasks(config, 0, Ranks(rank=0, world_size=1, device=policy.device))
    rollout = sample_rollout(policy, build_objective(config), tasks, config, 0)
    for run in (denoise, denoise_by_graph):
        denoise_without_sync(policy, rollout, run)
