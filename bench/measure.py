"""How a call on a GPU is timed, and what is written down of it.

A kernel of a few microseconds is timed as one replay of a CUDA graph that calls it once for each of many sets of
buffers, together far larger than the L2 cache, whose outputs are all kept: no launch from the host, and nothing is
found in the cache. What is compared is replayed in turn, and the median counts. On a CPU the same code runs without a
graph, which tests it; its times say nothing.
"""

import platform
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from mteditflow.record.files import write_json

WORKING_SET_BYTES = 256 * 2**20  # H200: 60 MB of L2
COPY_BYTES, PRODUCT_SIZE = 2**30, 8192
SMI = {"driver": "driver_version", "sm_mhz": "clocks.sm", "max_sm_mhz": "clocks.max.sm", "memory_mhz": "clocks.mem",
       "power_limit_w": "power.limit", "temperature_c": "temperature.gpu"}  # fmt: skip
MIN_REPLAYS, MAX_REPLAYS, REPLAY_SECONDS = 5, 50, 0.3

Call = Callable[[], object]
Key = TypeVar("Key")
Size = TypeVar("Size")


@dataclass(frozen=True, kw_only=True)
class Row:
    """A case at a shape: medians of ours, of the eager reference and of what torch.compile makes of it, microseconds
    per call. None: not measured.
    """

    case: str
    shape: tuple[int, ...]
    dtype: str
    num_bytes: int  # what the algorithm has to move
    us: float
    eager_us: float
    compiled_us: float | None
    launches: int
    eager_launches: int
    syncs: int
    eager_syncs: int
    goal_us: float | None

    def figures(self, copy_gb_per_s: float) -> dict[str, Any]:
        """The fields, and what follows from them and the measured copy bandwidth."""
        gb_per_s = self.num_bytes / self.us * 1e-3
        return asdict(self) | {
            "gb_per_s": gb_per_s,
            "percent_of_copy": 100 * gb_per_s / copy_gb_per_s,
            "times_eager": self.eager_us / self.us,
            "times_compiled": None if self.compiled_us is None else self.compiled_us / self.us,
        }


@dataclass(frozen=True, kw_only=True)
class Goal:
    """A figure to reach on one H200, at most or at least."""

    value: float
    is_least: bool = False

    def is_met(self, figure: float) -> bool:
        return figure >= self.value if self.is_least else figure <= self.value


class Record:
    """The file of a session, `DATE-DEVICE.json`: facts of `session`, and rows by part. It is written whole with every
    row, so that a failure later on loses none.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any]) -> None:
        device = facts["device"].lower().replace(" ", "-")
        self.path = folder / f"{facts['date'][:19].replace(':', '')}-{device}.json"
        self.found: dict[str, Any] = dict(facts)
        folder.mkdir(exist_ok=True, parents=True)

    def add(self, part: str, row: Mapping[str, Any], goals: Mapping[str, Goal] | None = None) -> None:
        """Append a row to a part, with the goals of its figures and whether they are met."""
        judged = {
            name: {"goal": goal.value, "is_met": goal.is_met(row[name])}
            for name, goal in (goals or {}).items()
            if row.get(name) is not None
        }
        self.found.setdefault(part, []).append(dict(row) | ({"goals": judged} if judged else {}))
        write_json(self.path, self.found)


def num_sets(bytes_per_call: int) -> int:
    """Sets of buffers that fill the working set, two at least."""
    return max(2, -(-WORKING_SET_BYTES // bytes_per_call))


def num_replays(seconds: float) -> int:
    """Replays of `seconds` each that are worth a median."""
    return min(MAX_REPLAYS, max(MIN_REPLAYS, round(REPLAY_SECONDS / seconds)))


def replay_of(prepare: Callable[[], Sequence[Call]], device: torch.device) -> Call:
    """One call of each that `prepare` makes, in order: a CUDA graph, whose results stay apart.

    Prepared, warmed up and captured on one stream: autograd runs a backward pass where its forward pass ran.
    """
    if device.type == "cpu":
        calls = prepare()
        return lambda: [call() for call in calls]
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        calls = prepare()
        for call in (calls[0], calls[-1], calls[0]):
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = [call() for call in calls]
    del results  # their memory stays the graph's

    def replay() -> object:
        graph.replay()
        return calls  # what the graph reads lives as long as it

    return replay


def device_and(true: Size, small: Size) -> tuple[torch.device, Size]:
    """This machine's device, and the size for it: the true one on a GPU."""
    is_cuda = torch.cuda.is_available()
    return torch.device("cuda", 0) if is_cuda else torch.device("cpu"), true if is_cuda else small


def seconds_of(replay: Call, device: torch.device) -> float:
    """On the device's clock."""
    if device.type == "cpu":
        start = time.perf_counter()
        replay()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    replay()
    end.record()
    end.synchronize()
    return 1e-3 * start.elapsed_time(end)


