"""One self-contained HTML page of a run, also of one that is still at work or was killed.

    python -m mteditflow.report runs/mini

What the run has not written yet is named on the page as not there yet; page.py has what a page is made of.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mteditflow.config import EMBEDDED
from mteditflow.config.model import EMBEDDED_FOLDER
from mteditflow.record.alarms import ALARMS
from mteditflow.record.metrics import FILE, read_lines
from mteditflow.report.html import (
    METRICS,
    Curve,
    chart,
    data_uri,
    edit_type_bars,
    figure,
    gain_cell,
    number,
    read_json,
    value_cell,
    write_page,
)


@dataclass(frozen=True, kw_only=True)
class ChartSpec:
    """What a chart shows: `keys` of metrics.jsonl, or a pattern whose group names the curve."""

    title: str
    note: str
    keys: str
    is_of_grpo: bool = False  # NFT has no ratio
    is_of_evaluation: bool = False  # of those on the way, evaluation.every


CHARTS = (
    ChartSpec(
        title="Reward",
        note="Mean over the iteration's trajectories, and their spread.",
        keys=r"reward/(mean|std)",
    ),
    ChartSpec(title="Instruction score by turn", note="From 0, ignored, to 1, done.", keys=r"reward/(turn_\d+)"),
    ChartSpec(title="Success by turn", note="Share of edits that the verdict accepts.", keys=r"reward/(success_\d+)"),
    ChartSpec(
        title="Consistency", note="What no instruction touched, against the source.", keys=r"reward/(consistency)"
    ),
    ChartSpec(
        title="Drift from the source",
        note="Of the last turn's pictures, relative: edges, saturation, colourfulness.",
        keys=r"alarm/(\w+)_drift",
    ),
    ChartSpec(
        title="No edit, over-edit",
        note="Share of turns that return their input; share with low consistency.",
        keys=r"alarm/(no_edit|over_edit)_share",
    ),
    ChartSpec(
        title="Held-out O at turn 3",
        note="Percent, short evaluations of the average.",
        keys=r"heldout/(O_3)",
        is_of_evaluation=True,
    ),
    ChartSpec(
        title="Groups without spread",
        note="Share of groups that teach nothing: their scores are all alike.",
        keys=r"reward/(zero_spread_share)",
    ),
    ChartSpec(
        title="Ratio error",
        note="Largest |ratio - 1|: of all updates, and before the first, where it must be 0.",
        keys=r"update/(ratio_error|first_ratio_error)",
        is_of_grpo=True,
    ),
    ChartSpec(
        title="Clip fraction",
        note="Share of transitions whose ratio left the clip range.",
        keys=r"update/(clip_fraction)",
        is_of_grpo=True,
    ),
    ChartSpec(title="Gradient norm", note="Before it is cut to max_grad_norm.", keys=r"update/(grad_norm)"),
    ChartSpec(title="Seconds by phase", note="Of each iteration.", keys=r"time/(\w+)_s"),
)


def write_report(folder: Path) -> Path:
    """Write `folder/report.html` from what the run has written so far. ValueError where there are no metrics."""
    if not (folder / FILE).is_file():
        raise ValueError(f"{folder} is not the folder of a run: it has no {FILE}")
    return write_page("report/report.html.jinja", _contents(folder), folder / "report.html")


def _contents(folder: Path) -> dict[str, Any]:
    """The template's variables."""
    lines = read_lines(folder / FILE)
    before, after = read_json(folder / "evaluation_before.json"), read_json(folder / "evaluation_after.json")
    comparison = read_json(folder / "comparison.json")
    config_path = folder / "config.yaml"
    config_text = config_path.read_text() if config_path.is_file() else ""
    config = _config(config_path, config_text)
    charts = {spec: _chart(spec, lines) for spec in CHARTS}
    is_nft = config.get("objective", {}).get("name") == "nft"
    is_short = bool(config.get("evaluation", {}).get("every", 1))
    never = {spec for spec in CHARTS if (is_nft and spec.is_of_grpo) or (not is_short and spec.is_of_evaluation)}
    reports = {"before training": before, "after training": after, "paired gain": comparison}
    missing = [name for name, value in reports.items() if not value]
    return {
        "title": f"MT-EditFlow: {config.get('run', {}).get('folder') or folder.resolve().name}",
        "what": _what(config),
        "progress": _progress(lines, config),
        "tiles": _tiles(before, after, comparison),
        "table": _table(before, after, comparison) if before or after else [],
        "num_sessions": (after or before).get("num_sessions"),
        "waiting": [f"{', '.join(missing)} (held-out sessions)."] if missing and (before or after) else [],
        "charts": [chart for chart in charts.values() if chart],
        "no_charts": [spec.title for spec, chart in charts.items() if not chart and spec not in never],
        "alarms": _alarms(lines, config),
        "strips": _strips(folder),
        "edit_types": edit_type_bars({"before": before, "after": after}, [5, 0]),
        "lora": _lora_line(folder, config),
        "config_text": config_text,
    }


def _config(path: Path, text: str) -> dict[str, Any]:
    try:
        value = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} has no sections")
    return value


