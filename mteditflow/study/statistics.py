"""What a study has found: `study.json`, `study.md` and a figure per comparison, from the folders of finished runs.

Every cell is evaluated on the same held-out sessions, and seed s gives all cells the same tasks and noise, so cells are
compared pair by pair. For cells a and b with the R seeds that both have finished,

    d = mean_s O(a, s) - mean_s O(b, s)

errs for two reasons, and the interval has both:
- The sessions are a sample. They are drawn anew (bootstrap, the same draw for both cells and all seeds): the deviates
  of d for the adapters that we have.
- The seeds are a sample. O(c, s) = cell + seed + rest: least squares over all cells and seeds of the study leave a mean
  square m of the rest on f degrees of freedom, and d has a standard error of sqrt(2 m / R), the seed's part having
  cancelled. With three seeds a cell's own spread says next to nothing, hence one m for all cells.
The interval is the 2.5 to 97.5 % range of session deviate + standard error x Student's t with f degrees of freedom,
drawn independently. How sessions and seeds act together is in both parts, so it is wide rather than narrow.

For the gain over the base, which no seed changes, the seed's part stays in: m is then of O(c, s) = cell + rest, and the
error is sqrt(m / R). That m comes from two sums of squares, S of the seeds on g and S' of the rest on f degrees of
freedom, and has itself about (S + S')^2 / (S^2 / g + S'^2 / f) of them (Satterthwaite): all cells share few seeds.
Without a cell of several seeds the interval is of the sessions alone, and the page says so.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray

from mteditflow.evaluate.edival import METRICS, Evaluation, load_evaluation, point_metrics, resampled
from mteditflow.record.metrics import FILE, read_lines
from mteditflow.study.cells import CellRun, Comparison

T_DRAWS = 50  # per bootstrap sample: 100,000 in all put the ends of the interval within about 1 % of its width
NUM_LAST = 5  # iterations over which the training reward at the end is taken
OVERALL = METRICS.index("O")

Floats = NDArray[np.float64]
Points = Mapping[str, Mapping[int, float]]
"""O in percent by cell and seed."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A run at the last held-out turn: MT, IF, CC, O in percent (4,), O of the bootstrap samples (B,), and the mean
    training reward of the first and of the last iterations.
    """

    point: Floats
    samples: Floats
    rewards: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Mean square of O between seeds, what the model of it explains left out, and its degrees of freedom."""

    mean_square: float
    dof: float


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over seeds with its 95 % interval, in points."""

    value: float
    low: float
    high: float


def spreads(points: Points) -> tuple[Spread, Spread]:
    """Between seeds of a cell; and between seeds of a difference of cells, the seeds' common part taken out."""
    rows = [(cell, seed, value) for cell, by_seed in points.items() for seed, value in by_seed.items()]
    values = np.array([value for *_, value in rows])
    seeds = sorted({seed for _, seed, _ in rows})
    of_cells = np.array([[cell == own for own in points] for cell, _, _ in rows], dtype=float)
    of_seeds = np.array([[seed == own for own in seeds] for _, seed, _ in rows], dtype=float)
    alone, dof = _residual(of_cells, values)
    paired, paired_dof = _residual(np.hstack([of_cells, of_seeds]), values)
    parts = [(part, own) for part, own in ((alone - paired, dof - paired_dof), (paired, paired_dof)) if own]
    scale = sum(part**2 / own for part, own in parts)
    return (
        Spread(mean_square=alone / dof if dof else 0.0, dof=alone**2 / scale if scale else dof),
        Spread(mean_square=paired / paired_dof if paired_dof else 0.0, dof=paired_dof),
    )


def _residual(design: Floats, values: Floats) -> tuple[float, int]:
    """Sum of squares that least squares leave, and its degrees of freedom."""
    fit, _, rank, _ = np.linalg.lstsq(design, values, rcond=None)
    return float(((values - design @ fit) ** 2).sum()), len(values) - int(rank)


