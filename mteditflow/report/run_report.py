"""One self-contained HTML page of a run, also of one that is still at work or was killed.

    python -m mteditflow.report runs/mini

What the run has not written yet is named on the page as not there yet.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mteditflow.config import EMBEDDED, Config
from mteditflow.config.cli import from_yaml
from mteditflow.config.reward import TAKEN
from mteditflow.export.card import read_usage
from mteditflow.record.alarms import ALARMS, HELD_OUT_GAP, held_out_figures
from mteditflow.record.figures import METRICS, RESULTS, SHOWN, align_turns, finite, read_figures
from mteditflow.record.files import shaped
from mteditflow.record.metrics import FILE, read_lines
from mteditflow.record.templates import write_page
from mteditflow.report.account import account
from mteditflow.report.charts import MAX_TURNS, Curve, chart, data_uri, edit_types
from mteditflow.report.drift_curves import drift_charts, drift_note, drift_rows, exposure_charts
from mteditflow.report.seen import read_compared, read_seen
from mteditflow.watch.pace import CORE_WAIT, say_sharing, seconds_left, step_seconds
from mteditflow.watch.progress import duration

Lines = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class ChartSpec:
    """What a chart shows: the figures of metrics.jsonl whose keys match `keys`, whose group names the curve."""

    title: str
    note: str
    keys: str
    is_optional: bool = False  # not every objective, or choice of rewards, has these figures


SUCCESS = "heldout/success_"  # and the type of edit: percent
MAX_TYPES = 24  # of edits that have a chart: the most frequent
HELD_OUT = ChartSpec(
    title="Held-out O by turn", note="Percent, short evaluations of the average.", keys=r"heldout/O_(\d+)"
)
REWARD = ChartSpec(
    title="Reward", note="Mean over the iteration's trajectories, and their spread.", keys=r"reward/(mean|std)"
)
CHARTS = (
    REWARD,
    ChartSpec(title="Instruction score by turn", note="From 0, ignored, to 1, done.", keys=r"reward/turn_(\d+)"),
    ChartSpec(title="Success by turn", note="Share of edits that the verdict accepts.", keys=r"reward/success_(\d+)"),
    ChartSpec(
        title="Consistency",
        note="What no instruction touched, against the source.",
        keys=r"reward/(consistency)",
        is_optional=True,
    ),
    ChartSpec(
        title="Further rewards",
        note="Mean over trajectories and turns, of the entries of reward.also.",
        keys=rf"reward/(?!(?:{TAKEN.pattern})$)(\w+)",
        is_optional=True,
    ),
    ChartSpec(
        title="Drift that training adds",
        note="Mean size at the last turn, of the last iterations less that of the first; below 0 it is mended.",
        keys=r"alarm/(\w+)_drift",
    ),
    ChartSpec(
        title="No edit, over-edit",
        note="Share of turns that return their input; share with low consistency.",
        keys=r"alarm/(no_edit|over_edit)_share",
    ),
    HELD_OUT,
    ChartSpec(
        title="Groups without spread",
        note="Share of groups that teach nothing: their scores are all alike.",
        keys=r"reward/(zero_spread_share)",
    ),
    ChartSpec(
        title="Ratio error",
        note="Largest |ratio - 1|: of all updates, and before the first, where it must be 0.",
        keys=r"update/(ratio_error|first_ratio_error)",
        is_optional=True,
    ),
    ChartSpec(
        title="Clip fraction",
        note="Share of transitions whose ratio left the clip range.",
        keys=r"update/(clip_fraction)",
        is_optional=True,
    ),
    ChartSpec(title="Gradient norm", note="Before it is cut to max_grad_norm.", keys=r"update/(grad_norm)"),
    ChartSpec(
        title="Turn-images per second",
        note="Per GPU: of the whole step, of the rollout alone.",
        keys=r"speed/(turn|rollout)_images_per_second",
    ),
    ChartSpec(
        title="Model TFLOP/s",
        note="What the model needs, by the seconds that it took; the ceiling is a large matrix product.",
        keys=r"speed/(denoise|training|ceiling)_tflop_per_second",
    ),
    ChartSpec(title="Power", note="Of the first GPU, in watts.", keys=r"gpu/(power)_w", is_optional=True),
)


def write_report(folder: Path) -> Path:
    """Write `folder/report.html` from what the run has written so far. ValueError where there are no metrics."""
    if not (folder / FILE).is_file():
        raise ValueError(f"{folder} is not the folder of a run: it has no {FILE}; give the run.folder of a training")
    return write_page("report/report.html.jinja", report_contents(folder), folder / "report.html")


def report_contents(folder: Path) -> dict[str, Any]:
    """Gather the template's variables."""
    lines = read_lines(folder / FILE)
    config, problem = read_config(folder / "config.yaml")
    charts = {spec: lay_out(spec, lines) for spec in CHARTS}
    before, after, gain = reports = [read_figures(folder / f"{name}.json") for name in RESULTS]
    best = best_iteration(lines) if after else None
    with shaped(folder / "judge"):
        judged, compared = read_seen(folder, best), read_compared(folder)
    with shaped(folder / "strips"):
        strips = read_strips(folder, best)
    newest, base = after or before, config.model.path if config else ""
    both = {"before": before, "after": after}
    return {
        "title": f"MT-EditFlow: {config.run.folder if config else folder.resolve().name}",
        "config": config,
        "config_problem": problem,
        "config_text": (folder / "config.yaml").read_text(errors="replace")
        if (folder / "config.yaml").is_file()
        else "",
        "progress": progress(lines, config),
        "metrics": SHOWN,
        "meanings": METRICS,
        "turns": align_turns(before, after, gain),
        "num_sessions": newest.get("num_sessions"),
        "num_invalid": newest.get("num_invalid"),
        "missing": [words for words, report in zip(RESULTS.values(), reports, strict=True) if not report],
        "charts": [chart for chart in charts.values() if chart],
        "no_charts": [spec.title for spec in CHARTS if not charts[spec] and _is_due(spec, config)],
        "drift": {
            "charts": drift_charts(both),
            "rows": drift_rows(both, gain),
            "names": [n for n, r in both.items() if r],
            "note": drift_note(both),
            "exposure": exposure_charts(both),
            "turn": len(newest.get("turns", [])),
        },
        "account": account(lines),
        "alarms": alarm_rows([*lines, *_at_end(lines, after)], config) if config else [],
        "strips": strips,
        "compared": compared,
        "judged": judged,
        "is_judged": config is None or config.run.num_judged > 0,
        "has_truth": any(session["truth"] for part in judged for session in part["sessions"]),
        "edit_types": edit_types(both),
        "type_charts": _type_charts(lines, before, after),
        "code": next(filter(None, (read_usage(out, base) for out in _exports(folder))), ""),
    }


