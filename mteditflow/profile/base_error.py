"""How far a quantised base stands from its bfloat16 original, measured once, at the start of a run, on its first task.

Two trajectories take a turn's denoising steps with the adapter off. At a few of the steps the velocity is predicted
again by the original weights, which come from the host one linear at a time: the original never stands on the device,
and the probe needs no more memory than one of its weights.

    base/velocity    ||v_quantised - v|| / ||v||, mean over the steps
    base/log_prob    |log p(x') under the quantised base - under the original|, in clip ranges, the largest: how far the
                     ratio would be off if rollout and training ran on different bases. Both run on this one, so it is
                     what the base costs in truth to the published model, not an error of the ratio. Of noisy steps only
    base/outlier     largest magnitude of an input's channel over the median channel's, of the worst linear: above some
                     thousands, e4m3 with one scale per row leaves the other channels few bits (28,672 is its range)
    base/linear      ||y_quantised - y|| / ||y|| of the worst linear, given the original's input
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from mteditflow_kernels import sde_log_prob
from torch import Tensor, nn

from mteditflow.config import Config
from mteditflow.noise import NoiseSource
from mteditflow.objective import Objective
from mteditflow.policy import Policy
from mteditflow.rollout import roll_out
from mteditflow.types import EditTask, Rollout

NUM_ROWS = 2


@dataclass(frozen=True, kw_only=True)
class BaseError:
    """Figures by name, and the linears that are worst, by name of the figure."""

    figures: dict[str, float]
    worst: dict[str, str]

    def __str__(self) -> str:
        """One line."""
        named = {
            "velocity": "velocity {:.2%}", "log_prob": "log-prob {:.3g} clip ranges", "outlier": "channel x {:.3g}",
            "linear": "linear {:.2%}",
        }  # fmt: skip
        parts = []
        for name, value in self.figures.items():
            where = self.worst.get(name)
            parts.append(named[name.removeprefix("base/")].format(value) + (f" ({where})" if where else ""))
        return f"error of the base against bfloat16: {', '.join(parts)}"


@torch.no_grad()
def measure_base_error(policy: Policy, objective: Objective, task: EditTask, config: Config) -> BaseError:
    """Measure it on a task; needs `policy.originals`, and lets them go."""
    policy = policy.at(task.shape)
    sigmas = policy.sigmas(config.rollout.num_steps)
    with policy.adapters.use("off"), torch.compiler.set_stance("force_eager"):
        rollout = roll_out(
            policy, [task], objective.schedule(sigmas, 0), NoiseSource(seed=config.run.seed, step=0), config.rollout,
            num_turns=1, group_size=NUM_ROWS, cfg_scale=config.model.cfg_scale if config.rollout.is_guided else 1.0,
        )  # fmt: skip
        last = len(rollout.schedule.table) - 1
        steps = sorted({0, last // 2, last, *rollout.schedule.trained_steps[-1:]})
        linears = Linears()
        pairs = [_both(policy, rollout, step, linears) for step in steps]
    policy.originals.clear()
    figures = {"base/velocity": sum(_relative(quantised, original) for quantised, original in pairs) / len(pairs)}
    log_probs = [_log_prob(rollout, step, *pair) for step, pair in zip(steps, pairs, strict=True)]
    if noisy := [difference for difference in log_probs if difference is not None]:
        figures["base/log_prob"] = max(noisy) / config.objective.clip_range
    worst = {}
    for name, values in (("base/outlier", linears.outlier), ("base/linear", linears.error)):
        worst[name], figures[name] = max(values.items(), key=lambda item: item[1])
    return BaseError(figures=figures, worst=worst)


@dataclass(frozen=True, kw_only=True)
class Linears:
    """What the original's forward passes said of each linear: the largest of them."""

    outlier: dict[str, float] = field(default_factory=dict)
    error: dict[str, float] = field(default_factory=dict)

    def see(self, name: str, x: Tensor, quantised: Tensor, original: Tensor) -> None:
        """Take note of a linear's input (..., in) and of both outputs (..., out)."""
        channels = x.flatten(0, -2).abs().amax(0).float()
        found = (channels.max() / channels.median().clamp(min=1e-12)).item()
        self.outlier[name] = max(self.outlier.get(name, 0.0), found)
        self.error[name] = max(self.error.get(name, 0.0), _relative(quantised, original))


@contextmanager
def _original_weights(policy: Policy, linears: Linears) -> Iterator[None]:
    """Let the transformer's quantised linears compute with their original weights, within the context."""

    def hook(name: str, weight: Tensor) -> torch.utils.hooks.RemovableHandle:
        module = policy.pipeline.transformer.get_submodule(name)
        module = getattr(module, "base", module)  # of a linear that is adapted

        def replace(module: nn.Linear, given: tuple[Tensor], output: Tensor) -> Tensor:
            original = nn.functional.linear(given[0], weight.to(output), module.bias)
            linears.see(name, given[0], output, original)
            return original

        return module.register_forward_hook(replace)

    handles = [hook(name, weight) for name, weight in policy.originals.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _both(policy: Policy, rollout: Rollout, step: int, linears: Linears) -> tuple[Tensor, Tensor]:
    """Velocities (B, L, C) at a step of the rollout: by the quantised base, and by the original."""
    turn, sigma = rollout.turns[0], rollout.schedule.sigmas[step].expand(NUM_ROWS)
    quantised = policy.velocity(turn.latents[step], sigma, turn.condition)
    with _original_weights(policy, linears):
        original = policy.velocity(turn.latents[step], sigma, turn.condition)
    return quantised, original


def _log_prob(rollout: Rollout, step: int, quantised: Tensor, original: Tensor) -> float | None:
    """The largest difference of the log-probs of what the rollout went to; None at an ODE step."""
    if not rollout.schedule.is_noisy[step]:
        return None
    latents = rollout.turns[0].latents
    both = [
        sde_log_prob(v, latents[step], latents[step + 1], rollout.schedule.table, step) for v in (quantised, original)
    ]
    return (both[0] - both[1]).abs().max().item()


def _relative(value: Tensor, true: Tensor) -> float:
    return ((value.float() - true.float()).norm() / true.float().norm().clamp(min=1e-12)).item()