def _what(config: dict[str, Any]) -> str:
    """What the run was, in a sentence."""
    if not config:
        return "What was run is not there yet: config.yaml is missing."
    model, objective = config.get("model", {}), config.get("objective", {})
    data, rollout, lora = config.get("data", {}), config.get("rollout", {}), config.get("lora", {})
    trained = f"LoRA of rank {lora.get('rank', '?')}" if lora.get("rank") != 0 else "the weights themselves trained"
    return (
        f"Editor {model.get('path', '?')} at {model.get('width', '?')} by {model.get('height', '?')} pixels, "
        f"objective {objective.get('name', '?')}, {trained}. "
        f"Each iteration: P = {rollout.get('num_tasks', '?')} tasks, G = {rollout.get('group_size', '?')} trajectories "
        f"of each, K = {data.get('num_turns', '?')} turns, S = {rollout.get('num_steps', '?')} denoising steps."
    )


def _progress(lines: list[dict[str, Any]], config: dict[str, Any]) -> str:
    total = config.get("run", {}).get("num_iterations")
    names = {name for line in lines for name in line if name.startswith("time/") and name.endswith("_s")}
    seconds = sum(number(line.get(name)) or 0.0 for line in lines for name in names)
    done = len(lines)
    text = f"{done} of {total} iterations" if total else f"{done} iterations"
    text += f" in {seconds / 60:.1f} minutes, evaluations aside." if names else "."
    return text + (" The run is not finished." if total and done < total else "")


def _alarms(lines: list[dict[str, Any]], config: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each alarm that has been watched: newest and highest value, threshold, when it first rang."""
    rows = []
    for name, alarm in ALARMS.items():
        seen = [(line["iteration"] + 1, value) for line in lines if (value := number(line.get(name))) is not None]
        limit = number(config.get("alarms", {}).get(alarm.threshold))
        if seen and limit is not None:
            first = next((iteration for iteration, value in seen if value > limit), None)
            rows.append(
                {
                    "title": alarm.title, "meaning": alarm.meaning, "value": f"{seen[-1][1]:.3f}",
                    "highest": f"{max(value for _, value in seen):.3f}", "limit": f"{limit:g}",
                    "is_raised": first is not None, "first": f"since iteration {first}" if first else "quiet",
                }
            )  # fmt: skip
    return rows


def _tiles(before: dict[str, Any], after: dict[str, Any], comparison: dict[str, Any]) -> list[dict[str, str]]:
    """The figures to see first: O at the last turn."""
    tiles = []
    for name, report in (("before", before), ("after", after)):
        turn = _last_turn(report)
        if turn:
            tiles.append({"value": f"{figure(turn.get('O'))} %", "label": f"O at turn {turn.get('turn')}, {name}"})
    turn = _last_turn(comparison)
    if turn:
        cell = gain_cell(turn, "O")
        label = f"gain in O at turn {turn.get('turn')}" + (f", {cell['interval']}" if cell["interval"] else "")
        tiles.append({"value": cell["value"], "label": label, "css": cell["css"]})
    return [{"css": "", **tile} for tile in tiles]


def _last_turn(report: dict[str, Any]) -> dict[str, Any]:
    return max(report.get("turns") or [{}], key=lambda turn: turn.get("turn", 0))


def _table(before: dict[str, Any], after: dict[str, Any], comparison: dict[str, Any]) -> list[dict[str, Any]]:
    by_turn = [{turn["turn"]: turn for turn in report.get("turns", [])} for report in (before, after, comparison)]
    turns = sorted({number for report in by_turn[:2] for number in report})
    rows = []
    for metric in METRICS:
        for place, turn in enumerate(turns):
            old, new, gain = (report.get(turn, {}) for report in by_turn)
            cells = [value_cell(old, metric), value_cell(new, metric), gain_cell(gain, metric)]
            rows.append({"metric": metric, "turn": turn, "is_first": place == 0, "cells": cells})
    return rows


def _chart(spec: ChartSpec, lines: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Geometry of a chart, or None where no key has a value yet."""
    names = {name: match[1] for line in lines for name in line if (match := re.fullmatch(spec.keys, name))}
    curves = [
        Curve(
            name=label.replace("_", " "),
            points=[(int(line["iteration"]), number(line[name])) for line in lines if name in line],
        )
        for name, label in names.items()
    ]
    curves = [curve for curve in curves if any(y is not None for _, y in curve.points)]
    return chart(spec.title, spec.note, curves, x_name="iteration") if curves else None


def _strips(folder: Path) -> list[dict[str, str]]:
    """The first and the last strip."""
    paths = sorted((folder / "strips").glob("iteration-*.png"))
    strips = []
    for path in dict.fromkeys([*paths[:1], *paths[-1:]]):
        number = int(path.stem.removeprefix("iteration-"))
        title = "Before training" if number == 0 else f"After iteration {number}"
        strips.append({"title": title, "uri": data_uri(path.read_bytes())})
    return strips


def _lora_line(folder: Path, config: dict[str, Any]) -> str:
    """The line that uses the exported adapter, once it is there."""
    found = sorted(path for path in folder.rglob("pytorch_lora_weights.safetensors") if "checkpoints" not in path.parts)
    if not found:
        return ""
    pipeline = config.get("model", {}).get("path", "the pipeline's folder")
    if pipeline == EMBEDDED:
        pipeline = str(EMBEDDED_FOLDER)
    where = found[0].parent.resolve()
    return f'pipe = FluxKontextPipeline.from_pretrained("{pipeline}")\npipe.load_lora_weights("{where}")'
