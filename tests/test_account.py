"""The account of an iteration: work by the count of FLOPs, rates from seconds, the same on every number of ranks."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mteditflow.config import Config, ObjectiveConfig
from mteditflow.objective import build_objective
from mteditflow.plan import flops
from mteditflow.plan.flops import ForwardFlops, matmul_ceiling
from mteditflow.policy import build_policy
from mteditflow.profile import account as module
from mteditflow.profile.account import Account, count_work, metric, row_flops, speed_figures
from mteditflow.record.clock import OTHER, PHASES, phase

ROW = ForwardFlops(linear=5e12, attention=1e12, other=2e12)  # 8 TFLOP forward, 7 backward
SECONDS: dict[str, float] = dict(
    zip((*PHASES, OTHER), (1.0, 2.0, 32.0, 5.0, 6.0, 20.0, 3.0, 100.0, 50.0, 1.0), strict=True)
)


def test_work_of_an_iteration(tiny_config: Config) -> None:
    """2 tasks x 2 trajectories x 2 turns: x 3 steps rolled out; 5 of the 16 transitions had an advantage."""
    assert count_work(tiny_config, ROW, 5) == {"denoise": 24 * 8, "forward, backward": 5 * (8 + 7)}
    assert count_work(tiny_config, ROW, 5, num_ranks=2) == {"denoise": 12 * 8, "forward, backward": 5 * (8 + 7)}
    with_reference = replace(tiny_config, objective=ObjectiveConfig(name="grpo", kl_beta=0.1))
    assert count_work(with_reference, ROW, 5)["forward, backward"] == 5 * (2 * 8 + 7)
    full = replace(tiny_config, lora=replace(tiny_config.lora, is_full=True))
    assert count_work(full, ROW, 5)["forward, backward"] == 5 * (8 + 7 + 7)
    guided = replace(tiny_config, model=replace(tiny_config.model, cfg_scale=4.0))
    assert count_work(guided, ROW, 5)["denoise"] == 24 * 8 * (2 if guided.rollout.is_guided else 1)


def test_rates() -> None:
    work = {"denoise": 64.0, "forward, backward": 100.0}
    assert speed_figures(SECONDS, work, 10.0, 35) == {
        "speed/turn_images_per_second": 0.5,  # 70 s, the evaluation and the checkpoint aside
        "speed/rollout_images_per_second": 0.875,  # 40 s
        "speed/denoise_tflop_per_second": 2, "speed/training_tflop_per_second": 5,
        "speed/denoise_ceiling_share": 0.2, "speed/training_ceiling_share": 0.5,
        "speed/ceiling_tflop_per_second": 10,
    }  # fmt: skip
    idle = speed_figures(SECONDS | {"forward, backward": 0.0}, work | {"forward, backward": 0.0}, 10.0, 35)
    assert math.isnan(idle["speed/training_tflop_per_second"]) and math.isnan(idle["speed/training_ceiling_share"])


def test_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 x 512^3 operations in 0.5 s, the median of 10 times; those of the warm-up do not count. No random state."""
    took = [9.0] * 3 + [0.25] * 5 + [0.75] * 5
    times = iter([at for i, seconds in enumerate(took) for at in (16.0 * i, 16.0 * i + seconds)])
    monkeypatch.setattr(flops.time, "perf_counter", lambda: next(times))
    before = torch.get_rng_state()
    assert matmul_ceiling(torch.device("cpu"), torch.float32) == pytest.approx(2 * 512**3 / 0.5 / 1e12, rel=1e-12)
    assert torch.equal(torch.get_rng_state(), before)


class Meter:
    """Of a GPU that took 0.002 kWh."""

    def __enter__(self) -> "Meter":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def read(self) -> dict[str, float]:
        return {"gpu/power_w": 600.0, "gpu/energy_kwh": 0.002}


def test_the_account_of_a_run(tiny_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks: 8 turn-images, of which this GPU makes 4, and 4 / 0.002 per kWh."""
    policy: Any = build_policy(tiny_config.model, tiny_config.lora, 0, has_old=build_objective(tiny_config).has_old)
    ticks = SimpleNamespace(at=0.0)

    def clock(device: torch.device) -> module.Clock:
        assert device == policy.device
        return original(device, lambda: ticks.at)

    original = module.Clock
    monkeypatch.setattr(module, "Clock", clock)
    monkeypatch.setattr(module, "matmul_ceiling", lambda device, dtype: 2e-6)
    for meter in (None, Meter()):
        monkeypatch.setattr(module, "open_meter", lambda device, meter=meter: meter)
        with Account(tiny_config, policy, 2) as account:
            for name in PHASES:
                with phase(name):
                    ticks.at += SECONDS[name]
            ticks.at += SECONDS[OTHER]
            figures = account.read(5)
        assert {name: figures[metric("time", name)] for name in SECONDS} == SECONDS
        work = count_work(tiny_config, row_flops(tiny_config, policy), 5, 2)
        assert figures["speed/denoise_tflop_per_second"] == work["denoise"] / 32 > 0
        assert figures["speed/training_ceiling_share"] == work["forward, backward"] / 20 / 2e-6
        assert figures["speed/turn_images_per_second"] == 4 / 70
        assert figures.get("gpu/turn_images_per_kwh") == (2000 if meter else None)
        assert any(name.startswith("gpu/") for name in figures) == bool(meter)
        assert not any(name.startswith("beside/") for name in figures)
