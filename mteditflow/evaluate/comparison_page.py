"""Figures of several editors on the same sessions: one self-contained HTML page, and one table on the terminal.

Read from what evaluations write: a dict of figures for each editor, and paired gains over the first.
"""

from pathlib import Path
from typing import Any

from PIL import Image
from rich.table import Table

from mteditflow.config.settings import MIN_SESSIONS
from mteditflow.pictures import png_bytes
from mteditflow.record.figures import RESULTS, SHOWN, align_turns, figure, interval_of, read_figures, turns_of
from mteditflow.record.templates import write_page
from mteditflow.report.charts import Curve, chart, data_uri, edit_types
from mteditflow.report.drift_curves import drift_charts, drift_note, exposure_charts

TITLES = {
    "O": ("O by turn", "√(IF · CC)."),
    "MT": ("Success by turn (MT)", "The turn's instruction is carried out."),
    "IF": ("All instructions so far (IF)", "No turn up to this one has failed."),
    "CC": ("Consistency (CC)", "What no instruction touched is as in the source image."),
}

Reports = dict[str, dict[str, Any]]
"""By editor: what metrics.json, or evaluation_*.json, holds; or gains, what `compare` returns."""


def write_comparison(folder: Path, reports: Reports, gains: Reports, strips: list[Image.Image]) -> Path:
    """Write `folder/comparison.html`. `gains` over the first editor, by editor; `strips` a picture per session."""
    names = list(reports)
    reports, gains = ({name: it | {"turns": turns_of(it)} for name, it in part.items()} for part in (reports, gains))
    values = {
        "title": f"MT-EditFlow: {' against '.join(names)}" if len(names) == 2 else "MT-EditFlow: comparison of editors",
        "reports": reports,
        "gains": gains,
        "first": reports[names[0]],
        "lead": "O" if reports[names[0]]["turns"][-1]["O"] is not None else "IF",  # without consistency there is no O
        "colors": {name: place for place, name in enumerate(names)},
        "notes": {metric: _note(metric, reports[names[0]]) for metric in TITLES},
        "charts": list(filter(None, (_chart(metric, reports) for metric in TITLES))),
        "drift": drift_charts(reports),
        "drift_note": drift_note(reports),
        "exposure": exposure_charts(reports),
        "edit_types": edit_types(reports),
        "strips": [data_uri(png_bytes(picture, is_small=True)) for picture in strips],
    }
    return write_page("evaluate/comparison.html.jinja", values, folder / "comparison.html")


def _chart(metric: str, reports: Reports) -> dict[str, Any] | None:
    """Lay out the metric of all editors against the turn; None where it is nowhere defined."""
    curves = [
        Curve(
            name=name,
            points=[(turn["turn"], turn[metric]) for turn in report["turns"]],
            band=tuple(
                (turn["turn"], ends[0], ends[1]) for turn in report["turns"] if (ends := interval_of(turn, metric))
            ),
        )
        for name, report in reports.items()
    ]
    return chart(TITLES[metric][0], _note(metric, next(iter(reports.values()))), curves, x_name="turn", x_first=1)


def _note(metric: str, report: dict[str, Any]) -> str:
    """Say what the metric is, and of how few sessions, where some have no consistency at the last turn."""
    note, num, turn = TITLES[metric][1], report["num_sessions"], report["turns"][-1]
    if metric in ("CC", "O") and turn["CC_sessions"] < num:
        note += f" At turn {turn['turn']} something untouched is left in {turn['CC_sessions']} of {num} sessions."
    return note


def terminal_table(reports: Reports, gains: Reports) -> Table:
    """Make a table of the metrics of every editor, and its gains over the first, at turns 1, 2, 3 and the last; below
    it what compounds, where that was evaluated.
    """
    first = next(iter(reports))
    turns, gained = ({name: turns_of(it) for name, it in part.items()} for part in (reports, gains))
    num_turns = len(reports[first]["turns"])
    num = reports[first]["num_sessions"]
    interval = " [95 % interval]" if num >= MIN_SESSIONS else ", too few for an interval"
    title = f"{num} held-out sessions, percent{interval}"
    table = Table(title=title + (f", gain over {first}" if gains else ""))
    table.add_column("turn", justify="right")
    table.add_column("", overflow="fold")
    for metric in SHOWN:
        table.add_column(metric, justify="right")
    for n in sorted({*range(min(3, num_turns)), num_turns - 1}):
        for name in reports:
            cells = (str(figure(turns[name][n], metric)) for metric in SHOWN)
            table.add_row(str(n + 1) if name == first else "", name, *cells)
            if name in gains:
                table.add_row("", "gain", *(str(figure(gained[name][n], f"{metric}_gain")) for metric in SHOWN))
        table.add_section()
    lasts = {name: turns[name][-1] for name, report in reports.items() if report.get("true_inputs")}
    table.caption = "\n".join(
        f"{name}, turn {num_turns}: {figure(last, 'MT_true').value} % on true inputs, "
        f"{figure(last, 'compounding')} points more than on its own output"
        for name, last in lasts.items()
    )
    return table


def held_out_rows(folder: Path) -> list[dict[str, Any]]:
    """List the figures of a finished run as rows of a table on a board."""
    turns = align_turns(*(read_figures(folder / f"{name}.json") for name in RESULTS))
    return [
        {"metric": metric, "turn": number, "before": str(figure(before, metric)), "after": str(figure(after, metric)),
         "gain": str(figure(gain, f"{metric}_gain"))}
        for metric in SHOWN for number, before, after, gain in turns
    ]  # fmt: skip


def final_table(folder: Path) -> Table:
    """Make a table of a finished run: before, after and paired gain, from the files in its folder."""
    reports = {name: read_figures(folder / f"evaluation_{name}.json") for name in ("before", "after")}
    return terminal_table(reports, {"after": read_figures(folder / "comparison.json")})
