"""What the HTML pages share: geometry of charts, cells of tables, bars, pictures, and the way to a file.

A page is one file that needs nothing else: curves are inline SVG whose geometry is worked out here, images are data
URIs, there is no script and nothing is fetched. `page.html.jinja` has the macros that draw what these functions return.
"""

import base64
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

METRICS = ("MT", "IF", "CC", "O")
HOVER_POINTS = 120  # points of a curve that answer the mouse; more only make the page heavy
WIDTH, HEIGHT = 420, 236
LEFT, RIGHT, TOP, BOTTOM = 54, 408, 10, 196
MAX_TICKS = 12  # along a chart: fewer places than that each get one
MINUS = "\N{MINUS SIGN}"


Points = list[tuple[float, float | None]]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Points (x, y), a gap where y is None; `band` has (x, low, high) of intervals."""

    name: str
    points: Points
    band: tuple[tuple[float, float, float], ...] = ()


def write_page(template: str, values: dict[str, Any], path: Path) -> Path:
    """Fill in a template of this folder; the file appears whole or not at all."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent.parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(environment.get_template(template).render(values), encoding="utf-8")
    os.replace(temporary, path)
    return path


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty where there is no file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): delete it, or evaluate again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not a JSON object: delete it, or evaluate again")
    return value


def data_uri(png: bytes) -> str:
    """A picture that stands in the page itself."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def value_cell(turn: dict[str, Any], metric: str) -> dict[str, str]:
    """A metric of a turn with its interval."""
    interval = _interval(turn.get(f"{metric}_interval"))
    return {"value": figure(turn.get(metric)), "interval": interval, "css": ""}


def gain_cell(turn: dict[str, Any], metric: str) -> dict[str, str]:
    """Coloured only where the interval is clear of 0."""
    interval = turn.get(f"{metric}_gain_interval")
    css = ""
    if interval and (interval[0] > 0 or interval[1] < 0):
        css = "good" if interval[0] > 0 else "bad"
    return {
        "value": figure(turn.get(f"{metric}_gain"), sign=True),
        "interval": _interval(interval, sign=True),
        "css": css,
    }


def _interval(interval: Any, sign: bool = False) -> str:
    return f"{figure(interval[0], sign)} to {figure(interval[1], sign)}" if interval else ""


def figure(value: Any, sign: bool = False) -> str:
    """A number as the tables show it; a dash where there is none."""
    known = number(value)
    if known is None:
        return "\N{EN DASH}"
    return (f"{known:+.1f}" if sign else f"{known:.1f}").replace("-", MINUS)


def number(value: Any) -> float | None:
    """A finite number as it is, anything else as None."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None


def chart(title: str, note: str, curves: list[Curve], *, x_name: str, x_first: int = 0) -> dict[str, Any]:
    """Geometry of a chart of curves with at least one value, for the macro `chart`."""
    values = [y for curve in curves for _, y in curve.points if y is not None]
    values += [y for curve in curves for _, *ends in curve.band for y in ends]
    x_last = max(x for curve in curves for x, _ in curve.points)
    is_short = x_last - x_first < MAX_TICKS
    x_ticks = list(range(x_first, int(x_last) + 1)) if is_short else ticks(x_first, x_last, is_integer=True)
    begins_at_zero = min(values) >= 0 and max(values) > 2 * min(values)
    y_ticks = ticks(0.0 if begins_at_zero else min(values), max(values))
    x_high, y_low, y_high = max(x_ticks[-1], x_last), y_ticks[0], y_ticks[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (RIGHT - LEFT) * (x - x_first) / max(x_high - x_first, 1)
        return round(across, 1), round(BOTTOM - (BOTTOM - TOP) * (y - y_low) / (y_high - y_low), 1)

    return {
        "title": title,
        "note": note,
        "x_name": x_name,
        "width": WIDTH,
        "height": HEIGHT,
        "left": LEFT,
        "right": RIGHT,
        "bottom": BOTTOM,
        "x_ticks": [{"at": place(x, y_low)[0], "label": f"{x:g}"} for x in x_ticks],
        "y_ticks": [{"at": place(x_first, y)[1], "label": f"{y:.10g}".replace("-", MINUS)} for y in y_ticks],
        "curves": [_curve(curve, x_name, place) for curve in curves],
    }


def _curve(curve: Curve, x_name: str, place: Callable[[float, float], tuple[float, float]]) -> dict[str, Any]:
    """A path with gaps where a value is missing, the outline of its band, and the points that say their value."""
    path, is_drawing = [], False
    for x, y in curve.points:
        if y is not None:
            path.append("{}{} {}".format("L" if is_drawing else "M", *place(x, y)))
        is_drawing = y is not None
    known = [(x, y) for x, y in curve.points if y is not None]
    shown = known[:: max(1, math.ceil(len(known) / HOVER_POINTS))]
    said = {x: f" ({low:.4g} to {high:.4g})" for x, low, high in curve.band}
    dots = [(*place(x, y), f"{curve.name}, {x_name} {x:g}: {y:.4g}{said.get(x, '')}") for x, y in shown]
    outline = [place(x, low) for x, low, _ in curve.band] + [place(x, high) for x, _, high in reversed(curve.band)]
    return {
        "name": curve.name,
        "path": " ".join(path),
        "band": " ".join(f"{x},{y}" for x, y in outline),
        "has_dots": len(known) <= 12,
        "points": [{"x": x, "y": y, "title": title} for x, y, title in dots],
    }


def ticks(low: float, high: float, is_integer: bool = False) -> list[float]:
    """A few round numbers that enclose [low, high]; integers stay inside."""
    if high <= low:
        low, high = (low, low + 1) if is_integer else (low - (abs(low) or 1) * 0.1, low + (abs(low) or 1) * 0.1)
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    step = max(step, 1.0) if is_integer else step
    first = math.floor(low / step + 1e-9)
    last = math.floor(high / step + 1e-9) if is_integer else max(math.ceil(high / step - 1e-9), first + 1)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


def edit_type_bars(reports: dict[str, dict[str, Any]], colors: list[int]) -> list[dict[str, Any]]:
    """For each type of edit a bar per report of `summary`, by name."""
    types = {name: report.get("edit_types", {}) for name, report in reports.items()}
    kinds = []
    for kind in sorted({name for report in types.values() for name in report}):
        bars = []
        for (name, report), color in zip(types.items(), colors, strict=True):
            success = number(report.get(kind, {}).get("success"))
            if success is not None:
                percent = 100 * success
                title = f"{kind}, {name}: {percent:.1f} % of {report[kind].get('count', '?')}"
                bars.append({"percent": f"{percent:.1f}", "label": f"{percent:.1f} %", "title": title, "color": color})
        count = next((report[kind].get("count", "?") for report in types.values() if kind in report), "?")
        kinds.append({"name": kind.replace("_", " "), "count": count, "bars": bars})
    return kinds
