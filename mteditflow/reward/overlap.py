"""A judge beside the rollout: one wave of trajectories is scored while the next is made.

`off` is the same queue with nobody else to work on it: a wave is scored where it is handed in, so scores, and with them
all bits of training, are equal by construction. `on` has one worker for what computes here, with a CUDA stream of its
own, and several for judges that are asked over HTTP. Grad mode and stream are a thread's, so the worker enters its own;
it waits for the event that follows a wave's last kernel, and holds the wave until its own last kernel is done, which
`record_stream` would leave to the allocator. No CUDA priority lies below the default stream's, so the judge's stream
has the higher: its kernels are small, and the rollout's fill what they leave. `green` gives the judge a stated number
of multiprocessors (a green context) instead.

No reward touches the policy: which adapter is selected is a fact of the process.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby
from typing import Any, Self

import torch
import torch.distributed as dist

from mteditflow.config.reward import RewardConfig
from mteditflow.record import ending
from mteditflow.record.clock import phase
from mteditflow.reward import Reward, Rewards
from mteditflow.types import Condition, Rollout, Rollouts, Score, Scores, Turn

PRIORITY = -1
NUM_REMOTE = 64  # waves on their way to a server at most; `reward.num_parallel` bounds the questions

Job = dict[str, Future[Score]]


class Overlap:
    """Scores the waves of an iteration in the order in which they are handed in. A context manager."""

    def __init__(self, rewards: Rewards, config: RewardConfig, device: torch.device) -> None:
        """ValueError for a green context that cannot be had."""
        self.rewards, self._is_on = rewards, config.overlap != "off"
        self._cuda = _judge_stream(config, device) if self._is_on and device.type == "cuda" else None
        if config.overlap == "green":
            _check_green(device)
        self._jobs: deque[Job] = deque()
        self._busy = Busy()
        self.exposed_s = 0.0

    def __enter__(self) -> Self:
        self._local = ThreadPoolExecutor(1, "judge") if self._is_on else None
        self._remote = ThreadPoolExecutor(NUM_REMOTE, "server") if self._is_on else None
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:  # nothing is left running, and nothing waits for a slow server
            self.rewards.close()
        for pool in (self._local, self._remote):
            if pool is not None:
                pool.shutdown(wait=kind is None or not dist.is_initialized(), cancel_futures=True)  # ranks end at once

    def start(self, rollout: Rollout) -> Callable[[], Scores]:
        """Have a rollout of an evaluation, between iterations, scored; what is returned waits for its scores. It is
        called in the order in which rollouts were handed in.
        """
        self.submit(rollout)

        def wait() -> Scores:
            scores = next(self.scores())
            if not self._jobs:
                self.read()  # no part of an iteration
            return scores

        return wait

    def gather(self, waves: Iterable[Rollout]) -> Rollout | Rollouts:
        """Hand in every wave as it is made, and join them. What a judge raises is raised here, within a wave."""
        made = []
        for wave in waves:
            self._raise_early()
            self.submit(wave)
            made.append(wave)
        return join(made)

    def submit(self, wave: Rollout) -> None:
        """Have a wave scored: at once, or by the workers."""
        ready = None
        if self._cuda is not None:
            ready = torch.cuda.Event()
            ready.record()
        self._jobs.append({name: self._start(reward, wave, ready) for name, reward in self.rewards.rewards.items()})

    def scores(self) -> Iterator[Scores]:
        """The scores of the waves handed in, in their order, each waited for."""
        while self._jobs:
            job, start = self._jobs.popleft(), time.perf_counter()
            with phase("score") if self._is_on else nullcontext():
                scores = {name: ending.result(future) for name, future in job.items()}
            self.exposed_s += time.perf_counter() - start
            yield self.rewards.combine(scores)

    def read(self) -> dict[str, float]:
        """Metrics since the last `read`: seconds that the judge worked, and that were waited for it."""
        exposed, self.exposed_s = self.exposed_s, 0.0
        return {"reward/exposed_s": exposed, "reward/judge_s": self._busy.read()}

    def _start(self, reward: Reward, wave: Rollout, ready: torch.cuda.Event | None) -> Future[Score]:
        pool = self._remote if reward.is_remote else self._local
        if pool is not None:
            return pool.submit(self._score, reward, wave, ready)
        future, start = Future[Score](), time.perf_counter()
        with phase("score"), self._busy:
            future.set_result(reward(wave))
        self.exposed_s += time.perf_counter() - start
        return future

    def _score(self, reward: Reward, wave: Rollout, ready: torch.cuda.Event | None) -> Score:
        """In a worker: on its stream, once the wave is there; `wave` lives until all that reads it is done."""
        with phase("score"), self._busy, torch.no_grad(), self._cuda() if self._cuda else nullcontext():
            if ready is not None:
                torch.cuda.current_stream().wait_event(ready)
            score = reward(wave)
            if ready is not None:
                done = torch.cuda.Event(blocking=True)
                done.record()
                done.synchronize()
            return score

    def _raise_early(self) -> None:
        for job in self._jobs:
            for future in job.values():
                if future.done():
                    future.result()


def join(waves: Iterable[Rollout]) -> Rollout | Rollouts:
    """One rollout of all waves, in parts where their shape changes."""
    parts = tuple(_join_alike(list(alike)) for _, alike in groupby(waves, key=lambda wave: wave.shape))
    return parts[0] if len(parts) == 1 else Rollouts(parts=parts)


def _join_alike(waves: list[Rollout]) -> Rollout:
    first, *others = waves
    if not others:
        return first
    turns = [
        Turn(
            condition=Condition(
                text={name: torch.cat([turn.condition.text[name] for turn in parts]) for name in text},
                image=torch.cat([turn.condition.image for turn in parts]),
                cfg_scale=parts[0].condition.cfg_scale,
            ),
            latents=torch.cat([turn.latents for turn in parts], dim=1),
            old_log_prob=torch.cat([turn.old_log_prob for turn in parts], dim=1),
            image=torch.cat([turn.image for turn in parts]),
        )
        for parts in zip(*(wave.turns for wave in waves), strict=True)
        for text in [parts[0].condition.text]
    ]
    group, member = (torch.cat([getattr(wave, name) for wave in waves]) for name in ("group", "member"))
    return Rollout(
        tasks=first.tasks, turns=turns, group=group, member=member, schedule=first.schedule, noise=first.noise
    )


def efficiency(read: dict[str, float], step_s: float) -> float:
    """The share of what could be hidden that was: (T_a + T_b - T_ab) / min(T_a, T_b), of rollout and training, the
    judge, and both, which took `step_s`; NaN where there was nothing to hide. read: as `Overlap.read` gives it.
    """
    exposed_s, judge_s = read["reward/exposed_s"], read["reward/judge_s"]
    other_s = step_s - exposed_s
    return max(0.0, judge_s - exposed_s) / min(other_s, judge_s) if min(other_s, judge_s) > 0 else math.nan


class Busy:
    """Counts the seconds in which at least one thread is within."""

    def __init__(self) -> None:
        self._lock, self._num, self._since, self._seconds = threading.Lock(), 0, 0.0, 0.0

    def __enter__(self) -> None:
        with self._lock:
            self._num += 1
            if self._num == 1:
                self._since = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._num -= 1
            if self._num == 0:
                self._seconds += time.perf_counter() - self._since

    def read(self) -> float:
        """The seconds since the last `read`; nobody is within."""
        with self._lock:
            seconds, self._seconds = self._seconds, 0.0
            return seconds


def _judge_stream(config: RewardConfig, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """What a worker enters: a stream of higher priority, or one with multiprocessors of its own."""
    if config.overlap == "green":
        _check_green(device)
        green: Any = torch.cuda.green_contexts.GreenContext.create(num_sms=config.green_sms, device_id=device.index)
        stream = green.Stream()
    else:
        stream = torch.cuda.Stream(device, priority=PRIORITY)
    return lambda: torch.cuda.stream(stream)


def can_be_green(device: torch.device) -> bool:
    """Whether the device and this torch have green contexts with streams."""
    contexts = getattr(torch.cuda, "green_contexts", None)
    is_known = contexts is not None and contexts.SUPPORTED and hasattr(contexts.GreenContext, "Stream")
    return device.type == "cuda" and is_known


def _check_green(device: torch.device) -> None:
    """ValueError where they are not to be had."""
    if not can_be_green(device):
        where = f"torch {torch.__version__}" if device.type == "cuda" else f"{device.type}"
        raise ValueError(
            f"reward.overlap is 'green': {where} has no green contexts (they need a GPU and torch 2.12); take 'on'"
        )
