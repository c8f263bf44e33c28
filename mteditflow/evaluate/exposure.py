"""The exposure-bias curve: success of turn k on the editor's own output beside its success on a true input.

Success falls over the turns of a session for two reasons: later instructions may be harder, and the editor may break on
what it made itself. On true inputs (teacher forcing) only the first is left; the difference is what compounds. The true
input of turn k is the picture that all instructions before it, carried out without a fault, would have made: the
embedded world draws it. Of a user's picture nobody has it. There instruction k is carried out on the source, as a first
turn: an input that no editor has touched, though not the one that the instruction was written for.

What is evaluated are sessions of one turn, so that parts, ranks and kills are as with all others (held_out.py). Turn 1
has the same input in both, and is not evaluated again.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from mteditflow.config import Config
from mteditflow.distributed import Ranks
from mteditflow.evaluate.edival import Evaluation
from mteditflow.evaluate.held_out import evaluate
from mteditflow.evaluate.parts import PartFolder
from mteditflow.policy import AdapterName, Policy
from mteditflow.report.seen import Seen
from mteditflow.reward.overlap import Overlap
from mteditflow.types import EditTask
from mteditflow.world.edits import Session
from mteditflow.world.render import render


def evaluate_editor(
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
) -> Evaluation:
    """Evaluate as `held_out.evaluate` does and, with evaluation.has_true_inputs, on true inputs too; `show` is told of
    `num_sessions` sessions.
    """
    found = evaluate(policy, tasks, config, adapter, ranks, judge, see=see, folder=folder, show=show)
    if not config.evaluation.has_true_inputs:
        return found
    success = found.verdict.float().masked_fill(~found.valid[:, None], torch.nan)  # (n, K)
    num_turns = success.shape[1]
    is_drawn = all(task.truth is not None for task in tasks)
    if num_turns > 1:
        inside = folder and PartFolder(path=folder.path / "true_inputs", about=folder.about | {"inputs": "true"})
        once = replace(config, evaluation=replace(config.evaluation, num_turns=1))
        first_turns = [task for turn in range(1, num_turns) for task in true_input_tasks(tasks, turn)]
        later = evaluate(
            policy, first_turns, once, adapter, ranks, judge, folder=inside,
            show=lambda done: show(len(tasks) + done),
        )  # fmt: skip
        success[:, 1:] = _by_turn(later, num_turns - 1)
    return replace(found, true_success=success, true_inputs="drawn" if is_drawn else "source")


def num_sessions(tasks: list[EditTask], config: Config) -> int:
    """Count the sessions that `evaluate_editor` evaluates, those of one turn among them."""
    return len(tasks) * (config.num_held_out_turns if config.evaluation.has_true_inputs else 1)


def true_input_tasks(tasks: list[EditTask], turn: int) -> list[EditTask]:
    """Make sessions of one turn, that of number `turn` (from 0), on its true input, or else on the source; their ids,
    by which noise is counted, are those of no other turn.
    """
    step = max(task.id for task in tasks) + 1
    made = [
        replace(
            task, id=task.id + turn * step, instructions=task.instructions[turn : turn + 1],
            edit_types=task.edit_types[turn : turn + 1], untouched=task.untouched[turn : turn + 1],
        )
        for task in tasks
    ]  # fmt: skip
    if any(task.truth is None for task in tasks):
        return made
    scenes = [task.truth.scenes()[turn] for task in tasks]
    truths = [Session(source=scene, edits=(task.truth.edits[turn],)) for task, scene in zip(tasks, scenes, strict=True)]
    return [
        replace(task, source=picture, truth=truth)
        for task, picture, truth in zip(made, render(scenes), truths, strict=True)
    ]


def _by_turn(evaluation: Evaluation, num_turns: int) -> Tensor:
    """Arrange the verdicts of sessions of one turn, all of a turn together: (n, num_turns), NaN where not scored."""
    success = evaluation.verdict.float().masked_fill(~evaluation.valid[:, None], torch.nan)
    return success.view(num_turns, -1).T
