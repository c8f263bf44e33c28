"""How figures of held-out sessions are named and written: EdiVal's metrics, numbers with their 95 % intervals.

The figures of a turn are a dict, as evaluation_*.json has it, `{"turn": 1, "O": 54.9, "O_interval": [52.1, 57.8]}`, or
comparison.json, `{"turn": 1, "O_gain": 6.2, "O_gain_interval": [3.5, 9.0]}`; None where undefined.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mteditflow.config.settings import MIN_SESSIONS

METRICS = {
    "MT": "success of each turn",
    "IF": "success of all turns so far",
    "CC": "consistency of what no instruction touched",
    "O": "square root of IF x CC",
}
"""Names and meanings, in the order of every array."""
SHOWN = ("O", "IF", "CC", "MT")
"""The order of every table: what decides, what it is made of, and the rest."""
RESULTS = {"evaluation_before": "before training", "evaluation_after": "after training", "comparison": "paired gain"}
"""The JSON files in a run's folder that hold figures, and what of."""
MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A number as pages show it; `css` is 'good' or 'bad' for a gain whose interval is clear of 0, else empty."""

    value: str
    interval: str = ""
    css: str = ""

    def __str__(self) -> str:
        return f"{self.value} {self.interval}".rstrip()


def turns_of(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """List the turns of a report, each with the number of its sessions, by which `figure` gives an interval or none."""
    return [{"num_sessions": report.get("num_sessions", MIN_SESSIONS)} | turn for turn in report.get("turns", [])]


def align_turns(*reports: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """Put the turns of reports side by side: number of the turn, then what each report has of it, maybe nothing."""
    by_turn = [{turn["turn"]: turn for turn in turns_of(report)} for report in reports]
    return [(number, *(turns.get(number, {}) for turns in by_turn)) for number in sorted(set().union(*by_turn))]


def figure(turn: Mapping[str, Any], name: str) -> Figure:
    """Read the figure `name` of a turn, such as O or O_gain, which has a sign; a dash where it is not there, and no
    interval where it is of few sessions.
    """
    is_gain, interval, css = name.endswith("_gain"), interval_of(turn, name), ""
    if is_gain and interval and not interval[0] <= 0 <= interval[1]:
        css = "good" if interval[0] > 0 else "bad"
    text = format_interval(interval, has_sign=is_gain) if interval else ""
    return Figure(value=format_number(turn.get(name), has_sign=is_gain), interval=text, css=css)


def interval_of(turn: Mapping[str, Any], name: str) -> Sequence[float] | None:
    """Read the interval of a figure; None where there is none, or fewer than MIN_SESSIONS sessions have the figure."""
    num = turn.get("num_sessions", MIN_SESSIONS)
    if name in ("CC", "O"):
        num = min(num, turn.get("CC_sessions", num))
    return turn.get(f"{name}_interval") if num >= MIN_SESSIONS else None


def fixed(value: float, digits: int) -> str:
    """Write a number with so many decimals, without a sign where they are all 0."""
    return f"{value:z.{digits}f}"


def format_number(value: Any, *, has_sign: bool = False) -> str:
    """Write a number with one decimal; a dash for what is no finite number."""
    known = finite(value)
    if known is None:
        return "\N{EN DASH}"
    rounded = round(known, 1) + 0.0  # no -0.0
    return f"{rounded:{'+' if has_sign else ''}.1f}".replace("-", MINUS)


def format_interval(ends: Sequence[float], *, has_sign: bool = False) -> str:
    """Write an interval: [52.1, 57.8]."""
    return f"[{', '.join(format_number(end, has_sign=has_sign) for end in ends)}]"


def finite(value: Any) -> float | None:
    """Take a finite number as it is, anything else as None."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None
