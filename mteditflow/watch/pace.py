"""How long a run still takes, from the seconds that its iterations took so far (the lines of metrics.jsonl).

An iteration counts by the median of the newest, the first left out, which compiles and warms up. Evaluations count by
their sessions: short ones that are to come, the one after training, and the sessions that are compared in the end; a
session takes what one took in the last evaluation, or, before there was any, what its denoising steps took in training.
The export counts as a checkpoint.
"""

import re
import time
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from statistics import fmean, median
from typing import Any

from mteditflow.config import Config

NUM_NEWEST = 20  # iterations that say how long one takes
SHARED = 0.1  # share of the time waited for a core, above which a duration is said to be measured beside other work
CORE_WAIT = "speed/core_wait_share"
TIME, NOW_AND_THEN = re.compile(r"time/\w+_s"), ("time/evaluate_s", "time/save_s")
ROLLOUT = ("encode_text", "encode_images", "denoise", "decode")
_SCHEDSTAT = Path("/proc/thread-self/schedstat")

Lines = Sequence[Mapping[str, Any]]


def seconds_left(
    lines: Lines, num_iterations: int, config: Config | None = None, session_s: float | None = None
) -> float | None:
    """Estimate the seconds that a run still takes after its newest line; None where there is none with times.

    config: its evaluations, checkpoints and export are counted too. session_s: what a session of an evaluation took,
    where that was measured.
    """
    timed = [line for line in lines if step_seconds(line) > 0]
    if not timed:
        return None
    done = timed[-1]["iteration"] + 1
    left = max(num_iterations - done, 0)
    seconds = left * median(step_seconds(line) for line in (timed[1:] or timed)[-NUM_NEWEST:])
    if config is None:
        return seconds
    saves = [taken for line in timed if (taken := _number(line, "time/save_s"))]
    num_saves = left // config.run.save_every + 2  # the last one, and the export
    session = session_s if session_s is not None else session_seconds(timed, config)
    return seconds + num_saves * (fmean(saves) if saves else 0.0) + num_sessions_left(done, config) * session


def step_seconds(line: Mapping[str, Any]) -> float:
    """Sum up the seconds of an iteration, evaluation and checkpoint aside."""
    return sum(_number(line, name) for name in line if TIME.fullmatch(name) and name not in NOW_AND_THEN)


def _number(line: Mapping[str, Any], name: str) -> float:
    """Read a figure of a line; 0 where there is none, or no number, in a file that others have written to."""
    value = line.get(name)
    return float(value) if isinstance(value, int | float) and isfinite(value) else 0.0


def num_sessions_left(done: int, config: Config) -> int:
    """Count the held-out sessions that are still evaluated after `done` iterations, at most."""
    every, evaluation, last = config.evaluation.every, config.evaluation, config.run.num_iterations
    num_short = (last - 1) // every - min(done, last - 1) // every if every else 0
    num_short += bool(config.run.patience and done < last)
    num_compared = min(config.run.num_judged, evaluation.num_sessions)
    return num_short * evaluation.num_sessions_short + evaluation.num_sessions + 2 * num_compared


def session_seconds(lines: Lines, config: Config) -> float:
    """Estimate the seconds of an evaluated session, by the newest short evaluation, else by training."""
    for line in reversed(lines):
        if evaluating := _number(line, "time/evaluate_s"):
            return evaluating / config.evaluation.num_sessions_short
    rollout, line = config.rollout, lines[-1]
    taken = {name: _number(line, f"time/{name}_s") for name in (*ROLLOUT, "score")}
    taken["denoise"] *= config.evaluation.num_steps / rollout.num_steps
    taken["denoise"] *= 1 if rollout.is_guided or config.model.cfg_scale == 1 else 2
    turns = config.num_held_out_turns / config.data.num_turns
    return sum(taken.values()) * turns / (rollout.num_tasks * rollout.group_size)


def core_wait_seconds() -> float | None:
    """Read how long this thread has waited for a core that others had; None where the system does not say."""
    try:
        return int(_SCHEDSTAT.read_text().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return None


class CoreWait:
    """Measures what share of the time a thread waits for a core: what others do on the machine is no speed of ours."""

    def __init__(self) -> None:
        self._start, self._waited = time.monotonic(), core_wait_seconds()

    def read(self) -> dict[str, float]:
        """Return the share since the start or the last `read`, in [0, 1]; empty where the system does not say."""
        now, waited, start, before = time.monotonic(), core_wait_seconds(), self._start, self._waited
        self._start, self._waited = now, waited
        if waited is None or before is None or now <= start:
            return {}
        return {CORE_WAIT: min((waited - before) / (now - start), 1.0)}


def say_sharing(share: float) -> str:
    """Say that other work took the cores; empty where it did not."""
    return f"beside other work: waited for a core {share:.0%} of the time" if share > SHARED else ""