def medians(replays: Mapping[Key, Call], device: torch.device) -> dict[Key, float]:
    """Median seconds of each, replayed in turn so that a change of clock meets all of them."""
    rounds = num_replays(max(seconds_of(replay, device) for replay in replays.values()))
    times = [{name: seconds_of(replay, device) for name, replay in replays.items()} for _ in range(rounds)]
    return {name: statistics.median(each[name] for each in times) for name in replays}


def copy_gb_per_s(device: torch.device) -> float:
    """Of a copy within the device, bytes read plus written."""
    source = torch.randint(256, (COPY_BYTES,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2e-9 * COPY_BYTES / medians({"copy": lambda: target.copy_(source)}, device)["copy"]


def product_tflop_per_s(device: torch.device, *, is_float8: bool) -> float | None:
    """Of a square matrix product in bfloat16, or of e4m3 with a scale per row; None: the device has no such product."""
    size = PRODUCT_SIZE
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    if is_float8:
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
            return None
        a, b = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()  # the second by columns, as the kernel wants it
        scales = torch.ones(size, 1, device=device), torch.ones(1, size, device=device)

        def product() -> Tensor:
            return torch._scaled_mm(a, b, scale_a=scales[0], scale_b=scales[1], out_dtype=torch.bfloat16)  # pyright: ignore[reportPrivateImportUsage]
    else:

        def product() -> Tensor:
            return a @ b

    try:
        product()
    except RuntimeError:  # torch 2.11 has no product of rows with scales on a CPU
        return None
    return 2e-12 * size**3 / medians({"product": product}, device)["product"]


def count_launches(call: Call, device: torch.device) -> int:
    """Kernels, copies and fills that the GPU runs for a call; 0 on a CPU."""
    if device.type == "cpu":
        return 0
    call()
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        call()
        torch.cuda.synchronize(device)
    events = profiled.events() or ()
    return sum(event.device_type.name == "CUDA" and "Sync" not in event.name for event in events)


@contextmanager
def no_syncs(device: torch.device) -> Iterator[None]:
    """A host sync within raises RuntimeError."""
    with _sync_mode("error", device):
        yield


def count_syncs(call: Call, device: torch.device) -> int:
    """Host syncs of a call; 0 on a CPU."""
    with warnings.catch_warnings(record=True) as caught, _sync_mode("warn", device):
        warnings.simplefilter("always")
        call()
    return sum("called a synchronizing" in str(warning.message) for warning in caught)


@contextmanager
def _sync_mode(mode: str, device: torch.device) -> Iterator[None]:
    if device.type == "cpu":
        yield
        return
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def clocks(device: torch.device) -> dict[str, str]:
    """Driver, clocks, power limit and temperature now, as nvidia-smi prints them; {} without a GPU."""
    if device.type == "cpu":
        return {}
    query = ["nvidia-smi", f"--query-gpu={','.join(SMI.values())}", "--format=csv,noheader,nounits", "--id=0"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    return dict(zip(SMI, (value.strip() for value in done.stdout.split(",")), strict=False))


def session(device: torch.device) -> dict[str, Any]:
    """What the figures of a session depend on, its ceilings included."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    versions = {"python": platform.python_version(), "cuda": torch.version.cuda}
    names = ("torch", "triton", "diffusers", "transformers", "peft")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "HEAD"),
        "is_changed": bool(git("status", "--porcelain", "--untracked-files=no")),
        "versions": versions | {name: version(name) for name in names},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "memory_gib": torch.cuda.mem_get_info(device)[1] / 2**30 if device.type == "cuda" else None,
        "ceilings": {
            "copy_gb_per_s": copy_gb_per_s(device),
            "bfloat16_tflop_per_s": product_tflop_per_s(device, is_float8=False),
            "float8_tflop_per_s": product_tflop_per_s(device, is_float8=True),
        },
        "clocks": clocks(device),  # after the products: those that the card runs at under load
    }


def table(session: Mapping[str, Any], rows: Sequence[Row]) -> Table:
    """What a person reads of it; a goal stands beside what was reached."""
    copy = session["ceilings"]["copy_gb_per_s"]
    result = Table(
        title=f"{session['device']}, copy {copy:.0f} GB/s; medians by CUDA-graph replay; in brackets: eager",
        caption="goals: 8 x eager, 1.3 x compiled; one launch and no sync for a step",
    )
    for name in ("case", "shape"):
        result.add_column(name, no_wrap=True)
    for name in ("us", "goal", "GB/s", "% of copy", "x eager", "x compiled", "launches", "syncs"):
        result.add_column(name, justify="right")
    for row in rows:
        f = row.figures(copy)
        compiled = "-" if row.compiled_us is None else f"{f['times_compiled']:.1f}"
        goal = "" if row.goal_us is None else f"{'' if row.us <= row.goal_us else 'missed '}{row.goal_us:g}"
        result.add_row(
            row.case, str(list(row.shape)), f"{row.us:.1f}", goal, f"{f['gb_per_s']:.0f}",
            f"{f['percent_of_copy']:.0f}", f"{f['times_eager']:.1f}", compiled,
            f"{row.launches} ({row.eager_launches})", f"{row.syncs} ({row.eager_syncs})",
        )  # fmt: skip
    return result
