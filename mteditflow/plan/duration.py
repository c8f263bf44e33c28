"""How much work an iteration and a run are, and how long they take at given seconds per row.

The arithmetic is the most that an iteration does: groups without spread are not trained on.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

from mteditflow.config import Config
from mteditflow.evaluate.parts import part_size
from mteditflow.objective import build_objective

DISK_BYTES_S = 0.2e9  # that a file system of several nodes writes from one of them at the least (ours)


@dataclass(frozen=True, kw_only=True)
class Batches:
    """The batch arithmetic of an iteration."""

    trajectories: int
    turn_images: int
    rollout_rows: int
    rollout_microbatches: int
    transitions: int
    train_forward_rows: int
    train_microbatches: int
    optimizer_steps: int


@dataclass(frozen=True, kw_only=True)
class RowSeconds:
    """Seconds per row, of one GPU; of a velocity with the guidance that training has, and `guided` that evaluation has.

    `text` of an instruction, `judge` of a trajectory's scores: None where that is left out.
    """

    forward: float
    forward_backward: float
    guided: float
    decode: float
    encode: float
    text: float = 0.0
    judge: float | None = None


def mean_seconds(rows: Sequence[tuple[RowSeconds, float]]) -> RowSeconds:
    """Average seconds by their shares, which add up to 1."""
    if len(rows) == 1:
        return rows[0][0]

    def mean(name: str) -> float:
        return sum(share * getattr(row, name) for row, share in rows)

    names = [field.name for field in fields(RowSeconds) if field.name != "judge"]
    judge = None if rows[0][0].judge is None else mean("judge")
    return RowSeconds(**{name: mean(name) for name in names}, judge=judge)


def batch_plan(config: Config) -> Batches:
    """Counts over all ranks; rows are trajectories in a forward pass."""
    rollout, turns, objective = config.rollout, config.data.num_turns, build_objective(config)
    trajectories = rollout.num_tasks * rollout.group_size
    transitions = trajectories * turns * objective.num_draws
    chunks, train_chunks = (math.ceil(trajectories / c.microbatch_size) for c in (rollout, config.optimizer))
    return Batches(
        trajectories=trajectories,
        turn_images=trajectories * turns,
        rollout_rows=trajectories * turns * rollout.num_steps,
        rollout_microbatches=turns * rollout.num_steps * chunks,
        transitions=transitions,
        train_forward_rows=transitions * objective.num_forwards,
        train_microbatches=turns * objective.num_draws * train_chunks,
        optimizer_steps=config.optimizer.num_updates,
    )


def num_instructions(config: Config, *, is_text_of_image: bool) -> int:
    """Count the texts that a rollout encodes: one per task and turn, or per trajectory where it is of the image."""
    rollout, turns = config.rollout, config.data.num_turns
    later = rollout.group_size if is_text_of_image else 1
    return rollout.num_tasks * (1 + (turns - 1) * later)


def num_short_evaluations(config: Config) -> int:
    """Count the short evaluations of a run, at most: none after the last iteration, when a whole one is made, but where
    the last average is compared with those before it (run.patience).
    """
    every = config.evaluation.every
    return (config.run.num_iterations - 1) // every + (config.run.patience > 0) if every else 0


def num_evaluated_turns(config: Config) -> int:
    """Count the turns of a held-out session before training, those on true inputs among them."""
    turns = config.num_held_out_turns
    return 2 * turns - 1 if config.evaluation.has_true_inputs else turns


def _sessions_of_rank(config: Config, num_sessions: int) -> int:
    """Count the sessions of an evaluation that the busiest rank evaluates."""
    size = part_size(num_sessions, config.rollout.microbatch_size)
    return min(num_sessions, math.ceil(math.ceil(num_sessions / size) / config.run.num_gpus) * size)


def longest_waits(config: Config, num_trained: int, num_weights: int) -> dict[str, float]:
    """Seconds that ranks may wait for one that works alone: writing a checkpoint, and the result, at the least that a
    disk is to be expected to write. num_trained, num_weights: of the transformer, trained and all.
    """
    if config.run.num_gpus == 1:
        return {}
    is_cut = config.lora.is_full and config.distributed.shard != "none"
    copies = 2 + build_objective(config).has_old + 2  # the moments of AdamW
    checkpoint = 4 * copies * num_trained / (config.run.num_gpus if is_cut else 1)
    return {
        "a checkpoint, by the main rank": checkpoint / DISK_BYTES_S,
        "the result, by the main rank": 4 * (num_weights if config.lora.is_full else num_trained) / DISK_BYTES_S,
    }


def _session_seconds(config: Config, seconds: RowSeconds) -> float:
    """Seconds of a session that is evaluated."""
    per_turn = config.evaluation.num_steps * seconds.guided + seconds.decode + seconds.encode + seconds.text
    return config.num_held_out_turns * per_turn + (seconds.judge or 0.0)


def duration_plan(config: Config, seconds: RowSeconds, *, is_text_of_image: bool = False) -> dict[str, float]:
    """Seconds of an iteration and of the run, saving and start-up left out."""
    batches, evaluation, num_gpus = batch_plan(config), config.evaluation, config.run.num_gpus
    images = seconds.decode + seconds.encode
    rollout = batches.rollout_rows * seconds.forward + batches.turn_images * images
    rollout += num_instructions(config, is_text_of_image=is_text_of_image) * seconds.text
    extra_rows = batches.train_forward_rows - batches.transitions
    training = batches.transitions * seconds.forward_backward + extra_rows * seconds.forward
    num_short = num_short_evaluations(config)
    whole, short = (_sessions_of_rank(config, num) for num in (evaluation.num_sessions, evaluation.num_sessions_short))
    session, turns = _session_seconds(config, seconds), config.num_held_out_turns
    evaluations = (2 * whole * num_evaluated_turns(config) / turns + num_short * short) * session
    iteration = {"rollout of an iteration": rollout / num_gpus, "updates of an iteration": training / num_gpus}
    if seconds.judge is not None:
        iteration["scores of an iteration"] = batches.trajectories * seconds.judge / num_gpus
    iterations = config.run.num_iterations * sum(iteration.values())
    left_out = "scoring and saving" if seconds.judge is None else "saving"
    return iteration | {
        f"{config.run.num_iterations} iterations": iterations,
        f"evaluations: before, after, {num_short} short": evaluations,
        f"run, without {left_out}": iterations + evaluations,
    }


def check_timeout(config: Config, seconds: RowSeconds, *, is_text_of_image: bool = False) -> str | None:
    """Say in one line where a rank that is half as fast as the others would not be waited for: it is late by what they
    do between two meetings. None where it would be.
    """
    plan = duration_plan(config, seconds, is_text_of_image=is_text_of_image)
    part = part_size(config.evaluation.num_sessions, config.rollout.microbatch_size)
    works = {
        "a rollout and its scores": plan["rollout of an iteration"] + plan.get("scores of an iteration", 0.0),
        "an update": plan["updates of an iteration"] / config.optimizer.num_updates,
        "a part of an evaluation": part * _session_seconds(config, seconds),
    }
    name, limit = max(works, key=works.__getitem__), config.distributed.timeout_s
    if config.run.num_gpus == 1 or works[name] <= limit:
        return None
    return (
        f"distributed.timeout_s is {limit}: {name} may take {works[name]:.0f} s, and a rank that is half as fast as "
        f"the others would not be waited for; set it to {math.ceil(works[name] / 600) * 600} or more"
    )
