"""Held-out evaluation of an editor: on which sessions, judged by what, kept in which files.

Evaluation runs the ODE from noise that every run shares, so two evaluations are paired. In the embedded world the grade
is the exact verifier's, whatever reward trains; for tasks without a known truth the reward judges.
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from mteditflow.advantage import SUCCESS
from mteditflow.config import Config
from mteditflow.evaluate.edival import Evaluation, compare, summary
from mteditflow.flow import make_schedule
from mteditflow.guards import MAX_INVALID_SHARE
from mteditflow.noise import EVALUATION
from mteditflow.policy import AdapterName, Policy
from mteditflow.record.files import replace_file, write_json
from mteditflow.reward import CONSISTENCY, INSTRUCTION
from mteditflow.reward.exact import grade_pictures, measure_consistency, quality, read_rollout
from mteditflow.rollout import roll_out
from mteditflow.types import EditTask, Rollout, Scores

NUM_TASKS = 64  # that are rolled out together
MAY_DIFFER = ("evaluation.every", "evaluation.num_sessions_short", "data.num_turns", "data.seed")
"""Fields of `data` and `evaluation` that do not touch the evaluations before and after training."""


def evaluate(
    policy: Policy,
    tasks: list[EditTask],
    config: Config,
    adapter: AdapterName,
    reward: Callable[[Rollout], Scores] | None = None,
    see: Callable[[Rollout, Scores], None] | None = None,
) -> Evaluation:
    """Evaluate one trajectory of each task under an adapter, by the ODE, judged by the exact verifier where it can
    judge all tasks, and else by `reward`; `see` is shown what is judged, part by part. ValueError where more than half
    could not be scored.
    """
    schedule = make_schedule(policy.sigmas(config.evaluation.num_steps))
    is_by_truth = has_truth(tasks)
    judge = _by_truth if is_by_truth else reward
    assert judge is not None, "tasks without truth need a reward"
    pictures, scores = [], []
    with policy.adapters.use(adapter):
        for start in range(0, len(tasks), NUM_TASKS):
            rollout = roll_out(
                policy, tasks[start : start + NUM_TASKS], schedule, EVALUATION, config.rollout,
                num_turns=config.num_held_out_turns, group_size=1, cfg_scale=config.model.cfg_scale,
            )  # fmt: skip
            scores.append(judge(rollout))
            if see is not None:
                see(rollout, scores[-1])
            num_wanted = max(0, config.evaluation.num_strips - start)
            pictures.append(torch.stack([turn.image[:num_wanted] for turn in rollout.turns]).cpu())
    success = torch.cat([score.instruction >= SUCCESS for score in scores]).cpu()
    measured = [score.rewards[CONSISTENCY] for score in scores if CONSISTENCY in score.rewards]
    consistency = torch.cat(measured).cpu() if measured else torch.full(success.shape, torch.nan)
    valid = torch.cat([score.valid for score in scores]).cpu()
    num_invalid = int((~valid).sum())
    if num_invalid > MAX_INVALID_SHARE * len(valid):
        raise ValueError(
            f"{num_invalid} of {len(valid)} held-out sessions could not be scored, more than "
            f"{MAX_INVALID_SHARE:.0%}: look at the reward, judge {config.reward.judge!r}"
        )
    return Evaluation(
        verdict=success & valid[:, None], consistency=consistency, valid=valid,
        edit_types=[task.edit_types for task in tasks], images=torch.cat(pictures, dim=1),
        num_steps=config.evaluation.num_steps,
    )  # fmt: skip


def _by_truth(rollout: Rollout) -> Scores:
    """Score by the exact verifier. All are valid: a picture that the editor breaks is a failure of the editor."""
    world = read_rollout(rollout)
    rewards = {INSTRUCTION: quality(grade_pictures(*world), "five"), CONSISTENCY: measure_consistency(*world)}
    valid = torch.ones(len(rollout.group), dtype=torch.bool)
    return Scores(rewards=rewards, weights={}, valid=valid)


def has_truth(tasks: list[EditTask]) -> bool:
    """Whether the exact verifier can judge all of the tasks."""
    return all(task.truth is not None for task in tasks)


def held_out_fields(config: Config) -> dict[str, Any]:
    """List the fields that an evaluation depends on, dotted; those of the reward aside, which the embedded world
    ignores.
    """
    sections = ("model", "data", "evaluation")
    fields = {f"{name}.{key}": value for name in sections for key, value in asdict(getattr(config, name)).items()}
    return {key: value for key, value in fields.items() if key not in MAY_DIFFER} | {
        "evaluation.num_turns": config.num_held_out_turns,
        "rollout.hand_off": config.rollout.hand_off,
        "rollout.microbatch_size": config.rollout.microbatch_size,
        "run.backend": config.run.backend,
    }


def check_held_out(configs: dict[str, Config], remedy: str) -> None:
    """ValueError unless all, by name, are evaluated on the same sessions by the same editor in the same way.

    These fields fix the base's evaluation to the bit, which all therefore share.
    """
    (first, config), *others = configs.items()
    expected = held_out_fields(config)
    for name, other in others:
        for key, value in held_out_fields(other).items():
            if value != expected[key]:
                raise ValueError(
                    f"{first} and {name} disagree on held-out data: {key} is {expected[key]!r} and {value!r}; {remedy}"
                )


def is_comparable(evaluation: Evaluation, config: Config) -> bool:
    """Whether an evaluation by this config would have the same number of sessions, turns, steps and pictures."""
    found = (*evaluation.verdict.shape, evaluation.images.shape[1], evaluation.num_steps)
    wanted = config.evaluation
    return found == (wanted.num_sessions, config.num_held_out_turns, wanted.num_strips, wanted.num_steps)


def save_evaluation(folder: Path, name: str, evaluation: Evaluation) -> None:
    """Write `evaluation_NAME.safetensors`, the verdicts, then `evaluation_NAME.json`, the figures."""
    save_verdicts(folder / f"evaluation_{name}.safetensors", evaluation)
    write_json(folder / f"evaluation_{name}.json", summary(evaluation))


def load_evaluation(folder: Path, name: str) -> Evaluation | None:
    """Read what `save_evaluation` wrote; None where one of its files is not there."""
    path = folder / f"evaluation_{name}.safetensors"
    return load_verdicts(path) if path.exists() and path.with_suffix(".json").exists() else None


def save_comparison(folder: Path, before: Evaluation, after: Evaluation) -> None:
    """Write `comparison.json`, the paired gains."""
    write_json(folder / "comparison.json", compare(before, after))


def save_verdicts(path: Path, evaluation: Evaluation) -> None:
    """Write an evaluation as one safetensors file, which appears whole or not at all."""
    names = ("verdict", "consistency", "valid", "images")
    tensors = {name: getattr(evaluation, name).contiguous() for name in names}
    metadata = {"edit_types": json.dumps(evaluation.edit_types), "num_steps": str(evaluation.num_steps)}
    replace_file(path, safetensors.torch.save(tensors, metadata))


def load_verdicts(path: Path) -> Evaluation:
    """Read what `save_verdicts` wrote. In a file from before sessions could be invalid, none is."""
    with safetensors.safe_open(path, "pt") as file:
        metadata, verdict = file.metadata(), file.get_tensor("verdict")
        all_valid = torch.ones(len(verdict), dtype=torch.bool)
        return Evaluation(
            verdict=verdict, consistency=file.get_tensor("consistency"),
            valid=file.get_tensor("valid") if "valid" in file.keys() else all_valid,  # noqa: SIM118
            edit_types=[tuple(row) for row in json.loads(metadata["edit_types"])],
            images=file.get_tensor("images"), num_steps=int(metadata.get("num_steps", 0)),
        )  # fmt: skip
