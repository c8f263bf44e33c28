"""The account of an iteration: seconds by phase, the speed of the matrix products against the device's ceiling,
turn-images per second and per kWh, and what the GPU says of itself. Of the first rank and its GPU.

    time/PHASE_s            what the iteration waited for (record/clock.py): all phases and `other` add up to it
    beside/PHASE_s          what another thread did meanwhile, where one did
    speed/...               see `speed_figures`; core_wait_share, where the system says it: share of the time that the
                            main thread waited for a core
    gpu/..., memory/...     profile/gpu.py, record/metrics.py; turn_images_per_kwh by all that the GPU drew,
                            evaluations and checkpoints included
"""

import math
import re
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Self

from mteditflow.config import Config
from mteditflow.data import count_references
from mteditflow.plan.duration import batch_plan
from mteditflow.plan.flops import ForwardFlops, forward_flops, matmul_ceiling, mean_flops
from mteditflow.plan.memory import num_passes, num_text_tokens
from mteditflow.policy import Policy
from mteditflow.profile.gpu import open_meter
from mteditflow.record.clock import ROLLOUT, STEP, Clock
from mteditflow.record.metrics import used_memory
from mteditflow.watch.pace import CoreWait

TRAINING = "forward, backward"


def row_flops(config: Config, policy: Policy) -> ForwardFlops:
    """Count the forward pass of one row of the policy, guidance aside, of the mean size of pictures."""
    mean, _ = count_references(config)
    text_tokens = num_text_tokens(config.model, policy.family, mean)

    def count(size: tuple[int, int]) -> ForwardFlops:
        alike = policy.at((size,))
        image_tokens = alike.num_tokens + round((1 + mean) * alike.num_condition_tokens)
        transformer = policy.pipeline.transformer.config
        return forward_flops(policy.family, transformer, text_tokens=text_tokens, image_tokens=image_tokens)

    return mean_flops(count, config)


def count_work(config: Config, row: ForwardFlops, num_transitions: float, num_ranks: int = 1) -> dict[str, float]:
    """TFLOP of a rank in the phases that are matrix products, `num_transitions` of its own trained on.

    What the model needs: what checkpointing computes again, and rows that fill up a microbatch, are not counted.
    """
    batches, passes = batch_plan(config), num_passes(config)
    backward = row.backward_full if config.lora.is_full else row.backward
    forwards = batches.train_forward_rows / batches.transitions
    return {
        "denoise": passes * batches.rollout_rows / num_ranks * row.total / 1e12,
        TRAINING: passes * num_transitions * (forwards * row.total + backward) / 1e12,
    }


def speed_figures(
    seconds: Mapping[str, float], work: Mapping[str, float], ceiling: float, num_images: float
) -> dict[str, float]:
    """How fast a GPU was in an iteration. `seconds` by phase; `work` TFLOP by phase; `ceiling` TFLOP/s.

    turn_images_per_second: of the whole step, evaluations and checkpoints aside. rollout_images_per_second: of
    encoding, denoising and decoding alone. ..._ceiling_share: of the rate of a large matrix product in the model's
    precision. NaN for a phase that did not run.
    """
    step = sum(seconds.get(phase, 0.0) for phase in (*STEP, "other"))
    rates = {
        "denoise": _ratio(work["denoise"], seconds["denoise"]),
        "training": _ratio(work[TRAINING], seconds[TRAINING]),
    }
    return {
        "speed/turn_images_per_second": _ratio(num_images, step),
        "speed/rollout_images_per_second": _ratio(num_images, sum(seconds[phase] for phase in ROLLOUT)),
        **{f"speed/{name}_tflop_per_second": rate for name, rate in rates.items()},
        **{f"speed/{name}_ceiling_share": rate / ceiling for name, rate in rates.items()},
        "speed/ceiling_tflop_per_second": ceiling,
    }


def _ratio(value: float, by: float) -> float:
    return value / by if by > 0 else math.nan


def metric(prefix: str, phase: str) -> str:
    """Name the metric of a phase, such as time/encode_text_s."""
    return f"{prefix}/{re.sub(r'[^a-z]+', '_', phase)}_s"


def step_seconds(account: Mapping[str, float]) -> float:
    """The seconds of an iteration's step in an account, evaluations and checkpoints aside."""
    return sum(account[metric("time", phase)] for phase in (*STEP, "other"))


class Account:
    """Keeps the account of a run, from `with Account(...)` on; the ceiling is measured then."""

    def __init__(self, config: Config, policy: Policy, num_ranks: int) -> None:
        self._config, self._num_ranks, self._row = config, num_ranks, row_flops(config, policy)
        self._device, self._dtype = policy.device, policy.dtype
        self._num_images = batch_plan(config).turn_images / num_ranks
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._ceiling = matmul_ceiling(self._device, self._dtype)
        meter = open_meter(self._device)
        self._meter = self._stack.enter_context(meter) if meter else None
        self._clock, self._core_wait = self._stack.enter_context(Clock(self._device)), CoreWait()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def read(self, num_transitions: float) -> dict[str, float]:
        """The metrics since the start or the last `read`; `num_transitions` of this rank were trained on."""
        seconds, gpu = self._clock.read(), self._meter.read() if self._meter else {}
        if "gpu/energy_kwh" in gpu:
            gpu["gpu/turn_images_per_kwh"] = _ratio(self._num_images, gpu["gpu/energy_kwh"])
        work = count_work(self._config, self._row, num_transitions, self._num_ranks)
        return {
            **{metric("time", phase): value for phase, value in seconds.items()},
            **{metric("beside", phase): value for phase, value in self._clock.read_beside().items()},
            **speed_figures(seconds, work, self._ceiling, self._num_images),
            **self._core_wait.read(),
            **gpu,
            **dict([used_memory()]),
        }
