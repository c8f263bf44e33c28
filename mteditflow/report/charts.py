"""Charts of the HTML pages: the geometry of inline SVG, which the macro `chart` of macros.html.jinja draws.

A page is one file that needs nothing else: images are data URIs, there is no script and nothing is fetched.
"""

import base64
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from PIL import Image

from mteditflow.record.figures import MINUS

MAX_TURNS = 6  # curves of one chart that differ by the turn alone
HEAVY = 1_000_000  # bytes of a PNG
HOVER_POINTS = 120  # points of a curve that answer the mouse; more only make the page heavy
WIDTH, HEIGHT = 420, 236
LEFT, RIGHT, TOP, BOTTOM = 54, 408, 10, 196
MAX_TICKS = 12  # along a chart: fewer places than that each get one

Place = Callable[[float, float], tuple[float, float]]
"""From a point of a curve to its pixels."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Points (x, y), a gap where y is None; `band` has (x, low, high) of intervals."""

    name: str
    points: list[tuple[float, float | None]]
    band: tuple[tuple[float, float, float], ...] = ()


def chart(title: str, note: str, curves: list[Curve], *, x_name: str, x_first: int = 0) -> dict[str, Any] | None:
    """Lay out the curves that have a value, for the macro `chart`; None where there are none."""
    curves = [curve for curve in curves if any(y is not None for _, y in curve.points)]
    if not curves:
        return None
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
        "title": title, "note": note, "x_name": x_name,
        "width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT, "bottom": BOTTOM,
        "x_ticks": [{"at": place(x, y_low)[0], "label": f"{x:g}"} for x in x_ticks],
        "y_ticks": [{"at": place(x_first, y)[1], "label": f"{y:z.10g}".replace("-", MINUS)} for y in y_ticks],
        "curves": [_lay_out(curve, x_name, place) for curve in curves],
    }  # fmt: skip


def _lay_out(curve: Curve, x_name: str, place: Place) -> dict[str, Any]:
    """Lay out a path with gaps where a value is missing, the outline of its band, and points that say their value."""
    path, is_drawing = [], False
    for x, y in curve.points:
        if y is not None:
            path.append("{}{} {}".format("L" if is_drawing else "M", *place(x, y)))
        is_drawing = y is not None
    known = [(x, y) for x, y in curve.points if y is not None]
    intervals = {x: f" ({low:z.4g} to {high:z.4g})" for x, low, high in curve.band}
    points = [
        (*place(x, y), f"{curve.name}, {x_name} {x:g}: {y:z.4g}{intervals.get(x, '')}")
        for x, y in known[:: max(1, math.ceil(len(known) / HOVER_POINTS))]
    ]
    outline = [place(x, low) for x, low, _ in curve.band] + [place(x, high) for x, _, high in reversed(curve.band)]
    return {
        "name": curve.name,
        "path": " ".join(path),
        "band": " ".join(f"{x},{y}" for x, y in outline),
        "has_dots": len(known) <= MAX_TICKS,
        "points": [{"x": x, "y": y, "title": title} for x, y, title in points],
    }


def ticks(low: float, high: float, is_integer: bool = False) -> list[float]:
    """Choose a few round numbers that enclose [low, high]; integers stay inside."""
    if low == high == 0:  # such as percent, of which there is none below
        high = 1.0
    elif high <= low:
        low, high = (low, low + 1) if is_integer else (low - (abs(low) or 1) * 0.1, low + (abs(low) or 1) * 0.1)
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    step = max(step, 1.0) if is_integer else step
    first = math.floor(low / step + 1e-9)
    last = math.floor(high / step + 1e-9) if is_integer else max(math.ceil(high / step - 1e-9), first + 1)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


def edit_types(reports: dict[str, dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Gather success and count of each type of edit, by the name of the report, for the macro `bars`."""
    kinds = sorted({kind for report in reports.values() for kind in report.get("edit_types", {})})
    return {
        kind: {name: types[kind] for name, report in reports.items() if kind in (types := report.get("edit_types", {}))}
        for kind in kinds
    }


def data_uri(png: bytes) -> str:
    """Make a picture stand in the page itself; a heavy one, which is of photographs, not to the bit."""
    if len(png) <= HEAVY:
        return f"data:image/png;base64,{base64.b64encode(png).decode()}"
    file = io.BytesIO()
    with Image.open(io.BytesIO(png)) as picture:
        picture.save(file, "WEBP", quality=88)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
