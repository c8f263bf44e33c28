"""The judge beside the rollout against the judge after each wave, turn about in one session: `mteditflow profile
--overlap`. Both train on every row as their groups' scores come in; what is hidden is what the two differ by.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mteditflow.config import Config
from mteditflow.profile.command import Case, alternate_signs, build_case
from mteditflow.reward import Judged, Rewards, build_reward
from mteditflow.reward.overlap import Overlap, can_be_green
from mteditflow.rollout import sample_waves
from mteditflow.update import update

NUM_ROUNDS = 3
COLUMNS = ("total_s", "judge_s", "exposed_s")


def run_once(case: Case, judge: Overlap) -> dict[str, float]:
    """An iteration: its seconds in all, those of the judge, and those that were waited for it."""
    optimizer = torch.optim.AdamW([weight for _, weight in case.policy.adapters.trainable], lr=1e-9)
    start = time.perf_counter()
    made = judge.gather(sample_waves(case.policy, case.objective, case.tasks, case.config, 0, case.ranks))
    judged = Judged(judge.scores(), case.config, case.ranks)

    def praised() -> Iterator[Tensor]:
        for advantages in judged:
            yield alternate_signs(*advantages.shape)

    update(case.policy, optimizer, case.objective, made, praised(), case.config, case.ranks)
    if case.policy.device.type == "cuda":
        torch.cuda.synchronize()
    read = judge.read()
    return {
        "total_s": time.perf_counter() - start,
        "judge_s": read["reward/judge_s"],
        "exposed_s": read["reward/exposed_s"],
    }


def compare(case: Case, build: Callable[[], Rewards], num_rounds: int = NUM_ROUNDS) -> dict[str, Any]:
    """Measure every choice of reward.overlap that the device has, after an iteration of each to warm up. `green` has
    rewards of its own, since a CUDA graph keeps the context in which it was captured.

    efficiency: (T_a + T_b - T_ab) / min(T_a, T_b), of an iteration without its judge, the judge alone, and both, the
    first two from `off`.
    """
    config, device = case.config.reward, case.policy.device
    names = ["off", "on", *(["green"] if can_be_green(device) else [])]
    shared = build()
    rewards = dict.fromkeys(names, shared) | ({"green": build()} if "green" in names else {})
    rounds: list[dict[str, dict[str, float]]] = []
    for number in range(num_rounds + 1):
        found = {}
        for name in names:
            with Overlap(rewards[name], replace(config, overlap=name), device) as judge:  # pyright: ignore[reportArgumentType]
                found[name] = run_once(case, judge)
        rounds += [found] if number else []
    medians = {name: {key: median(found[name][key] for found in rounds) for key in COLUMNS} for name in names}
    shares = {
        name: median(hidden_share(found["off"], found[name]) for found in rounds) for name in names if name != "off"
    }
    best = min(names, key=lambda name: medians[name]["total_s"])
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "num_threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rounds": rounds,
        "medians": medians,
        "efficiency": shares,
        "times_off": {name: median(f["off"]["total_s"] / f[name]["total_s"] for f in rounds) for name in names},
        "advice": best,
    }


def hidden_share(off: dict[str, float], beside: dict[str, float]) -> float:
    """The share of what could be hidden that was; negative where overlap costs time."""
    alone = off["total_s"] - off["judge_s"]
    return (off["total_s"] - beside["total_s"]) / max(min(alone, off["judge_s"]), 1e-9)


def table(figures: dict[str, Any], chosen: str) -> Table:
    """What the terminal shows, and in its caption what to keep."""
    shown = Table(title=f"An iteration and its judge on {figures['device']}: medians of {len(figures['rounds'])}")
    for column in ("reward.overlap", "all s", "judge s", "waited for it s", "hidden of what could be", "times off"):
        shown.add_column(column, justify="left" if column == "reward.overlap" else "right")
    for name, medians in figures["medians"].items():
        share = figures["efficiency"].get(name)
        hidden = "" if share is None else f"{100 * share:.0f} %"
        times = f"{figures['times_off'][name]:.2f}"
        shown.add_row(name, *(f"{medians[key]:.3g}" for key in COLUMNS), hidden, times)
    kept = "keep" if figures["advice"] == chosen else "take"
    shown.caption = f"{kept} reward.overlap: {figures['advice']}"
    return shown


def write_overlap(config: Config) -> None:
    """Compare, show the table, and write `overlap.json` into `run.folder`."""
    folder = Path(config.run.folder)
    folder.mkdir(parents=True, exist_ok=True)
    figures = compare(build_case(config), lambda: build_reward(config))
    (folder / "overlap.json").write_text(json.dumps(figures, indent=1))
    Console(width=None if Console().is_terminal else 120).print(table(figures, config.reward.overlap))