def estimate(value: float, samples: Floats, variance: float, dof: float) -> Estimate:
    """The interval of a mean whose bootstrap samples of the sessions are `samples` (B,), and whose seeds add
    `variance`, known to `dof` degrees of freedom; none: of the sessions alone.
    """
    draws = np.repeat(samples, T_DRAWS)
    if dof:
        draws = draws + np.sqrt(variance) * np.random.default_rng(1).standard_t(dof, size=draws.size)
    low, high = np.quantile(draws, [0.025, 0.975])
    return Estimate(value=round(value, 2), low=round(float(low), 2), high=round(float(high), 2))


def read_outcome(folder: Path) -> Outcome:
    """The outcome of a finished run."""
    after = load_evaluation(folder, "after")
    assert after is not None
    lines = [line["reward/instruction"] for line in read_lines(folder / FILE)]
    rewards = [value for value in lines if value is not None]
    ends = float(np.mean(rewards[:NUM_LAST])), float(np.mean(rewards[-NUM_LAST:]))
    return Outcome(point=point_metrics(after)[:, -1], samples=resampled(after)[OVERALL, :, -1], rewards=ends)


class Findings:
    """The outcomes of a study's finished runs, and what they say. `base` is the evaluation before training, of all."""

    def __init__(self, base: Evaluation, outcomes: dict[str, dict[int, Outcome]]) -> None:
        self.base, self.outcomes = base, outcomes
        self.base_point, self.base_samples = point_metrics(base)[:, -1], resampled(base)[OVERALL, :, -1]
        points = {c: {seed: float(own.point[OVERALL]) for seed, own in by.items()} for c, by in outcomes.items()}
        self.alone, self.paired = spreads(points)

    def gain(self, cell: str, seeds: Iterable[int]) -> Estimate | None:
        """Mean over the seeds of O after training less O before; None where no seed is finished."""
        own = [self.outcomes[cell][seed] for seed in seeds if seed in self.outcomes.get(cell, {})]
        if not own:
            return None
        value = float(np.mean([run.point[OVERALL] for run in own]) - self.base_point[OVERALL])
        samples = np.mean([run.samples for run in own], axis=0) - self.base_samples
        return estimate(value, samples, self.alone.mean_square / len(own), self.alone.dof)

    def difference(self, a: str, b: str, seeds: Iterable[int]) -> Estimate | None:
        """Mean over the seeds that both have of O of cell a less that of cell b; None where there is none."""
        pairs = [
            (self.outcomes[a][s], self.outcomes[b][s])
            for s in seeds
            if all(s in self.outcomes.get(c, {}) for c in (a, b))
        ]
        if not pairs:
            return None
        value = float(np.mean([x.point[OVERALL] - y.point[OVERALL] for x, y in pairs]))
        samples = np.mean([x.samples - y.samples for x, y in pairs], axis=0)
        return estimate(value, samples, 2 * self.paired.mean_square / len(pairs), self.paired.dof)


def verdict(claims: list[Estimate | None]) -> str:
    """What the differences, the paper's better cell less its worse, say of the paper's order."""
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


def _row(name: str, comparison: Comparison, findings: Findings) -> dict[str, Any]:
    """A cell of a comparison, as the page and study.json have it."""
    cell, reference = comparison.cells[name], next(iter(comparison.cells.values()))
    by_seed = findings.outcomes.get(cell.key, {})
    own = [by_seed[seed] for seed in comparison.seeds if seed in by_seed]
    config = cell.config
    images = config.rollout.num_tasks * config.rollout.group_size * config.data.num_turns
    row = {
        "cell": name,
        "key": cell.key,
        "seeds": [seed for seed in comparison.seeds if seed in by_seed],
        "turn_images": images * config.run.num_iterations,
    }
    if not own:
        return row
    after = np.mean([run.point for run in own], axis=0)
    difference = None if cell is reference else findings.difference(cell.key, reference.key, comparison.seeds)
    return row | {
        "after": {metric: round(float(value), 2) for metric, value in zip(METRICS, after, strict=True)},
        "gain_by_seed": [round(float(run.point[OVERALL] - findings.base_point[OVERALL]), 2) for run in own],
        "gain": _plain(findings.gain(cell.key, comparison.seeds)),
        "difference": _plain(difference),
        "training_reward": [round(float(np.mean(ends)), 4) for ends in zip(*(run.rewards for run in own), strict=True)],
    }


