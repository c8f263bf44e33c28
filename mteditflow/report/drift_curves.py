"""Against the turn: how far pictures drift, and success on the editor's own output beside success on true inputs.

Read from what evaluations write, a dict of figures for each editor, or for the same one before and after training.
"""

from collections.abc import Mapping
from typing import Any

from mteditflow.record.drift import KINDS
from mteditflow.record.figures import MINUS, finite, interval_of, turns_of
from mteditflow.report.charts import Curve, chart

MEANINGS = {
    "cast": "Warm or cold: half of what red gains over blue, in units of half a pixel's range.",
    "tint": "Green or magenta: what green gains over red and blue.",
    "contrast": "Harder or faded, as a share of the source's.",
    "saturation": "More colourful or paler, as a share of the source's.",
    "sharpness": "Sharper or blurred: fine detail against the source's.",
    "grain": "Fine detail that the source does not have, as the noise that has so much.",
}
SIGNED = tuple(kind for kind in KINDS if kind != "grain")  # in which of two directions
INPUTS = {
    "drawn": "the true picture, as if all instructions before had been carried out",
    "source": "the source itself, as a first turn, since nobody has the picture that it should be",
}

Reports = Mapping[str, Mapping[str, Any]]
"""By name: what evaluation_*.json or metrics.json holds; {} where it is not there yet."""


def drift_charts(reports: Reports) -> list[dict[str, Any]]:
    """Lay out the mean size of every kind of drift by turn, a curve for each report that has it."""
    found = (
        chart(kind.capitalize(), MEANINGS[kind], [_curve(name, r, f"{kind}_size") for name, r in reports.items()],
              x_name="turn", x_first=1)
        for kind in KINDS
    )  # fmt: skip
    return [one for one in found if one]


def exposure_charts(reports: Reports) -> list[dict[str, Any]]:
    """Lay out success by turn on the editor's own output and on true inputs, of each report that has both."""
    charts = []
    for name, report in reports.items():
        if report.get("true_inputs"):
            note = f"Turn k of a session; on a true input, turn k alone, on {INPUTS[report['true_inputs']]}."
            curves = [_curve("own output", report, "MT"), _curve("true input", report, "MT_true")]
            charts.append(chart(f"Success, {name}", note, curves, x_name="turn", x_first=1))
    return [one for one in charts if one]


def drift_rows(reports: Reports, change: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Make a row for each kind of drift at the last turn: of each report that has it the mean, with its sign, and the
    mean size, and the change of the size; empty where no report has any.
    """
    last = {name: turns[-1] for name, report in reports.items() if (turns := report.get("turns"))}
    changed = turns_of(change)[-1] if change.get("turns") else {}
    rows = []
    for kind in KINDS:
        cells = {
            name: (_number(turn.get(kind), has_sign=kind in SIGNED), _number(turn[f"{kind}_size"]))
            for name, turn in last.items()
            if f"{kind}_size" in turn
        }
        interval = interval_of(changed, f"{kind}_size_change")
        css = "" if not interval or interval[0] <= 0 <= interval[1] else "bad" if interval[0] > 0 else "good"
        text = f"[{', '.join(_number(end, has_sign=True) for end in interval)}]" if interval else ""
        size = {"value": _number(changed.get(f"{kind}_size_change"), has_sign=True), "interval": text, "css": css}
        rows += [{"kind": kind, "cells": cells, "change": size}] if cells else []
    return rows


def drift_note(reports: Reports) -> str:
    """Say of which pixels drift is measured, in the first report that has any."""
    report = next((report for report in reports.values() if report), {})
    num, num_whole = report.get("num_sessions", 0) + report.get("num_invalid", 0), report.get("num_whole_pictures", 0)
    if not num_whole:
        return "Of the pixels that no instruction so far has touched, against the source."
    which = "all sessions" if num_whole == num else f"{num_whole} of {num} sessions"
    return (
        f"Against the source. The data of {which} do not say what no instruction touches (objects with boxes, "
        "docs/data.md): there it is of the whole picture, as long as the background is not changed, without the "
        "quarter of it that fits worst, so that large edits are part of it."
    )


def _curve(name: str, report: Mapping[str, Any], figure: str) -> Curve:
    """Draw a figure of the report's turns, with its interval."""
    turns = [turn for turn in turns_of(report) if figure in turn]
    band = tuple((turn["turn"], ends[0], ends[1]) for turn in turns if (ends := interval_of(turn, figure)))
    return Curve(name=name, points=[(turn["turn"], turn[figure]) for turn in turns], band=band)


def _number(value: Any, *, has_sign: bool = False) -> str:
    """Write a drift with three decimals; a dash where it is not known."""
    known = finite(value)
    if known is None:
        return "\N{EN DASH}"
    return f"{round(known, 3) + 0.0:{'+' if has_sign else ''}.3f}".replace("-", MINUS)