def read_config(path: Path) -> tuple[Config | None, str]:
    """Read the run's config; None where it cannot be had, and why."""
    if not path.is_file():
        return None, "config.yaml is missing"
    try:
        return from_yaml(path), ""
    except ValueError as error:  # of another version of the program: the page says so and shows the rest
        return None, str(error)


def best_iteration(lines: Lines) -> int | None:
    """Read after how many iterations the average was best; None where the run keeps none (run.patience)."""
    found = [value for line in lines if (value := finite(line.get("heldout/best_iteration")))]
    return int(found[-1]) if found else None


def is_stopped(lines: Lines, config: Config | None) -> bool:
    """Whether held-out O has ended the training before its last iteration."""
    stalled = [value for line in lines if (value := finite(line.get("heldout/num_stalled"))) is not None]
    return config is not None and bool(stalled) and stalled[-1] >= config.run.patience > 0


def progress(lines: Lines, config: Config | None) -> str:
    """Say how far the run is, how long it took and takes, and which average is the best where that was asked for."""
    seconds = sum(step_seconds(line) + (finite(line.get("time/save_s")) or 0.0) for line in lines)
    total, is_early = config.run.num_iterations if config else None, is_stopped(lines, config)
    text = f"{len(lines)} of {total} iterations" if total else f"{len(lines)} iterations"
    text = f"Training stopped after {text}" if is_early and total and len(lines) < total else text
    waited = [value for line in lines if (value := finite(line.get(CORE_WAIT))) is not None]
    sharing = say_sharing(sum(waited) / len(waited)) if waited else ""
    aside = f"evaluations aside ({sharing})" if sharing else "evaluations aside"
    text += f" in {seconds / 60:.1f} minutes, {aside}." if seconds else "."
    if total and len(lines) < total and not is_early:
        left = seconds_left(lines, total, config)
        text += " The run is not finished" + (f": about {duration(left)} are left." if left else ".")
    if best := best_iteration(lines):
        text += f" Of the short evaluations, the average after iteration {best} had the highest O."
    return text


