"""Schedules of sigma, and the coefficient table of a schedule: a denoising step is one row of seven numbers.

Computed in float64 on the host, once, and rounded to float32: sigma near 1 leaves no digits for 1 - sigma in lower
precision, and the device code needs no special case for the first step, the last, or the kind of step.

With dt = sigma_next - sigma < 0, velocity v = noise - image, noise_level a:

    ODE   mean = x + v dt                                                                std = 0
    SDE   mean = x (1 + std_t^2 dt / (2 sigma)) + v (1 + std_t^2 (1 - sigma) / (2 sigma)) dt
          std_t = a sqrt(sigma / (1 - sigma)), std = std_t sqrt(-dt)                     Flow-GRPO (arXiv 2505.05470)
    CPS   mean = (1 - sigma_next) (x - sigma v) + sqrt(sigma_next^2 - std^2) (x + (1 - sigma) v)
          std = sigma_next sin(a pi / 2)                                                 Flow-CPS

CPS at std = 0 is the ODE step: so is its last step, which therefore has no log-prob and cannot be trained.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Self

import torch
from mteditflow_kernels import C_V, C_X, KL_EXACT, KL_PUBLISHED, LOG_PROB_CONST, LOG_PROB_SCALE, NUM_COLUMNS, STD
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The S denoising steps of a turn."""

    sigmas: Tensor  # (S+1,) noise levels, falling
    table: Tensor  # (S, 7) coefficients of each step, float32
    corrections: tuple[float, ...]  # S, those of `second_order`; 0: an Euler step
    is_noisy: tuple[bool, ...]  # S; the others are ODE steps
    trained_steps: tuple[int, ...]  # denoising steps to learn from

    def to(self, device: torch.device) -> Self:
        """The schedule as float32 tensors on a device."""
        return replace(self, sigmas=self.sigmas.float().to(device), table=self.table.to(device))


def make_schedule(
    sigmas: Tensor, *, noise_level: float = 0.0, rule: str = "sde", noisy_steps: Sequence[int] = (),
    trained_steps: tuple[int, ...] = (), is_second_order: bool = False,
) -> Schedule:  # fmt: skip
    """A schedule on these noise levels (S+1,), float64; by default the ODE's, by Euler steps. ValueError as for
    `step_table`.
    """
    table = step_table(sigmas, noise_level=noise_level, rule=rule, noisy_steps=noisy_steps)
    corrections = second_order(sigmas) if is_second_order else [0.0] * len(table)
    is_noisy = tuple((table[:, STD] > 0).tolist())
    return Schedule(
        sigmas=sigmas, table=table, corrections=tuple(corrections), is_noisy=is_noisy, trained_steps=trained_steps
    )


def sigma_schedule(num_steps: int, num_tokens: int) -> Tensor:
    """FLUX.1's shifted schedule, float64 (S+1,) from 1 to 0; `num_tokens` is that of the output image.

    s_i = linspace(1, 1/S, S); sigma_i = e^mu / (e^mu + 1/s_i - 1), mu linear in the tokens: 0.5 at 256, 1.15 at 4096.
    """
    slope = (1.15 - 0.5) / (4096 - 256)
    shift = math.exp(0.5 + slope * (num_tokens - 256))
    unshifted: list[float] = torch.linspace(1, 1 / num_steps, num_steps, dtype=torch.float64).tolist()
    # of numbers, not of a tensor: torch divides by it in two roundings, and the first sigma would not always be 1
    return torch.tensor([*(shift / (shift + (1 / s - 1)) for s in unshifted), 0.0], dtype=torch.float64)


def _sde_row(sigma: float, sigma_next: float, safe_sigma: float, noise_level: float) -> list[float]:
    dt = sigma_next - sigma
    variance_rate = noise_level**2 * sigma / (1 - safe_sigma)  # std_t^2
    std = math.sqrt(-variance_rate * dt)
    row = [0.0] * NUM_COLUMNS
    row[C_X] = 1 + variance_rate / (2 * sigma) * dt
    row[C_V] = (1 + variance_rate * (1 - sigma) / (2 * sigma)) * dt
    row[STD] = std
    row[LOG_PROB_SCALE] = 1 / (2 * std**2)
    row[LOG_PROB_CONST] = -math.log(std) - 0.5 * math.log(2 * math.pi)
    row[KL_PUBLISHED] = 1 / (2 * variance_rate)
    row[KL_EXACT] = 1 / (2 * std**2)
    return row


def _cps_row(sigma: float, sigma_next: float, noise_level: float) -> list[float]:
    std = sigma_next * math.sin(noise_level * math.pi / 2)
    noise_scale = math.sqrt(sigma_next**2 - std**2)
    row = [0.0] * NUM_COLUMNS
    row[C_X] = 1 - sigma_next + noise_scale
    row[C_V] = -(1 - sigma_next) * sigma + noise_scale * (1 - sigma)
    row[STD] = std
    row[LOG_PROB_SCALE] = 1.0  # Flow-CPS drops 1 / (2 std^2) and the constant
    row[KL_PUBLISHED] = row[KL_EXACT] = 1 / (2 * std**2)  # Flow-CPS's scripts of Kontext and Qwen-Image: alike
    return row


