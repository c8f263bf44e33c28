"""One self-contained HTML page, and one table on the terminal, of several evaluations on the same sessions.

Read from what `evaluate` writes: a dict of figures per subject, and the paired gains of each over the first.
"""

import io
from pathlib import Path
from typing import Any

from PIL import Image
from rich.table import Table

from mteditflow.evaluate.edival import format_figure
from mteditflow.report.html import (
    METRICS,
    Curve,
    chart,
    data_uri,
    edit_type_bars,
    figure,
    gain_cell,
    value_cell,
    write_page,
)

CHARTS = {
    "O": ("O by turn", "√(IF · CC)."),
    "MT": ("Success by turn (MT)", "The turn's instruction is carried out: the exposure-bias curve."),
    "IF": ("All instructions so far (IF)", "No turn up to this one has failed."),
    "CC": ("Consistency (CC)", "What no instruction touched is as in the source image."),
}
NUM_COLORS = 6  # of page.html.jinja

Reports = dict[str, dict[str, Any]]
"""By subject: what metrics.json holds."""


def write_comparison(folder: Path, reports: Reports, gains: Reports, strips: list[Image.Image]) -> Path:
    """`folder/comparison.html`. `gains` over the first subject, by subject; `strips` a picture per session."""
    return write_page("evaluate/comparison.html.jinja", _contents(reports, gains, strips), folder / "comparison.html")


def _contents(reports: Reports, gains: Reports, strips: list[Image.Image]) -> dict[str, Any]:
    """The template's variables."""
    names = list(reports)
    first = reports[names[0]]
    colors = [place % NUM_COLORS for place in range(len(names))]
    is_invalid = any(report["num_invalid"] for report in reports.values())
    subjects = [
        {
            "name": name,
            "color": color,
            "what": report["what"],
            "commit": report["commit"],
            "num": report["num_sessions"],
        }
        | {"num_invalid": report["num_invalid"]}
        for (name, report), color in zip(reports.items(), colors, strict=True)
    ]
    return {
        "title": f"MT-EditFlow: {' against '.join(names)}" if len(names) == 2 else "MT-EditFlow: comparison of editors",
        "subjects": subjects,
        "settings": _settings(first),
        "is_invalid": is_invalid,
        "num_sessions": first["num_sessions"] + first["num_invalid"],
        "num_turns": len(first["turns"]),
        "tiles": _tiles(reports, gains, colors),
        "charts": [_chart(metric, reports) for metric in CHARTS],
        "tables": [
            {"metric": metric, "note": _note(metric, reports), "rows": _rows(metric, reports, gains)}
            for metric in CHARTS
        ],
        "edit_types": edit_type_bars(reports, colors),
        "colors": list(zip(names, colors, strict=True)),
        "strips": [_strip_uri(picture) for picture in strips],
    }


def _settings(report: dict[str, Any]) -> str:
    settings = report["settings"]
    size = f"{settings['model.width']} by {settings['model.height']} pixels"
    return (
        f"Editor {settings['model.path']} at {size}, {settings['evaluation.num_steps']} denoising steps of the ODE, "
        f"K = {settings['evaluation.num_turns']} turns, judged by {report['judge']}."
    )


def _tiles(reports: Reports, gains: Reports, colors: list[int]) -> list[dict[str, Any]]:
    """The figures to see first: O at the last turn."""
    tiles = []
    for (name, report), color in zip(reports.items(), colors, strict=True):
        turn = report["turns"][-1]
        gain = gain_cell(gains[name]["turns"][-1], "O") if name in gains else {}
        tiles.append({"value": f"{value_cell(turn, 'O')['value']} %", "label": name, "color": color, "gain": gain})
    return tiles


def _chart(metric: str, reports: Reports) -> dict[str, Any]:
    """The metric of all subjects against the turn."""
    curves = [
        Curve(
            name=name,
            points=[(turn["turn"], turn[metric]) for turn in report["turns"]],
            band=tuple((turn["turn"], *ends) for turn in report["turns"] if (ends := turn[f"{metric}_interval"])),
        )
        for name, report in reports.items()
    ]
    return chart(CHARTS[metric][0], _note(metric, reports), curves, x_name="turn", x_first=1)


def _note(metric: str, reports: Reports) -> str:
    """What the metric is, and of how few sessions, where some have no consistency at the last turn."""
    note, report = CHARTS[metric][1], next(iter(reports.values()))
    num, turn = report["num_sessions"], report["turns"][-1]
    if metric in ("CC", "O") and turn["CC_sessions"] < num:
        note += f" At turn {turn['turn']} something untouched is left in {turn['CC_sessions']} of {num} sessions."
    return note


def _rows(metric: str, reports: Reports, gains: Reports) -> list[dict[str, Any]]:
    """A row per turn: the value of each subject and, but for the first, its gain."""
    rows = []
    for place in range(len(next(iter(reports.values()))["turns"])):
        cells = []
        for name, report in reports.items():
            cells.append(value_cell(report["turns"][place], metric))
            if name in gains:
                cells.append(gain_cell(gains[name]["turns"][place], metric))
        rows.append({"turn": place + 1, "cells": cells})
    return rows


def _strip_uri(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "png", optimize=True)
    return data_uri(file.getvalue())


def terminal_table(reports: Reports, gains: Reports) -> Table:
    """The metrics of every subject, and its gain in O, at turns 1, 2, 3 and the last."""
    first = next(iter(reports))
    num_turns = len(reports[first]["turns"])
    table = Table(title=f"{reports[first]['num_sessions']} held-out sessions, percent [95 % interval]")
    table.add_column("turn", justify="right")
    table.add_column("subject", overflow="fold")
    for column in ("MT", "IF", "CC", "O", *([f"O over {first}"] if gains else [])):
        table.add_column(column, justify="right", no_wrap=column in METRICS)
    for turn in sorted({number for number in (1, 2, 3, num_turns) if number <= num_turns}):
        for place, (name, report) in enumerate(reports.items()):
            own, is_last = report["turns"][turn - 1], place == len(reports) - 1
            cells = [str(turn) if place == 0 else "", name, *(figure(own[metric]) for metric in ("MT", "IF", "CC"))]
            cells.append(format_figure(own["O"], own["O_interval"]))
            if name in gains:
                gain = gains[name]["turns"][turn - 1]
                cells.append(format_figure(gain["O_gain"], gain["O_gain_interval"], "+"))
            table.add_row(*cells, end_section=is_last)
    return table
