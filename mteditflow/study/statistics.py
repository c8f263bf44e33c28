"""What the finished runs of a study say of its cells: means over seeds, with intervals over sessions and seeds.

Every cell is evaluated on the same held-out sessions, and seed s gives all cells the same tasks and noise, so cells are
compared pair by pair. For cells a and b with the R seeds that both have finished,

    d = mean_s O(a, s) - mean_s O(b, s)

errs for two reasons, and the interval has both:
- The sessions are a sample. They are drawn anew (bootstrap, the same draw for both cells and all seeds): the deviates
  of d for the adapters that we have.
- The seeds are a sample. O(c, s) = cell + seed + rest: least squares over all cells and seeds of the study leave for
  cell c a mean square m(c) of the rest, and d has a variance of (m(a) + m(b)) / R, the seed's part having cancelled.

A few seeds say little of a cell's own spread, and cells differ in it: what learns by luck spreads more. So m(c) is the
cell's own mean square drawn towards that of all, as far as they are alike (moderated variances; Smyth, Statistical
Applications in Genetics and Molecular Biology 3, 2004, section 6): of

    m(c) = (f0 m0 + f(c) own(c)) / (f0 + f(c))     on f0 + f(c) degrees of freedom

m0 and f0 are those of the highest likelihood of the cells' own, of few seeds and of many. Where these vary no more than
cells of one spread do, and of fewer than MIN_CELLS cells, m(c) is one mean square for all. The degrees of freedom of d
are Satterthwaite's of the two.

The interval is the 2.5 to 97.5 % range of session deviate + standard error x Student's t, drawn independently. How
sessions and seeds act together is in both parts, so it is wide rather than narrow.

For the gain over the base, which no seed changes, the seed's part stays in: its variance, by which the mean square of
O(c, s) = cell + rest is larger than that of the two-way model, is added to m(c). All cells share it, on R - 1 degrees
of freedom. Without a cell of several seeds the interval is of the sessions alone, and the page says so.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mteditflow.evaluate.edival import Evaluation, Floats, point_metrics, resampled_metrics
from mteditflow.evaluate.held_out import load_evaluation
from mteditflow.judge.agreement import rank_correlation
from mteditflow.record.alarms import drift_size
from mteditflow.record.figures import METRICS, finite
from mteditflow.record.metrics import FILE, read_lines

T_DRAWS = 50  # per bootstrap sample: 100,000 in all put the ends of the interval within about 1 % of its width
NUM_LAST = 5  # iterations over which the training reward at the start and at the end is taken
MIN_CELLS = 5  # that a rank correlation is told of, and how much cells differ in their spread
MAX_FREEDOM, NUM_TRIED = 1e4, 401  # of f0, each 2.3 % above the one before; the last one stands for infinity
MIN_FREEDOM = 1.5  # degrees of freedom of a cell from which its spread counts among those of all: of three seeds
MARGINAL, OVERALL = list(METRICS).index("MT"), list(METRICS).index("O")

Points = Mapping[str, Mapping[int, float]]
"""O in percent by cell and seed."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A run at the last held-out turn: MT, IF, CC, O in percent (4,), O of the bootstrap samples (B,), and the mean
    training reward of the first and of the last iterations. Of every held-out turn success MT, in percent, and the
    mean size of the drift, in thresholds of its alarms. Of every training turn `credit`: the correlation of its
    advantages with the drift that it added, over the first iterations, when all cells have the same editor.
    """

    point: Floats
    samples: Floats
    rewards: tuple[float, float]
    success: Floats
    drift: Floats
    credit: Floats


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Mean square of O between seeds, what the model of it explains left out, with its degrees of freedom: pooled over
    the cells, and `of` each.
    """

    mean_square: float
    dof: float
    of: Mapping[str, tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over seeds with its 95 % interval, in points."""

    value: float
    low: float
    high: float


def spreads(points: Points) -> tuple[Spread, Spread]:
    """Measure the spread between seeds of a cell; and between seeds of a difference of cells, the seeds' common part
    taken out.
    """
    rows = [(cell, seed, value) for cell, by_seed in points.items() for seed, value in by_seed.items()]
    values = np.array([value for *_, value in rows])
    seeds = sorted({seed for _, seed, _ in rows})
    cell_columns = np.array([[cell == column for column in points] for cell, _, _ in rows], dtype=float)
    seed_columns = np.array([[seed == column for column in seeds] for _, seed, _ in rows], dtype=float)
    names = [cell for cell, *_ in rows]
    alone, of_cell = _residual(cell_columns, values, names)
    paired, of_pair = _residual(np.hstack([cell_columns, seed_columns]), values, names)
    dof, paired_dof = (round(sum(freedom for _, freedom in of.values())) for of in (of_cell, of_pair))
    parts = (alone - paired, dof - paired_dof), (paired, paired_dof)
    scale = sum(squares**2 / freedom for squares, freedom in parts if freedom)
    mean_square = alone / dof if dof else 0.0
    paired_square = paired / paired_dof if paired_dof else 0.0
    own, shared = moderate(of_pair), (max(mean_square - paired_square, 0.0), dof - paired_dof)
    return (
        Spread(
            mean_square=mean_square, dof=alone**2 / scale if scale else dof,
            of={cell: (it[0] + shared[0], satterthwaite([it, shared])) for cell, it in own.items()},
        ),
        Spread(mean_square=paired_square, dof=paired_dof, of=own),
    )  # fmt: skip


def satterthwaite(parts: Iterable[tuple[float, float]]) -> float:
    """Degrees of freedom of a sum of independent mean squares, each with its own; 0 of nothing."""
    known = [(square, dof) for square, dof in parts if dof and square]
    return sum(square for square, _ in known) ** 2 / sum(square**2 / dof for square, dof in known) if known else 0.0


def _residual(design: Floats, values: Floats, names: Sequence[str]) -> tuple[float, dict[str, tuple[float, float]]]:
    """Compute the sum of squares that least squares leave; and of the rows of each name, with their degrees of freedom,
    which are the rows less their leverages.
    """
    basis, weights, _ = np.linalg.svd(design, full_matrices=False)
    basis = basis[:, weights > 1e-9 * weights.max()]
    squares, freedom = (values - basis @ (basis.T @ values)) ** 2, 1 - (basis**2).sum(1)
    rows = {name: np.array([name == other for other in names]) for name in names}
    return float(squares.sum()), {name: (squares[at].sum(), freedom[at].sum()) for name, at in rows.items()}


def moderate(of: Mapping[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """Draw the mean square of each cell towards that of all, from sums of squares and their degrees of freedom; gives
    each with its degrees of freedom.
    """
    total, dof = sum(squares for squares, _ in of.values()), round(sum(freedom for _, freedom in of.values()))
    prior, prior_dof = _prior([(squares, freedom) for squares, freedom in of.values() if freedom > MIN_FREEDOM])
    if np.isinf(prior_dof):
        return dict.fromkeys(of, (total / dof if dof else 0.0, dof))
    return {
        cell: ((prior_dof * prior + squares) / (prior_dof + freedom), prior_dof + freedom)
        for cell, (squares, freedom) in of.items()
    }


def _prior(cells: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Fit m0 and f0 to cells' sums of squares by maximum likelihood: own(c) / m0 has an F distribution of f(c) and f0
    degrees of freedom. f0 is infinite where nothing says that the cells differ.
    """
    if len(cells) < MIN_CELLS or min(squares for squares, _ in cells) <= 0:
        return 0.0, np.inf
    squares, freedom = torch.tensor(cells, dtype=torch.float64).unbind(1)
    tried = torch.logspace(0, np.log10(MAX_FREEDOM), NUM_TRIED, dtype=torch.float64)[:, None]
    low, high = (end.expand(NUM_TRIED, 1) for end in torch.aminmax(squares / freedom))
    for _ in range(60):  # m0 of each f0, where the likelihood's slope is 0: the left side falls with m0
        middle = (low * high).sqrt()
        ratio = squares / (tried * middle)
        is_low = ((freedom + tried) * ratio / (1 + ratio)).sum(1, keepdim=True) > freedom.sum()
        low, high = torch.where(is_low, middle, low), torch.where(is_low, high, middle)
    ratio = squares / (tried * low)
    beta = (freedom / 2).lgamma() + (tried / 2).lgamma() - ((freedom + tried) / 2).lgamma()
    likelihood = (freedom / 2 * ratio.log() - (freedom + tried) / 2 * ratio.log1p() - beta).sum(1)
    best = int(likelihood.argmax())
    return low[best].item(), np.inf if best == NUM_TRIED - 1 else tried[best].item()


def estimate(value: float, samples: Floats, variance: float, dof: float) -> Estimate:
    """Compute the interval of a mean whose bootstrap samples of the sessions are `samples` (B,), and whose seeds add
    `variance`, known to `dof` degrees of freedom; none: of the sessions alone.
    """
    draws = np.repeat(samples, T_DRAWS)
    if dof:
        draws = draws + np.sqrt(variance) * np.random.default_rng(1).standard_t(dof, size=draws.size)
    low, high = np.quantile(draws, [0.025, 0.975])
    value, low, high = (round(float(number), 2) + 0.0 for number in (value, low, high))  # no -0.0
    return Estimate(value=value, low=low, high=high)


@cache
def read_outcome(folder: Path, written_ns: int) -> Outcome:
    """Read the outcome of a finished run, once for all pages of a study; written_ns: when it was evaluated."""
    after = load_evaluation(folder, "after")
    assert after is not None
    lines = read_lines(folder / FILE)
    rewards = [value for line in lines if (value := line["reward/instruction"]) is not None]
    ends = float(np.mean(rewards[:NUM_LAST])), float(np.mean(rewards[-NUM_LAST:]))
    return Outcome(
        point=point_metrics(after)[:, -1], samples=resampled_metrics(after)[OVERALL, :, -1], rewards=ends,
        success=point_metrics(after)[MARGINAL], drift=mean_drift(after), credit=_mean_credit(lines[:NUM_LAST]),
    )  # fmt: skip


def mean_drift(evaluation: Evaluation) -> Floats:
    """Average the size of the drift over the sessions, per turn (K,); NaN where it was not measured."""
    if evaluation.drift is None:
        return np.full(evaluation.verdict.shape[1], np.nan)
    return drift_size(evaluation.drift[evaluation.valid]).double().nanmean(0).numpy()


def _mean_credit(lines: Sequence[Mapping[str, Any]]) -> Floats:
    """Average `drift/credit_k` over iterations, per turn (K,), NaN where it is known in none."""
    by_turn, turn = list[float](), 1
    while any(f"drift/credit_{turn}" in line for line in lines):
        found = [value for line in lines if (value := finite(line.get(f"drift/credit_{turn}"))) is not None]
        by_turn.append(float(np.mean(found)) if found else np.nan)
        turn += 1
    return np.array(by_turn)


class Outcomes:
    """The outcomes of a study's finished runs by cell and seed, with their pooled spreads. `base` is the evaluation
    before training, of all.
    """

    def __init__(self, base: Evaluation, by_cell: dict[str, dict[int, Outcome]]) -> None:
        self.by_cell = by_cell
        self.base_point, self.base_samples = point_metrics(base)[:, -1], resampled_metrics(base)[OVERALL, :, -1]
        self.base_success, self.base_drift = point_metrics(base)[MARGINAL], mean_drift(base)
        overall = {c: {s: float(run.point[OVERALL]) for s, run in by_seed.items()} for c, by_seed in by_cell.items()}
        self.alone, self.paired = spreads(overall)

    def at(self, cell: str, seeds: Iterable[int]) -> dict[int, Outcome]:
        """Select a cell's outcomes at those of the seeds that are finished."""
        by_seed = self.by_cell.get(cell, {})
        return {seed: by_seed[seed] for seed in seeds if seed in by_seed}

    def prediction(self) -> dict[str, float | int] | None:
        """Correlate, by rank over the cells, the mean `credit` of all turns with the drift that is left at the last
        held-out turn: above 0 where the cells whose advantages speak most against drift end with least. None of fewer
        than MIN_CELLS cells.
        """
        pairs = [
            (np.mean([run.credit.mean() for run in runs.values()]), np.mean([run.drift[-1] for run in runs.values()]))
            for runs in self.by_cell.values()
        ]
        known = np.array([pair for pair in pairs if np.isfinite(pair).all()])
        if len(known) < MIN_CELLS:
            return None
        correlation = rank_correlation(*torch.from_numpy(known).T)
        return {"rank_correlation": round(correlation, 2), "num_cells": len(known)}

    def gain(self, cell: str, seeds: Iterable[int]) -> Estimate | None:
        """Estimate the mean over the seeds of O after training less O before; None where no seed is finished."""
        runs = self.at(cell, seeds).values()
        if not runs:
            return None
        value = float(np.mean([run.point[OVERALL] for run in runs]) - self.base_point[OVERALL])
        samples = np.mean([run.samples for run in runs], axis=0) - self.base_samples
        mean_square, dof = self.alone.of[cell]
        return estimate(value, samples, mean_square / len(runs), dof)

    def difference(self, a: str, b: str, seeds: Sequence[int]) -> Estimate | None:
        """Estimate the mean, over the seeds that both have, of O of cell a less that of cell b; None without any."""
        of_a, of_b = self.at(a, seeds), self.at(b, seeds)
        pairs = [(of_a[seed], of_b[seed]) for seed in of_a if seed in of_b]
        if not pairs:
            return None
        value = float(np.mean([x.point[OVERALL] - y.point[OVERALL] for x, y in pairs]))
        samples = np.mean([x.samples - y.samples for x, y in pairs], axis=0)
        own = self.paired.of[a], self.paired.of[b]
        return estimate(value, samples, sum(square for square, _ in own) / len(pairs), satterthwaite(own))


def verdict(claims: list[Estimate | None]) -> str:
    """Say what the differences, the paper's better cell less its worse, mean for the paper's order."""
    known = [claim for claim in claims if claim is not None]
    if not claims:
        return "no order expected"
    if any(claim.high < 0 for claim in known):
        return "against the paper"
    num_clear = sum(claim.low > 0 for claim in known)
    if len(known) < len(claims):
        return "not finished"
    if num_clear == len(claims):
        return "agrees with the paper"
    if num_clear:
        return f"agrees with the paper in {num_clear} of {len(claims)} pairs, the others not decided at this size"
    return "not decided at this size (interval contains 0)"