def _plain(value: Estimate | None) -> dict[str, float] | None:
    return None if value is None else {"value": value.value, "low": value.low, "high": value.high}


def _finding(comparison: Comparison, findings: Findings) -> dict[str, Any]:
    """A comparison: its rows, the paper's claims, the verdict."""
    keys = {name: cell.key for name, cell in comparison.cells.items()}
    claims = [(a, b, findings.difference(keys[a], keys[b], comparison.seeds)) for a, b in comparison.claims]
    return {
        "name": comparison.name,
        "question": comparison.question,
        "note": comparison.note,
        "seeds": list(comparison.seeds),
        "rows": [_row(name, comparison, findings) for name in comparison.cells],
        "claims": [{"ahead": a, "behind": b, "difference": _plain(value)} for a, b, value in claims],
        "verdict": verdict([value for *_, value in claims]),
    }


def write_findings(folder: Path, comparisons: list[Comparison], runs: list[CellRun], how: dict[str, Any]) -> Path:
    """Write study.json, study.md and the figures from these finished runs, at least one; returns the page.

    `how` is what the page says of how they were made: command, commits, num_finished, num_runs.
    """
    base = load_evaluation(runs[0].folder, "before")
    assert base is not None
    outcomes: dict[str, dict[int, Outcome]] = {}
    for run in runs:
        outcomes.setdefault(run.cell.key, {})[run.seed] = read_outcome(run.folder)
    findings = Findings(base, outcomes)
    contents = how | {
        "num_sessions": len(base.verdict),
        "turn": base.verdict.shape[1],
        "before": {metric: round(float(value), 2) for metric, value in zip(METRICS, findings.base_point, strict=True)},
        "seed_std": {"value": round(findings.alone.mean_square**0.5, 2), "dof": round(findings.alone.dof, 1)},
        "paired_seed_std": {"value": round(findings.paired.mean_square**0.5, 2), "dof": findings.paired.dof},
        "comparisons": [_finding(comparison, findings) for comparison in comparisons],
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), trim_blocks=True, undefined=jinja2.StrictUndefined,
        autoescape=jinja2.select_autoescape(("svg.jinja",)),
    )  # fmt: skip
    for comparison in contents["comparisons"]:
        figure = environment.get_template("study.svg.jinja").render(_figure(comparison))
        _write(folder / f"{comparison['name']}.svg", figure)
    _write(folder / "study.json", json.dumps(contents, indent=1) + "\n")
    page = environment.get_template("study.md.jinja").render(contents)
    _write(folder / "study.md", page)
    return folder / "study.md"


def _figure(comparison: dict[str, Any]) -> dict[str, Any]:
    """Geometry of a comparison's figure: a line per cell, its gain with interval, a dot per seed."""
    rows = [row for row in comparison["rows"] if row["seeds"]]
    ends = [
        0.0,
        *(row["gain"][end] for row in rows for end in ("low", "high")),
        *(v for r in rows for v in r["gain_by_seed"]),
    ]
    low, high = min(ends), max(max(ends), min(ends) + 1)
    step = next(step for step in (0.2, 0.5, 1, 2, 5, 10, 20, 50) if (high - low) / step <= 8)
    first, last = int(np.floor(low / step)), int(np.ceil(high / step))
    left, right, top, height = 190, 620, 14, 34

    def across(value: float) -> float:
        return round(left + (right - left) * (value / step - first) / (last - first), 1)

    lines = [
        {
            "name": row["cell"],
            "y": top + height * place + height // 2,
            **{end: across(row["gain"][end]) for end in ("low", "value", "high")},
            "dots": [across(value) for value in row["gain_by_seed"]],
            "label": f"{row['gain']['value']:+.1f}",
        }
        for place, row in enumerate(rows)
    ]
    ticks = [{"x": across(n * step), "label": f"{n * step:g}"} for n in range(first, last + 1)]
    bottom = top + height * len(rows)
    return {
        "lines": lines,
        "ticks": ticks,
        "zero": across(0),
        "top": top,
        "bottom": bottom,
        "question": comparison["question"],
    }


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
