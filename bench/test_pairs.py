"""A lever on and off on the miniature, a rollout and an update of each in turn: what launches cost, which the true
shape hides. A pair is a line of PAIRS.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import measure
import pytest
import torch
from torch import Tensor

from mteditflow.config import Config, ObjectiveConfig
from mteditflow.noise import Place
from mteditflow.policy import Policy
from mteditflow.profile.command import Case, build_case
from mteditflow.rollout import denoise, denoise_by_graph, sample_rollout
from mteditflow.types import Rollout
from mteditflow.update import build_optimizer, update

Settings = Mapping[str, Mapping[str, Any]]  # by section of the config


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two choices of a setting, and whether they give the same bits."""

    name: str
    on: Settings
    off: Settings
    is_equal: bool
    needs_gpu: bool = False


PAIRS = [
    Pair(name="CUDA graph", on={"rollout": {"cuda_graph": "on"}}, off={"rollout": {"cuda_graph": "off"}},
         is_equal=True, needs_gpu=True),
    Pair(name="checkpointing", on={"model": {"is_checkpointed": True}}, off={}, is_equal=True),
    Pair(name="compile", on={"model": {"compile": "blocks"}}, off={"model": {"compile": "off"}}, is_equal=False,
         needs_gpu=True),
    Pair(name="bfloat16", on={"model": {"base": "bfloat16"}}, off={}, is_equal=False, needs_gpu=True),
]  # fmt: skip
TRUE = replace(Config(), objective=ObjectiveConfig(name="grpo"))  # the default run, by GRPO
SMALL = replace(
    TRUE,
    rollout=replace(TRUE.rollout, num_tasks=1, group_size=2, num_steps=2, window_size=1),
    data=replace(TRUE.data, num_turns=1),
)


def changed(config: Config, settings: Settings) -> Config:
    """The config with other settings."""
    return replace(config, **{name: replace(getattr(config, name), **values) for name, values in settings.items()})


def assert_equal(one: Rollout, other: Rollout) -> None:
    """The bits of two rollouts."""
    for turn, same in zip(one.turns, other.turns, strict=True):
        assert torch.equal(turn.latents, same.latents) and torch.equal(turn.image, same.image)
        assert torch.equal(turn.old_log_prob.nan_to_num(), same.old_log_prob.nan_to_num())


def time_pair(pair: Pair, config: Config) -> dict[str, Any]:
    """Median seconds of a rollout and of an update of both, in turn; their bits, where they are to be the same."""
    calls: dict[tuple[str, str], measure.Call] = {}
    made: list[Rollout] = []
    for choice, settings in (("on", pair.on), ("off", pair.off)):
        case = build_case(changed(config, settings))
        optimizer = build_optimizer(case.policy, case.config)
        optimizer.param_groups[0]["lr"] = 0.0  # the ratio stays 1, however often the update is repeated

        def roll(case: Case = case) -> Rollout:
            return sample_rollout(case.policy, case.objective, case.tasks, case.config, 0)

        rollout = roll()
        sign = 1.0 - 2.0 * (torch.arange(len(rollout.group)) % 2)
        advantages = sign[:, None].repeat(1, len(rollout.turns))

        def learn(case: Case = case, optimizer: Any = optimizer, rollout: Any = rollout, a: Any = advantages) -> object:
            return update(case.policy, optimizer, case.objective, rollout, a, case.config, case.ranks)

        learn()
        made.append(rollout)
        calls |= {("rollout", choice): roll, ("update", choice): learn}
    if pair.is_equal:
        assert_equal(*made)
    seconds = measure.medians(calls, case.policy.device)
    row = {f"{part}_{choice}_s": value for (part, choice), value in seconds.items()}
    return (
        {"pair": pair.name}
        | row
        | {f"times_off_{part}": seconds[part, "off"] / seconds[part, "on"] for part in ("rollout", "update")}
    )


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
def test_pair(pair: Pair, record: measure.Record) -> None:
    is_cuda = torch.cuda.is_available()
    if pair.needs_gpu and not is_cuda:
        pytest.skip("needs a GPU")
    record.add("pairs", time_pair(pair, TRUE if is_cuda else SMALL))


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


def test_denoising_has_no_sync() -> None:
    is_cuda = torch.cuda.is_available()
    case = build_case(TRUE if is_cuda else SMALL)
    rollout = sample_rollout(case.policy, case.objective, case.tasks, case.config, 0)
    for run in (denoise, *([denoise_by_graph] if is_cuda else [])):
        denoise_without_sync(case.policy, rollout, run)
