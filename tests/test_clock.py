"""Phases add up to the iteration, on a clock that the test turns: on a CPU, and by CUDA events where they are faked."""

import threading
from collections.abc import Iterator

import pytest
import torch

from mteditflow.record import clock as module
from mteditflow.record.clock import OTHER, PHASES, Clock, phase, traced

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


class Hands:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.at = 100.0

    def __call__(self) -> float:
        return self.at

    def turn(self, seconds: float) -> None:
        self.at += seconds


@pytest.fixture
def hands() -> Hands:
    return Hands()


class Gpu:
    """A stream: the host queues work, and an event has the time at which the stream comes to it."""

    def __init__(self, hands: Hands) -> None:
        self.hands, self.busy_until, self.num_waits, self.ranges = hands, hands.at, 0, []
        self.open: list[str] = []

    def launch(self, seconds: float) -> None:
        self.busy_until = max(self.busy_until, self.hands.at) + seconds

    def event(self, *, enable_timing: bool) -> "Event":
        assert enable_timing
        return Event(self)

    def range_push(self, name: str) -> None:
        self.open.append(name)
        self.ranges.append("/".join(self.open))

    def range_pop(self) -> None:
        self.open.pop()


class Event:
    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.is_done = gpu, False

    def record(self) -> None:
        self.at = max(self.gpu.busy_until, self.gpu.hands.at)

    def synchronize(self) -> None:
        self.gpu.hands.at = max(self.gpu.hands.at, self.at)
        self.gpu.num_waits += 1

    def elapsed_time(self, end: "Event") -> float:
        assert max(self.at, end.at) <= self.gpu.hands.at, "not there yet"
        return 1000 * (end.at - self.at)


@pytest.fixture
def gpu(hands: Hands, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    gpu = Gpu(hands)
    event = type("FakeEvent", (Event,), {"__init__": lambda self, *, enable_timing: Event.__init__(self, gpu)})
    monkeypatch.setattr(torch.cuda, "Event", event)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", gpu.range_push)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", gpu.range_pop)
    return gpu


def positive(seconds: dict[str, float]) -> dict[str, float]:
    assert tuple(seconds) == (*PHASES, OTHER)  # the same keys, whatever ran
    return {name: value for name, value in seconds.items() if value}


def test_phases_add_up_to_the_iteration(hands: Hands) -> None:
    @phase("decode")
    def decode() -> None:
        hands.turn(4)

    with Clock(CPU, hands) as clock:
        start = hands.at
        hands.turn(1)
        for _ in range(2):
            with phase("denoise"):
                hands.turn(8)
        decode()
        hands.turn(0.5)
        with pytest.raises(KeyError), phase("score"):
            hands.turn(2)
            raise KeyError
        seconds = clock.read()
        assert positive(seconds) == {"denoise": 16, "decode": 4, "score": 2, OTHER: 1.5}
        assert sum(seconds.values()) == hands.at - start
        hands.turn(3)  # nothing is lost between two reads
        with phase("save"):
            hands.turn(1)
        assert positive(clock.read()) == {"save": 1, OTHER: 3}
    decode()  # no clock runs: nothing is counted, nothing fails


def test_a_phase_in_a_phase_is_part_of_it(hands: Hands) -> None:
    with Clock(CPU, hands) as clock:
        with phase("evaluate"):
            hands.turn(1)
            with phase("denoise"), phase("decode"):
                hands.turn(2)
            hands.turn(1)
        assert positive(clock.read()) == {"evaluate": 4}


def test_what_another_thread_does_is_beside(hands: Hands) -> None:
    """A judge of 5 s under a rollout of 3: the iteration waits 2 s for it, and lasts 5."""
    judging, is_rolled_out = threading.Event(), threading.Event()

    def judge() -> None:
        with phase("score"):
            judging.set()
            is_rolled_out.wait(60)
            hands.turn(2)

    with Clock(CPU, hands) as clock:
        worker = threading.Thread(target=judge)
        with phase("denoise"):
            worker.start()
            assert judging.wait(60)
            hands.turn(3)
        with phase("score"):
            is_rolled_out.set()
            worker.join()
        assert positive(clock.read()) == {"denoise": 3, "score": 2}
        assert clock.read_beside() == {"score": 5} and clock.read_beside() == {}


def test_a_gpu_is_waited_for_once(hands: Hands, gpu: Gpu) -> None:
    """The host is ahead of the GPU by 9 s when it scores for 10: 1 s of that is exposed."""
    with Clock(CUDA, hands) as clock:
        start = hands.at
        with phase("denoise"):
            gpu.launch(9)
        with phase("score"):
            hands.turn(10)
        with phase("forward, backward"):
            gpu.launch(4)
        hands.turn(1)
        assert gpu.num_waits == 0
        seconds = clock.read()
        assert positive(seconds) == {"denoise": 9, "score": 1, "forward, backward": 4}
        assert gpu.num_waits == 1 and sum(seconds.values()) == hands.at - start
        with phase("optimizer"):
            gpu.launch(1)
        assert positive(clock.read()) == {"optimizer": 1}


def test_ranges_on_a_gpu(gpu: Gpu) -> None:
    for iteration in traced("iteration", range(2)):
        with phase("decode"):
            pass
        if iteration == 1:
            break
    assert gpu.ranges == ["iteration 0", "iteration 0/decode", "iteration 1", "iteration 1/decode"] and gpu.open == []


def test_ranges_of_the_profiler() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in traced("turn", range(2)):
            with phase("encode text"):
                torch.ones(2).sum()
    names = [event.name for event in profiler.events() or []]
    assert {"turn 0", "turn 1"} <= set(names) and names.count("encode text") == 2


def test_one_clock_at_a_time(hands: Hands) -> None:
    with Clock(CPU, hands) as clock:
        with pytest.raises(AssertionError, match="a clock runs already"), Clock(CPU, hands):
            pass
        with pytest.raises(AssertionError, match="between phases"), phase("save"):
            clock.read()
    with Clock(CPU, hands):
        pass
    assert module._running is None


@pytest.fixture(autouse=True)
def no_clock_is_left() -> Iterator[None]:
    yield
    assert module._running is None
