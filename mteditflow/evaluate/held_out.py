"""Held-out evaluation of an editor: on which sessions, judged by what, kept in which files.

Evaluation runs the ODE from noise that every run shares, so two evaluations are paired. In the embedded world the grade
is the exact verifier's, whatever reward trains; for tasks without a known truth the reward judges.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from mteditflow.advantage import SUCCESS
from mteditflow.config import Config
from mteditflow.config.errors import first_line
from mteditflow.distributed import Ranks
from mteditflow.evaluate.edival import Evaluation, compare, summary
from mteditflow.evaluate.parts import (
    NUM_TOGETHER,
    Gathered,
    Part,
    PartFolder,
    Round,
    cut_sessions,
    join_images,
    make_rounds,
    one_behind,
    part_size,
)
from mteditflow.flow import make_schedule
from mteditflow.guards import MAX_INVALID_SHARE
from mteditflow.noise import EVALUATION
from mteditflow.policy import AdapterName, Policy
from mteditflow.record.drift import KINDS, knows_untouched, measure_rollout
from mteditflow.record.figures import read_figures
from mteditflow.record.files import replace_file, shaped, write_json
from mteditflow.report.seen import Seen, choose, seen_sessions
from mteditflow.reward import CONSISTENCY, INSTRUCTION
from mteditflow.reward.exact import grade_pictures, measure_consistency, quality, read_rollout
from mteditflow.reward.overlap import Overlap
from mteditflow.rollout import Sampler
from mteditflow.types import EditTask, Rollout, Scores, Shape

MAY_DIFFER = ("evaluation.every", "evaluation.num_sessions_short", "data.num_turns", "data.seed")
"""Fields of `data` and `evaluation` that do not touch the evaluations before and after training."""


def evaluate(
    policy: Policy,
    tasks: list[EditTask],
    config: Config,
    adapter: AdapterName,
    ranks: Ranks,
    judge: Overlap | None = None,
    *,
    see: Callable[[list[Seen]], None] | None = None,
    folder: PartFolder | None = None,
    show: Callable[[int], None] = lambda _: None,
    is_counted: bool = True,
) -> Evaluation:
    """Evaluate one trajectory of each task under an adapter, by the ODE, judged by the exact verifier where it can
    judge all tasks, and else by `judge`. Every rank takes its share, and has the result.

    see: is shown some of what was judged, at the end. folder: what is there of this evaluation already, and where it is
    kept as it goes. show: is told how many sessions are evaluated, at first and after each round. ValueError, on every
    rank, where more than half could not be scored; not where `is_counted` is False, and they are only to be seen.
    """
    size = part_size(len(tasks), config.rollout.microbatch_size)
    score = partial(partial, _by_truth) if has_truth(tasks) else judge and judge.start
    assert score is not None, "tasks without truth need a judge"
    cuts = cut_sessions(tasks, size)
    gathered = Gathered(ranks, folder, config.run.num_judged if see else 0)
    missing = {number: len(cut) for number, cut in enumerate(cuts) if number not in gathered.parts}
    rounds = make_rounds(missing, ranks, is_in_step=config.distributed.shard != "none")

    def start() -> Iterator[tuple[Round, Callable[[], Part] | None]]:
        """Roll out this rank's part of every round, and have it judged."""
        mine = [[] if round_.mine is None else [tasks[n] for n in cuts[round_.mine]] for round_ in rounds]
        rollouts = _roll_out(policy, mine, max(1, NUM_TOGETHER // size), config)
        for round_, rollout in zip(rounds, rollouts, strict=True):
            if rollout is None or round_.mine is None or not round_.is_wanted:
                yield round_, None
                continue
            num_images = sum(n < config.evaluation.num_strips for n in cuts[round_.mine])  # its first
            yield round_, partial(_make_part, rollout, score(rollout), num_images, gathered.num_seen)

    with policy.adapters.use(adapter):
        show(gathered.num_sessions)
        for round_, wait in one_behind(start()):  # a part is judged while the next is made
            gathered.add(round_.numbers, wait() if wait else None)
            show(gathered.num_sessions)
    if see is not None:
        see(gathered.seen)
    try:
        return _join([gathered.parts[n] for n in range(len(cuts))], cuts, tasks, config, is_counted=is_counted)
    except ValueError:
        if folder is not None and ranks.is_main:
            folder.remove()  # its judge will be another when it has been mended
        raise


def _roll_out(
    policy: Policy, cuts: list[list[EditTask]], num_together: int, config: Config
) -> Iterator[Rollout | None]:
    """Roll out the sessions of one part after the other, None where a part has none; those of `num_together` parts that
    have one shape are encoded together, for which text encoders may have to come to the GPU.
    """
    for first in range(0, len(cuts), num_together):
        together, samplers, done = cuts[first : first + num_together], dict[Shape, Sampler](), Counter[Shape]()
        for cut in together:
            if not cut:
                yield None
                continue
            shape = cut[0].shape
            if shape not in samplers:
                alike = [task for part in together for task in part if task.shape == shape]
                samplers[shape] = Sampler(
                    policy, alike, make_schedule(policy.at(shape).sigmas(config.evaluation.num_steps)), EVALUATION,
                    config.rollout, num_turns=config.num_held_out_turns, group_size=1, cfg_scale=config.model.cfg_scale,
                )  # fmt: skip
            rows = torch.arange(len(cut))
            yield replace(samplers[shape](done[shape] + rows), tasks=cut, group=rows)
            done[shape] += len(cut)


def _make_part(rollout: Rollout, wait: Callable[[], Scores], num_images: int, num_seen: int) -> Part:
    """Wait for the scores of a part's sessions, and take what is kept; images of the first `num_images`."""
    scores = wait()
    success = scores.instruction >= SUCCESS
    consistency = scores.rewards.get(CONSISTENCY, torch.full(success.shape, torch.nan))
    return Part(
        verdict=(success & scores.valid[:, None]).cpu(), consistency=consistency.cpu(), valid=scores.valid.cpu(),
        images=torch.stack([turn.image[:num_images] for turn in rollout.turns]).cpu(), drift=measure_rollout(rollout),
        seen=tuple(choose(seen_sessions(rollout, scores), num_seen)) if num_seen else (),
    )  # fmt: skip


def _join(
    parts: list[Part], cuts: list[list[int]], tasks: list[EditTask], config: Config, *, is_counted: bool
) -> Evaluation:
    """Put the parts together, of the sessions at these places. ValueError where they are counted, and more than half of
    the sessions could not be scored.
    """
    order = torch.tensor([n for cut in cuts for n in cut])
    shown, back = order[order < config.evaluation.num_strips], order.argsort()
    valid = torch.cat([part.valid for part in parts])[back]
    num_invalid = int((~valid).sum())
    if is_counted and num_invalid > MAX_INVALID_SHARE * len(valid):
        raise ValueError(
            f"{num_invalid} of {len(valid)} held-out sessions could not be scored, more than "
            f"{MAX_INVALID_SHARE:.0%}: look at the reward, judge {config.reward.judge!r}"
        )
    return Evaluation(
        verdict=torch.cat([part.verdict for part in parts])[back], valid=valid,
        consistency=torch.cat([part.consistency for part in parts])[back],
        images=join_images([part.images for part in parts if part.images.shape[1]])[:, shown.argsort()],
        edit_types=[task.edit_types for task in tasks], num_steps=config.evaluation.num_steps,
        drift=torch.cat([part.drift for part in parts])[back],
        num_whole=sum(not knows_untouched(task) for task in tasks),
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


def list_settings(config: Config, *, is_by_truth: bool) -> dict[str, Any]:
    """List what an evaluation depends on besides the adapter, as JSON gives it back."""
    reward = {} if is_by_truth else {f"reward.{key}": value for key, value in asdict(config.reward).items()}
    return json.loads(json.dumps(held_out_fields(config) | reward))


def part_folder(path: Path, policy: Policy, tasks: list[EditTask], config: Config, what: str) -> PartFolder:
    """Describe the folder in which parts of an evaluation are kept as it goes; `what` tells its weights from others."""
    settings = list_settings(replace(config, model=policy.config), is_by_truth=has_truth(tasks))
    size = part_size(len(tasks), config.rollout.microbatch_size)
    about = {"what": what, "settings": settings, "part_size": size, "num_judged": config.run.num_judged}
    about |= {"drift": list(KINDS)}
    return PartFolder(path=path, about=about)


def check_held_out(configs: dict[str, Config], remedy: str, *, is_one_editor: bool = True) -> None:
    """ValueError unless all, by name, are evaluated on the same sessions in the same way and, where `is_one_editor`, by
    the same editor.

    These fields fix the base's evaluation to the bit, which all of an editor therefore share.
    """
    (first, config), *others = configs.items()
    expected = held_out_fields(config)
    for name, other in others:
        for key, value in held_out_fields(other).items():
            if value != expected[key] and (is_one_editor or not key.startswith("model.")):
                what = "the editor" if key.startswith("model.") else "held-out data"
                raise ValueError(
                    f"{first} and {name} disagree on {what}: {key} is {expected[key]!r} and {value!r}; {remedy}"
                )


def save_evaluation(folder: Path, name: str, evaluation: Evaluation, problem: str = "") -> None:
    """Write `evaluation_NAME.safetensors`, the verdicts, then `evaluation_NAME.json`, the figures. problem: a hash of
    what was evaluated, how and by whom.
    """
    save_verdicts(folder / f"evaluation_{name}.safetensors", evaluation, problem)
    write_json(folder / f"evaluation_{name}.json", summary(evaluation))


def load_evaluation(folder: Path, name: str, problem: str | None = None) -> Evaluation | None:
    """Read what `save_evaluation` wrote; None where one of its files is not there.

    ValueError, one line: one of them is damaged, or is not of that `problem`.
    """
    path = folder / f"evaluation_{name}.safetensors"
    if not (path.exists() and path.with_suffix(".json").exists()):
        return None
    read_figures(path.with_suffix(".json"))
    with shaped(path, "delete it, or evaluate again"):
        try:
            evaluation = load_verdicts(path)
            with safetensors.safe_open(path, "pt") as file:
                found = file.metadata().get("problem", "")
        except safetensors.SafetensorError as error:
            raise ValueError(first_line(error)) from None
        _check_shapes(evaluation)
    if problem not in (None, found):
        raise ValueError(f"{path} is of another editor, other sessions or other settings")
    return evaluation


def _check_shapes(evaluation: Evaluation) -> None:
    """ValueError where the tensors of an evaluation do not go together."""
    num, num_turns = evaluation.verdict.shape
    is_right = evaluation.consistency.shape == (num, num_turns) and evaluation.valid.shape == (num,)
    is_right &= evaluation.images.ndim == 5 and len(evaluation.images) == num_turns
    is_right &= evaluation.drift is None or evaluation.drift.shape[:2] == (num, num_turns)
    if not is_right or [len(types) for types in evaluation.edit_types] != [num_turns] * num:
        raise ValueError("its tensors do not go together")


def save_comparison(folder: Path, before: Evaluation, after: Evaluation) -> None:
    """Write `comparison.json`, the paired gains."""
    write_json(folder / "comparison.json", compare(before, after))


def save_verdicts(path: Path, evaluation: Evaluation, problem: str = "") -> None:
    """Write an evaluation as one safetensors file, which appears whole or not at all."""
    tensors = {name: value.contiguous() for name, value in vars(evaluation).items() if isinstance(value, Tensor)}
    metadata = {"edit_types": json.dumps(evaluation.edit_types), "true_inputs": evaluation.true_inputs}
    metadata |= {"num_steps": str(evaluation.num_steps), "num_whole": str(evaluation.num_whole)}
    metadata |= {"problem": problem} if problem else {}
    replace_file(path, safetensors.torch.save(tensors, metadata))


def load_verdicts(path: Path) -> Evaluation:
    """Read what `save_verdicts` wrote. In a file from before sessions could be invalid, none is."""
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    all_valid = {"valid": torch.ones(len(tensors["verdict"]), dtype=torch.bool)}
    return Evaluation(
        **(all_valid | tensors), edit_types=[tuple(row) for row in json.loads(metadata["edit_types"])],
        num_steps=int(metadata.get("num_steps", 0)), num_whole=int(metadata.get("num_whole", 0)),
        true_inputs=metadata.get("true_inputs", ""),
    )  # fmt: skip
