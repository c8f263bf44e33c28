"""The account of a run on its page: where the time of an iteration goes, and what the GPU made of it."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from mteditflow.record.figures import finite

Lines = list[dict[str, Any]]
RATES = {"denoise": "denoise", "forward_backward": "training"}
"""Phases that are matrix products, and how metrics.jsonl calls their speed."""


@dataclass(frozen=True, kw_only=True)
class Fact:
    """A figure of the whole run: of the values of its iterations, those that there are."""

    title: str
    key: str
    of: Callable[[list[float]], float] = median
    scale: float = 1.0


FACTS = (
    Fact(title="turn-images per second per GPU, the whole step", key="speed/turn_images_per_second"),
    Fact(title="turn-images per second per GPU, the rollout alone", key="speed/rollout_images_per_second"),
    Fact(title="ceiling: a large matrix product, TFLOP/s", key="speed/ceiling_tflop_per_second"),
    Fact(title="error of the base against bfloat16: velocity, %", key="base/velocity", scale=100),
    Fact(title="error of the base: log-prob, clip ranges", key="base/log_prob"),
    Fact(title="error of the base: the worst linear, %", key="base/linear", scale=100),
    Fact(title="largest channel over the median one, of a linear's input", key="base/outlier"),
    Fact(title="turn-images per kWh", key="gpu/turn_images_per_kwh"),
    Fact(title="energy of the first GPU, kWh", key="gpu/energy_kwh", of=sum),
    Fact(title="power, W", key="gpu/power_w"),
    Fact(title="clock of the multiprocessors, MHz", key="gpu/sm_clock_mhz"),
    Fact(title="clock of the memory, MHz", key="gpu/memory_clock_mhz"),
    Fact(title="highest temperature, °C", key="gpu/temperature_c", of=max),
    Fact(title="most memory in use on the GPU, GiB", key="gpu/memory_used_gib", of=max),
    Fact(
        title="clocks held down by the power limit, % of the time",
        key="gpu/throttled_by_power_share",
        of=fmean,
        scale=100,
    ),
    Fact(title="clocks held down by heat, % of the time", key="gpu/throttled_by_thermal_share", of=fmean, scale=100),
    Fact(title="clocks cut by the hardware, % of the time", key="gpu/throttled_by_hardware_share", of=fmean, scale=100),
)


def account(lines: Lines) -> dict[str, Any]:
    """The template's `phases`, which add up to an iteration's mean seconds, and `facts`; empty without times."""
    names = dict.fromkeys(match[1] for line in lines for name in line if (match := re.fullmatch(r"time/(\w+)_s", name)))
    seconds = {name: sum(_known(lines, f"time/{name}_s")) / len(lines) for name in names}
    total = sum(seconds.values())
    phases = [
        {
            "name": name.replace("_", " "),
            "seconds": value,
            "share": 100 * value / total if total else 0.0,
            "beside": sum(_known(lines, f"beside/{name}_s")) / len(lines),
            "rate": _median(lines, f"speed/{RATES.get(name)}_tflop_per_second"),
            "ceiling_share": _median(lines, f"speed/{RATES.get(name)}_ceiling_share"),
        }
        for name, value in seconds.items()
        if value
    ]
    facts = {fact.title: fact.of(values) * fact.scale for fact in FACTS if (values := _known(lines, fact.key))}
    return {"phases": phases, "total": total, "num_iterations": len(lines), "facts": facts}


def _known(lines: Lines, key: str) -> list[float]:
    return [value for line in lines if (value := finite(line.get(key))) is not None]


def _median(lines: Lines, key: str) -> float | None:
    values = _known(lines, key)
    return median(values) if values else None
