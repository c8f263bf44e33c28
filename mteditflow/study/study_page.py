"""The page of a study: study.json, study.md and a figure per comparison, from the folders of finished runs."""

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mteditflow.config.model import ModelConfig
from mteditflow.config.settings import MIN_SESSIONS
from mteditflow.evaluate.edival import Floats
from mteditflow.evaluate.held_out import load_evaluation
from mteditflow.record.figures import METRICS, format_number
from mteditflow.record.files import write_json
from mteditflow.record.templates import write_page
from mteditflow.report.charts import ticks
from mteditflow.study.cells import CellRun, Comparison
from mteditflow.study.statistics import OVERALL, Estimate, Outcome, Outcomes, read_outcome, verdict

LEFT, RIGHT, TOP, ROW_HEIGHT = 190, 620, 14, 34  # pixels of a figure


def write_study(folder: Path, comparisons: list[Comparison], runs: list[CellRun], how: dict[str, Any]) -> Path:
    """Write study.json, study.md and the figures from these finished runs, at least one; returns the page.

    `how` is what the page says of how they were made: command, commits, num_finished, num_runs.
    """
    editors = {model: [run for run in runs if run.cell.config.model == model] for model in models_of(comparisons)}
    outcomes = {model: read_outcomes(of_model) for model, of_model in editors.items() if of_model}
    held_out = runs[0].config
    contents = how | {
        "num_sessions": held_out.evaluation.num_sessions,
        "has_intervals": held_out.evaluation.num_sessions >= MIN_SESSIONS,
        "min_sessions": MIN_SESSIONS,
        "turn": held_out.num_held_out_turns,
        "editors": [_describe_editor(model, found) for model, found in outcomes.items()],
        "comparisons": [_describe_comparison(it, outcomes.get(it.model)) for it in comparisons],
    }
    for comparison in contents["comparisons"]:
        if comparison["verdict"] != "no order expected" and not contents["has_intervals"]:
            comparison["verdict"] = f"not decided: fewer than {MIN_SESSIONS} sessions"
        write_page(
            "study/study.svg.jinja",
            _lay_out(comparison, contents["has_intervals"]),
            folder / f"{comparison['name']}.svg",
        )
    write_json(folder / "study.json", contents)
    return write_page("study/study.md.jinja", contents, folder / "study.md")


def models_of(comparisons: list[Comparison]) -> list[ModelConfig]:
    """List the editors of a study, in the order of their first comparisons."""
    return list(dict.fromkeys(comparison.model for comparison in comparisons))


def read_outcomes(runs: list[CellRun]) -> Outcomes:
    """Read the outcomes of finished runs of one editor, at least one."""
    base = load_evaluation(runs[0].folder, "before")
    assert base is not None
    by_cell: dict[str, dict[int, Outcome]] = {}
    for run in runs:
        written_ns = (run.folder / "evaluation_after.safetensors").stat().st_mtime_ns
        by_cell.setdefault(run.cell.key, {})[run.seed] = read_outcome(run.folder, written_ns)
    return Outcomes(base, by_cell)


def _describe_editor(model: ModelConfig, outcomes: Outcomes) -> dict[str, Any]:
    """Describe an editor before training, and the spread between seeds of its cells."""
    return {
        "editor": model.path,
        "before": _name_metrics(outcomes.base_point),
        "seed_std": {"value": round(outcomes.alone.mean_square**0.5, 2), "dof": round(outcomes.alone.dof, 1)},
        "paired_seed_std": {"value": round(outcomes.paired.mean_square**0.5, 2), "dof": outcomes.paired.dof},
        "success": _round(outcomes.base_success, 1),
        "drift": _round(outcomes.base_drift, 3),
        "prediction": outcomes.prediction(),
    }


def _round(values: Floats, digits: int) -> list[float | None]:
    """Round values (K,), None for NaN."""
    return [round(value, digits) + 0.0 if np.isfinite(value) else None for value in values.tolist()]


def _mean(runs: Iterable[Outcome], name: str, digits: int) -> list[float | None]:
    """Average a figure (K,) of runs."""
    return _round(np.mean([getattr(run, name) for run in runs], axis=0), digits)


