"""Our path beside the loop that users write (reference_loop.py), on one machine, in one session, turn about:
`mteditflow profile --compare`. Ratios are of a round's two runs, and the median over the rounds is shown.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from mteditflow.config import Config
from mteditflow.objective import build_objective
from mteditflow.plan.duration import batch_plan
from mteditflow.profile.command import LAUNCHES, SYNCS, Case, build_case, praise
from mteditflow.profile.reference_loop import ReferenceLoop, build_reference
from mteditflow.types import Rollout

NUM_ROUNDS = 3
COLUMNS = ("rollout", "update", "all", "peak_gib")
SHORT_STEPS = 2  # of what is traced: a trace of a whole iteration of a large editor would not fit into the host


Loop = tuple[Callable[[], Rollout], Callable[[Rollout], object]]
"""A rollout, and the update on it."""


def build_loops(case: Case, reference: ReferenceLoop) -> dict[str, Loop]:
    """Put the two paths side by side: each with scores in its rollout, and an advantage for every trajectory."""
    shape = (case.policy.num_tokens, case.policy.num_channels)

    def noise(turn: int, draw: int, rows: Tensor) -> Tensor:
        return torch.randn(len(rows), *shape, device=case.policy.device)

    def roll_out() -> Rollout:
        made = reference.roll_out(noise)
        case.score(made)
        return made

    def train(made: Rollout) -> None:
        reference.update(made, praise(made), noise)

    return {"ours": (case.roll_out, case.train), "reference": (roll_out, train)}


def time_loop(loop: Loop) -> dict[str, float]:
    """Seconds of a rollout with its scores, of the update on it and of both; on a GPU the peak of its memory, GiB."""
    is_cuda = torch.cuda.is_initialized()
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    roll_out, train = loop
    start = _now()
    made = roll_out()
    middle = _now()
    train(made)
    end = _now()
    seconds = {"rollout": middle - start, "update": end - middle, "all": end - start}
    return seconds | ({"peak_gib": torch.cuda.max_memory_allocated() / 2**30} if is_cuda else {})


def _now() -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def short_case(case: Case) -> Case:
    """Cut a case to a turn of 2 steps, all that can be trained of it, and as many tasks as a microbatch takes."""
    config = case.config
    rollout = config.rollout
    num_tasks = min(rollout.num_tasks, math.ceil(rollout.microbatch_size / rollout.group_size))
    rollout = replace(rollout, num_steps=SHORT_STEPS, window_size=0, num_tasks=num_tasks)
    config = replace(
        config, rollout=rollout, data=replace(config.data, num_turns=1),
        objective=replace(config.objective, nft_num_times=SHORT_STEPS),
    )  # fmt: skip
    return replace(case, config=config, objective=build_objective(config), tasks=case.tasks[:num_tasks])


def count_waits(loop: Loop) -> dict[str, dict[str, int | None]]:
    """Launches and waits of the host, of a rollout and of an update; on a CPU, numbers that it reads of tensors."""
    roll_out, train = loop
    made, of_rollout = _count(roll_out)
    _, of_update = _count(lambda: train(made))
    return {"rollout": of_rollout, "update": of_update}


def _count(run: Callable[[], Any]) -> tuple[Any, dict[str, int | None]]:
    is_cuda = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]) as profiler:
        result = run()
    names = [event.name for event in profiler.events() or []]
    return result, {
        "launches": sum(name in LAUNCHES for name in names) if is_cuda else None,
        "host syncs": sum(name in SYNCS for name in names) if is_cuda else None,
        "host reads": names.count("aten::_local_scalar_dense"),
    }


def compare(case: Case, num_rounds: int = NUM_ROUNDS) -> dict[str, Any]:
    """Compare the loops, after an iteration of each to warm up: the figures, as `compare.json` has them."""
    reference, batches, short = build_reference(case), batch_plan(case.config), short_case(case)
    loops = build_loops(case, reference)
    short_loops = build_loops(short, replace(reference, config=short.config, tasks=short.tasks))
    for loop in (*loops.values(), *short_loops.values()):
        time_loop(loop)
    rounds = [{name: time_loop(loop) for name, loop in loops.items()} for _ in range(num_rounds)]
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "num_threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "diffusers", "peft", "transformers")},
        "turn_images": batches.turn_images,
        "transitions": {"ours": batches.transitions, "reference": batches.turn_images * len(reference.trained_steps)},
        "rounds": rounds,
        "medians": {name: {key: median(r[name][key] for r in rounds) for key in rounds[0][name]} for name in loops},
        "ratio": {key: median(r["reference"][key] / r["ours"][key] for r in rounds) for key in rounds[0]["ours"]},
        "short": {name: count_waits(loop) for name, loop in short_loops.items()},
    }


def tables(figures: dict[str, Any]) -> list[Table]:
    """What the terminal shows."""
    title = f"An iteration of {figures['turn_images']} turn-images on {figures['device']}: medians of"
    whole = Table(title=f"{title} {len(figures['rounds'])}")
    for column in ("", "rollout s", "update s", "all s", "peak GiB", "transitions trained"):
        whole.add_column(column, justify="right" if column else "left")
    for name, medians in figures["medians"].items():
        shown = [f"{medians[key]:.3g}" if key in medians else "no GPU" for key in COLUMNS]
        whole.add_row(name, *shown, str(figures["transitions"][name]))
    whole.add_row("reference / ours", *(f"{figures['ratio'][key]:.2f}" for key in COLUMNS if key in figures["ratio"]))
    short = Table(title=f"A turn of {SHORT_STEPS} steps, and the update on it")
    short.add_column("")
    for column in figures["short"]["ours"]["rollout"]:
        short.add_column(column, justify="right")
    for name, parts in figures["short"].items():
        for part, counts in parts.items():
            short.add_row(f"{name}, {part}", *("no GPU" if count is None else str(count) for count in counts.values()))
    return [whole, short]


def write_comparison(config: Config) -> None:
    """Compare the loops, show the table, and write `compare.json` into `run.folder`."""
    folder = Path(config.run.folder)
    folder.mkdir(parents=True, exist_ok=True)
    figures = compare(build_case(config))
    (folder / "compare.json").write_text(json.dumps(figures, indent=1))
    console = Console(width=None if Console().is_terminal else 120)
    for table in tables(figures):
        console.print(table)