def _is_due(spec: ChartSpec, config: Config | None) -> bool:
    """Whether every run by this config has the chart's figures, sooner or later."""
    if spec is HELD_OUT and config:
        return 0 < config.evaluation.every < config.run.num_iterations
    return not spec.is_optional


def lay_out(spec: ChartSpec, lines: Lines) -> dict[str, Any] | None:
    """Lay out a chart; None where no key has a value yet. Of many turns the first, the middle and the last."""
    names = {name: match[1] for line in lines for name in line if (match := re.fullmatch(spec.keys, name))}
    curves = [
        Curve(
            name=f"turn {label}" if label.isdigit() else label.replace("_", " "),
            points=[(int(line["iteration"]), finite(line[name])) for line in lines if name in line],
        )
        for name, label in names.items()
    ]
    if len(curves) > MAX_TURNS and all(label.isdigit() for label in names.values()):
        curves = [curves[0], curves[(len(curves) - 1) // 2], curves[-1]]
    return chart(spec.title, spec.note, curves, x_name="iteration")


def _type_charts(lines: Lines, before: dict[str, Any], after: dict[str, Any]) -> list[dict[str, Any]]:
    """Lay out a chart for each type of edit: success against iterations done, those of the whole evaluations too."""
    ends = ((0, before), (best_iteration(lines) or len(lines), after))
    points: dict[str, dict[int, float | None]] = {}
    for line in lines:
        for name, value in line.items():
            if name.startswith(SUCCESS):
                points.setdefault(name.removeprefix(SUCCESS), {})[int(line["iteration"]) + 1] = finite(value)
    for done, report in ends:
        for kind, of in report.get("edit_types", {}).items():
            points.setdefault(kind, {})[done] = 100 * of["success"]
    counts = {kind: of["count"] for kind, of in before.get("edit_types", {}).items()}
    common = sorted(points, key=lambda kind: (-counts.get(kind, 0), kind))[:MAX_TYPES]
    charts = []
    for kind in sorted(common):
        note = f"Percent of {counts[kind]} edits before and after." if kind in counts else "Percent."
        curve = Curve(name=kind, points=sorted(points[kind].items()))
        charts.append(chart(kind.replace("_", " "), note, [curve], x_name="iterations done"))
    return [item for item in charts if item] if any(len(by_done) > 2 for by_done in points.values()) else []


def alarm_rows(lines: Lines, config: Config | None) -> list[dict[str, Any]]:
    """Make a row for each alarm that has been watched: last and highest value, threshold, when it first rang. A user's
    data have no truth, so no judge is held against it.
    """
    rows, has_truth = [], config is None or config.data.path == EMBEDDED
    for name, alarm in ALARMS.items():
        if name == HELD_OUT_GAP and not has_truth:
            continue
        values = {line["iteration"] + 1: value for line in lines if (value := finite(line.get(name))) is not None}
        if values:
            first = next((iteration for iteration, value in values.items() if value > alarm.threshold), None)
            last, highest = list(values.values())[-1], max(values.values())
            what = {"title": alarm.title, "meaning": alarm.meaning}
            rows.append(what | {"last": last, "highest": highest, "limit": alarm.threshold, "first": first})
    return rows


def _at_end(lines: Lines, after: dict[str, Any]) -> Lines:
    """Hold the last iterations of the average that was evaluated against the evaluation after training, as a line of
    its own; none before that.
    """
    by_truth = {f"heldout/MT_{row['turn']}": row.get("MT") for row in after.get("turns", [])}
    gap = held_out_figures(lines[: best_iteration(lines)], by_truth)
    return [{"iteration": lines[-1]["iteration"], **gap}] if gap else []


def read_strips(folder: Path, best: int | None) -> dict[str, str]:
    """Read the first and the last strip, by what it shows; that of the best average where it is known."""
    paths = {int(path.stem.removeprefix("iteration-")): path for path in (folder / "strips").glob("iteration-*.png")}
    ends = dict.fromkeys([min(paths), best if best in paths else max(paths)]) if paths else {}
    found = {number: paths[number] for number in ends if number is not None}
    return {
        f"After iteration {number}" if number else "Before training": data_uri(path.read_bytes())
        for number, path in found.items()
    }


def _exports(folder: Path) -> list[Path]:
    """List where a run's weights may have been exported to: at its end, or on request."""
    return [folder / "lora", folder / "weights", *sorted((folder / "export").glob("*"))]