def _name_metrics(point: Floats) -> dict[str, float]:
    """Round MT, IF, CC, O (4,), by name."""
    return {metric: round(float(value), 2) for metric, value in zip(METRICS, point, strict=True)}


def _describe_comparison(comparison: Comparison, outcomes: Outcomes | None) -> dict[str, Any]:
    """Describe a comparison as page and study.json have it: its editor, its rows, the paper's claims, the verdict.
    outcomes: of its editor; None where no run of it is finished.
    """
    keys = {name: cell.key for name, cell in comparison.cells.items()}
    claims = [
        (a, b, outcomes and outcomes.difference(keys[a], keys[b], comparison.seeds)) for a, b in comparison.claims
    ]
    return {
        "name": comparison.name,
        "question": comparison.question,
        "note": comparison.note,
        "editor": comparison.model.path,
        "before": outcomes and _name_metrics(outcomes.base_point),
        "seeds": list(comparison.seeds),
        "rows": [_describe_cell(name, comparison, outcomes) for name in comparison.cells],
        "claims": [{"ahead": a, "behind": b, "difference": _as_dict(value)} for a, b, value in claims],
        "verdict": verdict([value for *_, value in claims]),
    }


def _describe_cell(name: str, comparison: Comparison, outcomes: Outcomes | None) -> dict[str, Any]:
    """Describe a cell of a comparison; one of which no run is finished has no figures."""
    cell, reference = comparison.cells[name], next(iter(comparison.cells.values()))
    by_seed = outcomes.at(cell.key, comparison.seeds) if outcomes else {}
    runs, config = by_seed.values(), cell.config
    images = config.rollout.num_tasks * config.rollout.group_size * config.data.num_turns
    turn_images = images * config.run.num_iterations
    row = {"cell": name, "key": cell.key, "seeds": list(by_seed), "turn_images": turn_images}
    if not runs or outcomes is None:
        return row
    difference = None if cell is reference else outcomes.difference(cell.key, reference.key, comparison.seeds)
    gains = [run.point[OVERALL] - outcomes.base_point[OVERALL] for run in runs]
    return row | {
        "after": _name_metrics(np.mean([run.point for run in runs], axis=0)),
        "gain_by_seed": [round(float(gain), 2) + 0.0 for gain in gains],
        "gain": _as_dict(outcomes.gain(cell.key, comparison.seeds)),
        "difference": _as_dict(difference),
        "success": _mean(runs, "success", 1),
        "drift": _mean(runs, "drift", 3),
        "credit": _mean(runs, "credit", 3),
        "seed_std": round(outcomes.paired.of[cell.key][0] ** 0.5, 2),
        "training_reward": [round(float(np.mean(ends)), 4) for ends in zip(*(r.rewards for r in runs), strict=True)],
    }


def _as_dict(value: Estimate | None) -> dict[str, float] | None:
    return None if value is None else asdict(value)


def _lay_out(comparison: dict[str, Any], has_intervals: bool) -> dict[str, Any]:
    """Lay out a comparison's figure: a line per cell, its gain with interval, a dot per seed."""
    rows = [row for row in comparison["rows"] if row["seeds"]]
    shown = {end: end if has_intervals else "value" for end in ("low", "value", "high")}
    ends = [0.0, *(v for r in rows for v in (*(r["gain"][end] for end in shown.values()), *r["gain_by_seed"]))]
    places = ticks(min(ends), max(max(ends), min(ends) + 1))

    def across(value: float) -> float:
        return round(LEFT + (RIGHT - LEFT) * (value - places[0]) / (places[-1] - places[0]), 1)

    return {
        "question": comparison["question"],
        "lines": [
            {
                "name": row["cell"],
                "y": TOP + ROW_HEIGHT * place + ROW_HEIGHT // 2,
                **{end: across(row["gain"][name]) for end, name in shown.items()},
                "dots": [across(value) for value in row["gain_by_seed"]],
                "label": format_number(row["gain"]["value"], has_sign=True),
            }
            for place, row in enumerate(rows)
        ],
        "ticks": [{"x": across(value), "label": f"{value:g}"} for value in places],
        "zero": across(0),
        "top": TOP,
        "bottom": TOP + ROW_HEIGHT * len(rows),
    }