def _ode_row(sigma: float, sigma_next: float) -> list[float]:
    row = [0.0] * NUM_COLUMNS
    row[C_X], row[C_V] = 1.0, sigma_next - sigma
    return row


def step_table(
    sigmas: Tensor, *, noise_level: float, rule: str = "sde", noisy_steps: Sequence[int] | None = None
) -> Tensor:
    """Coefficients of the S steps of a schedule, float32 (S, 7); columns as named in `mteditflow_kernels`.

    `noisy_steps` None: all are noisy; the others are ODE steps, and so is a step whose std is 0 (noise_level 0, CPS's
    last).
    """
    levels: list[float] = sigmas.double().tolist()
    num_steps = len(levels) - 1
    if rule not in ("sde", "cps"):
        raise ValueError(f"rule is {rule!r}: must be 'sde' or 'cps'")
    if noise_level < 0 or (rule == "cps" and noise_level > 1):
        raise ValueError(f"noise_level is {noise_level}: must not be negative, and at most 1 with rule 'cps'")
    if num_steps < 1 or levels[-1] < 0 or any(a <= b for a, b in pairwise(levels)):
        raise ValueError(f"sigmas are {levels}: must fall from noise to image")
    noisy = set(range(num_steps)) if noisy_steps is None else set(noisy_steps)
    if not noisy <= set(range(num_steps)):
        raise ValueError(f"noisy_steps are {sorted(noisy)}: must lie in 0 to {num_steps - 1}")
    rows = []
    for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
        is_ode = i not in noisy or noise_level == 0 or (rule == "cps" and sigma_next == 0)
        # 1 - sigma vanishes at the first step; 1e-6 because a library's schedule is float32
        safe_sigma = levels[1] if i == 0 and sigma > 1 - 1e-6 else sigma
        if is_ode:
            rows.append(_ode_row(sigma, sigma_next))
        elif rule == "sde":
            rows.append(_sde_row(sigma, sigma_next, safe_sigma, noise_level))
        else:
            rows.append(_cps_row(sigma, sigma_next, noise_level))
    return torch.tensor(rows, dtype=torch.float64).to(torch.float32)


def second_order(sigmas: Tensor) -> list[float]:
    """DPM-Solver++(2M)'s correction of each ODE step (arXiv 2211.01095): what multiplies the change of the estimate
    x0 = x - sigma v since the step before and is added to the velocity. 0 is an Euler step: the first, the last, and
    the one after sigma = 1, from which no log signal-to-noise ratio can be taken.
    """
    levels: list[float] = sigmas.double().tolist()
    factors = [0.0] * (len(levels) - 1)
    for i in range(1, len(levels) - 2):
        before, sigma, after = levels[i - 1 : i + 2]
        if before < 1:
            own, last = (math.log((1 - b) / b * a / (1 - a)) for a, b in ((sigma, after), (before, sigma)))  # lambda
            factors[i] = 0.5 * (1 - after) * math.expm1(-own) * own / last / (sigma - after)
    return factors


def window_steps(
    num_steps: int, window_size: int, placement: str, iteration: int, num_iterations: int, seed: int,
    window_range: Sequence[int] = (), iters_per_window: int = 0,
) -> tuple[int, ...]:  # fmt: skip
    """The denoising steps that are trained in an iteration, never the last one; `noisy_steps` says which are noisy.

    window_size 0: all but the last. Else `window_size` consecutive steps of `window_range`, from its first up to its
    second; (): all but the last. Their start is drawn ('random'), or moves on by 1 every `iters_per_window` iterations,
    again and again (MixGRPO), or with 0 from first to last over the run ('progressive').
    """
    first, end = window_range or (0, num_steps - 1)
    if not 0 <= window_size < num_steps or not 0 <= first <= end - window_size < num_steps - window_size:
        raise ValueError(f"window_size is {window_size}: must fit in steps {first} to {end - 1} of {num_steps}")
    if window_size == 0:
        return tuple(range(num_steps - 1))
    last_start = end - window_size
    match placement:
        case "random":
            start = random.Random(f"{seed}-{iteration}").randint(first, last_start)
        case "progressive" if iters_per_window:
            start = first + iteration // iters_per_window % (last_start - first + 1)
        case "progressive":
            start = first + round(min(iteration / max(num_iterations - 1, 1), 1.0) * (last_start - first))
        case _:
            raise ValueError(f"placement is {placement!r}: must be 'random' or 'progressive'")
    return tuple(range(start, start + window_size))


def noisy_steps(num_steps: int, size: int, trained: tuple[int, ...], last_step: str = "noisy") -> tuple[int, ...]:
    """The denoising steps that are noisy: with a window of `size` steps the trained ones, which never reach the last;
    without one, size 0, all S, or all but the last where `last_step` is 'ode'.
    """
    return tuple(range(num_steps - (last_step == "ode"))) if size == 0 else trained
