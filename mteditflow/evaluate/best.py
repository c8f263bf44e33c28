"""When a run stops before its last iteration, and which of its averages is the best: held-out O decides (run.patience).

A short evaluation is off by several points. *Progress* is what stands clear of that: an evaluation whose paired gain in
O has a 95 % interval above 0, over the last evaluation that made progress, at first the base's. So small gains add up
until they are clear. After `run.patience` evaluations in a row without progress training stops. The best average is the
one with the highest O, of equals the earlier: a guess, but the likeliest. Its figures in the end are of all held-out
sessions, most of which did not choose it.

O is that of the last turn; where no session has anything that no instruction touched, IF stands for it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mteditflow.config import Config
from mteditflow.distributed import Ranks
from mteditflow.evaluate.edival import Evaluation, compare, point_metrics
from mteditflow.export.weights import BEST, STANDING
from mteditflow.record.checkpoint import Checkpoint, State

TABLES = ("verdict", "consistency", "valid")


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How a run stands after some short evaluations."""

    mark: Evaluation  # the last that made progress, without its pictures
    num_stalled: int = 0  # evaluations since then
    best: int = 0  # iterations done when O was highest; 0: not evaluated yet
    best_score: float = -1.0  # O there, percent

    def after(self, evaluation: Evaluation, done: int) -> "Standing":
        """Return the standing after one more short evaluation, of the average after `done` iterations."""
        turn = compare(self.mark, evaluation)["turns"][-1]
        interval = turn["O_gain_interval" if turn["O_gain"] is not None else "IF_gain_interval"]
        is_progress, score = interval is not None and interval[0] > 0, _score(evaluation)
        best = {"best": done, "best_score": score} if score > self.best_score else {}
        marked = {"mark": _bare(evaluation)} if is_progress else {}
        return replace(self, **best, **marked, num_stalled=0 if is_progress else self.num_stalled + 1)

    def is_of(self, evaluation: Evaluation) -> bool:
        """Whether an evaluation is of the same sessions, so that it can be compared."""
        return self.mark.verdict.shape == evaluation.verdict.shape

    def state(self) -> dict[str, Tensor]:
        """Return all of it as tensors, for a checkpoint."""
        tables = {name: getattr(self.mark, name) for name in TABLES}
        numbers = {"num_stalled": self.num_stalled, "best": self.best}
        score = torch.tensor(self.best_score, dtype=torch.float64)
        return tables | {name: torch.tensor(number) for name, number in numbers.items()} | {"best_score": score}


class Best:
    """The best average of a run so far, and whether the run should go on; the same on every rank. Its weights lie on
    the host, whole or cut as those of the policy are.
    """

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self._patience, self._ranks = config.run.patience, ranks
        self.standing: Standing | None = None
        self.weights: dict[str, Tensor] = {}

    @property
    def is_over(self) -> bool:
        """Whether training ends before its last iteration, since held-out O does not rise any more."""
        return self.standing is not None and self.standing.num_stalled >= self._patience

    @property
    def iteration(self) -> int | None:
        """Iterations after which the average was best; None where none is kept."""
        return self.standing.best if self.weights and self.standing else None

    def see(
        self, now: Evaluation, base: Evaluation, done: int, weights: Callable[[], Mapping[str, Tensor]]
    ) -> dict[str, float]:
        """Take in a short evaluation of the average, whose weights are kept where it is the best; returns figures for
        the metrics. base: the evaluation before training. The main rank compares: numbers of other machines may differ.
        """
        if not self._patience:
            return {}
        if self.standing is None or not self.standing.is_of(now):  # of other sessions, before a resume
            self.standing = first_standing(base, len(now.verdict))
        self.standing = self._ranks.from_main(self.standing.after(now, done) if self._ranks.is_main else None)
        assert self.standing is not None
        if self.standing.best == done:
            self.weights = _to_host(weights())
        return {
            "heldout/best_iteration": float(self.standing.best),
            "heldout/num_stalled": float(self.standing.num_stalled),
        }

    def state(self) -> State:
        """Return the groups of a checkpoint."""
        state = {STANDING: self.standing.state()} if self.standing else {}
        return state | ({BEST: self.weights} if self.weights else {})

    def restore(self, saved: Checkpoint, like: Mapping[str, Tensor]) -> None:
        """Go on from the groups of a checkpoint, where it has them. like: the average, as its weights are cut."""
        names = (*saved.held, *saved.cut)
        if self._patience and STANDING in names and BEST in names:
            self.standing, self.weights = load_standing(saved.read(STANDING)), _to_host(saved.read(BEST, like))


def _to_host(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight.to("cpu", copy=True) for name, weight in weights.items()}


def first_standing(base: Evaluation, num_sessions: int) -> Standing:
    """Return the standing before any short evaluation, which will be of the base's first `num_sessions`."""
    return Standing(mark=_bare(base, num_sessions))


def load_standing(state: Mapping[str, Tensor]) -> Standing:
    """Return the standing of which `state` gave the tensors."""
    numbers: dict[str, Any] = {name: value.item() for name, value in state.items() if name not in TABLES}
    return Standing(mark=_mark({name: state[name] for name in TABLES}), **numbers)


def _bare(evaluation: Evaluation, num_sessions: int | None = None) -> Evaluation:
    """Leave out what no comparison needs, and all sessions but the first `num_sessions`."""
    return _mark({name: getattr(evaluation, name)[:num_sessions] for name in TABLES})


def _mark(tables: dict[str, Any]) -> Evaluation:
    return Evaluation(**tables, edit_types=[], images=torch.zeros(0), num_steps=0)


def _score(evaluation: Evaluation) -> float:
    """Compute O at the last turn, percent, or IF where O is not defined; 0 where no session could be scored."""
    _, joint, _, overall = point_metrics(evaluation)[:, -1]
    return float(np.nan_to_num(joint if np.isnan(overall) else overall))
