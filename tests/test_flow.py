"""Schedules and coefficient tables against the published numbers and the equations."""

import math
import re

import pytest
import torch
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from mteditflow_kernels import C_V, C_X, KL_EXACT, KL_PUBLISHED, LOG_PROB_CONST, LOG_PROB_SCALE, NUM_COLUMNS, STD

from mteditflow.config.cli import from_overrides
from mteditflow.flow import noisy_steps, second_order, sigma_schedule, step_table, window_steps
from mteditflow.objective import build_objective

SIGMAS_12 = [1, 0.953819, 0.903736, 0.849235, 0.789705, 0.724416, 0.652489]
SIGMAS_12 += [0.572860, 0.484218, 0.384945, 0.273003, 0.145804, 0]
SDE_ROWS = [  # step, sigma, std, c_x, c_v at noise_level 0.9
    (0, 1, 0.900000, 0.595000, -0.046181),
    (1, 0.953819, 0.915349, 0.560785, -0.070367),
    (5, 0.724416, 0.391339, 0.894297, -0.101056),
    (10, 0.273003, 0.196699, 0.929139, -0.178715),
    (11, 0.145804, 0.141982, 0.930870, -0.204855),
]
# the published numbers have six decimals (5e-7), and the table is float32 below 1 (6e-8)
PUBLISHED = 6e-7
FLOAT32 = 2.0**-23  # relative error of a float64 number rounded to float32, doubled for the float64 work


def test_schedule_of_twelve_steps() -> None:
    sigmas = sigma_schedule(12, 1024)
    assert sigmas.dtype == torch.float64 and sigmas[0] == 1 and sigmas[-1] == 0
    torch.testing.assert_close(sigmas, torch.tensor(SIGMAS_12, dtype=torch.float64), rtol=0, atol=PUBLISHED)


@pytest.mark.parametrize(("num_tokens", "mu"), [(256, 0.5), (4096, 1.15)])
def test_schedule_shift_at_its_two_anchors(num_tokens: int, mu: float) -> None:
    # at s = 1/2 sigma is the logistic function of mu
    assert sigma_schedule(2, num_tokens)[1].item() == pytest.approx(1 / (1 + math.exp(-mu)), rel=1e-14)


@pytest.mark.parametrize(("step", "sigma", "std", "c_x", "c_v"), SDE_ROWS)
def test_sde_rows(step: int, sigma: float, std: float, c_x: float, c_v: float) -> None:
    sigmas = sigma_schedule(12, 1024)
    row = step_table(sigmas, noise_level=0.9).double()[step]
    assert sigmas[step].item() == pytest.approx(sigma, abs=PUBLISHED)
    assert row[[STD, C_X, C_V]].tolist() == pytest.approx([std, c_x, c_v], abs=PUBLISHED)


def test_sde_log_prob_and_kl_columns() -> None:
    sigmas = sigma_schedule(12, 1024)
    table = step_table(sigmas, noise_level=0.9)
    assert table.shape == (12, NUM_COLUMNS) and table.dtype == torch.float32
    table = table.double()
    torch.testing.assert_close(table[:, LOG_PROB_SCALE], 1 / (2 * table[:, STD] ** 2), rtol=4 * FLOAT32, atol=0)
    const = -table[:, STD].log() - 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(table[:, LOG_PROB_CONST], const, rtol=0, atol=4 * FLOAT32)  # values below 2
    assert torch.equal(table[:, KL_EXACT], table[:, LOG_PROB_SCALE])
    # exact |dt| = published
    torch.testing.assert_close(table[:, KL_EXACT] * -sigmas.diff(), table[:, KL_PUBLISHED], rtol=2 * FLOAT32, atol=0)


def test_sde_keeps_the_marginal() -> None:
    """Where x = (1 - sigma) x0 + sigma eps, next_latents have sigma_next's share of x0 and variance, to first order."""
    sigmas = torch.linspace(0.6, 0.599, 2, dtype=torch.float64)
    row = step_table(sigmas, noise_level=0.5).double()[0]
    sigma, sigma_next = sigmas.tolist()
    clean = row[C_X] * (1 - sigma) - row[C_V]
    variance = (row[C_X] * sigma + row[C_V]) ** 2 + row[STD] ** 2
    # errors are second order: dt^2 = 1e-6 times coefficients of order 1
    assert clean.item() == pytest.approx(1 - sigma_next, abs=1e-6)
    assert variance.item() == pytest.approx(sigma_next**2, abs=1e-6)


def test_first_sigma_of_a_float32_schedule() -> None:
    sigmas = sigma_schedule(12, 1024)
    rounded = sigmas.clone()
    rounded[0] = 1 - 2.0**-24
    # sigma differs by 6e-8, so do the coefficients of order 1; without the guard std_t would be 4000
    torch.testing.assert_close(
        step_table(rounded, noise_level=0.9)[0], step_table(sigmas, noise_level=0.9)[0], rtol=1e-5, atol=1e-6
    )


def test_cps_rows_against_the_equations() -> None:
    sigmas, level = sigma_schedule(12, 1024), 0.7
    table = step_table(sigmas, noise_level=level, rule="cps").double()
    x, v = 0.3, -1.1
    for i, (sigma, sigma_next) in enumerate(zip(sigmas[:-2].tolist(), sigmas[1:-1].tolist(), strict=True)):
        std = sigma_next * math.sin(level * math.pi / 2)
        clean, noise = x - sigma * v, x + (1 - sigma) * v
        mean = (1 - sigma_next) * clean + math.sqrt(sigma_next**2 - std**2) * noise
        row = table[i]
        # three float32 coefficients of at most 1, times at most 1.1
        assert (row[C_X] * x + row[C_V] * v).item() == pytest.approx(mean, abs=3 * FLOAT32)
        assert row[STD].item() == pytest.approx(std, rel=FLOAT32)
        assert row[[LOG_PROB_SCALE, LOG_PROB_CONST]].tolist() == [1, 0]
        assert row[[KL_PUBLISHED, KL_EXACT]].tolist() == pytest.approx([1 / (2 * std**2)] * 2, rel=FLOAT32)
    assert torch.equal(table[-1], step_table(sigmas, noise_level=0).double()[-1])  # its last step has no noise


@pytest.mark.parametrize("rule", ["sde", "cps"])
def test_ode_steps(rule: str) -> None:
    sigmas = sigma_schedule(8, 16)
    ode = step_table(sigmas, noise_level=0, rule=rule).double()
    expected = torch.zeros(8, NUM_COLUMNS, dtype=torch.float64)
    expected[:, C_X], expected[:, C_V] = 1, sigmas.diff()
    torch.testing.assert_close(ode, expected, rtol=FLOAT32, atol=0)
    mixed = step_table(sigmas, noise_level=0.5, rule=rule, noisy_steps=(2, 3)).double()
    everywhere = step_table(sigmas, noise_level=0.5, rule=rule).double()
    for i in range(8):
        assert torch.equal(mixed[i], everywhere[i] if i in (2, 3) else ode[i])


def test_cps_goes_to_the_ode_as_the_noise_vanishes() -> None:
    sigmas = sigma_schedule(8, 16)
    quiet = step_table(sigmas, noise_level=1e-5, rule="cps")[:, [C_X, C_V]]
    # sqrt(sigma_next^2 - std^2) departs by std^2 / 2 = 1e-10; the rest is float32 rounding
    torch.testing.assert_close(quiet, step_table(sigmas, noise_level=0)[:, [C_X, C_V]], rtol=0, atol=2 * FLOAT32)


def test_window_without_size_trains_all_but_the_last() -> None:
    trained = window_steps(8, 0, "random", 3, 10, 0)
    assert trained == tuple(range(7))
    assert noisy_steps(8, 0, trained) == tuple(range(8))


def test_random_window() -> None:
    windows = [window_steps(8, 2, "random", i, 1000, 5) for i in range(1000)]
    starts = [window[0] for window in windows]
    assert all(window == (start, start + 1) for window, start in zip(windows, starts, strict=True))
    for start in range(6):
        # binomial(1000, 1/6): standard deviation 11.8; five of them
        assert abs(starts.count(start) - 1000 / 6) < 59
    assert set(starts) == set(range(6))
    assert windows[:20] == [window_steps(8, 2, "random", i, 1000, 5) for i in range(20)]
    assert windows[:20] != [window_steps(8, 2, "random", i, 1000, 6) for i in range(20)]
    assert noisy_steps(8, 2, windows[0]) == windows[0]


def test_progressive_window() -> None:
    starts = [window_steps(8, 2, "progressive", i, 11, 0)[0] for i in range(11)]
    assert starts[0] == 0 and starts[-1] == 5 and starts == sorted(starts)
    assert window_steps(8, 2, "progressive", 0, 1, 0) == (0, 1)
    assert window_steps(8, 7, "progressive", 9, 10, 0) == tuple(range(7))


def test_the_range_of_a_window() -> None:
    """Flow-GRPO's random.randint(first, end - size); [0, 6] is the first half of 12."""
    starts = [window_steps(12, 2, "random", i, 1000, 5, (0, 6))[0] for i in range(1000)]
    for start in range(5):
        # binomial(1000, 1/5): standard deviation 12.6; five of them
        assert abs(starts.count(start) - 1000 / 5) < 63
    assert set(starts) == set(range(5))
    assert [window_steps(12, 2, "progressive", i, 4, 0, (3, 8)) for i in range(4)] == [(3, 4), (4, 5), (5, 6), (6, 7)]
    assert {window_steps(12, 2, "random", i, 9, 0, (4, 6)) for i in range(20)} == {(4, 5)}
    for wrong in ((0, 12), (-1, 4), (3, 4), (6, 3)):
        with pytest.raises(ValueError, match="window_size is 2: must fit in steps"):
            window_steps(12, 2, "random", 0, 1, 0, wrong)


def test_iterations_of_a_window() -> None:
    """MixGRPO's: by one every iters_per_window iterations, and from the last place back to the first (--roll_back)."""
    starts = [window_steps(6, 2, "progressive", i, 1000, 0, (), 3)[0] for i in range(15)]
    assert starts == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3 + [0] * 3
    starts = [window_steps(6, 2, "progressive", i, 1000, 0, (1, 4), 2)[0] for i in range(8)]
    assert starts == [1, 1, 2, 2, 1, 1, 2, 2]


def test_the_kl_of_cps_is_the_public_code_s() -> None:
    """Flow-CPS, scripts/train_flux_kontext.py: mean((mean - mean_ref)^2) / (2 std_dev_t^2)."""
    sigmas, a = sigma_schedule(8, 16), 0.7
    table = step_table(sigmas, noise_level=a, rule="cps").double()
    x, v, v_ref = torch.randn(3, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for i in range(7):
        sigma, sigma_next = sigmas[i], sigmas[i + 1]
        std = sigma_next * math.sin(a * math.pi / 2)
        mean, mean_ref = (
            (x - sigma * u) * (1 - sigma_next) + (x + (1 - sigma) * u) * (sigma_next**2 - std**2).sqrt()
            for u in (v, v_ref)
        )
        kl = (mean - mean_ref).square().mean() / (2 * std**2)
        ours = table[i, C_V] ** 2 * (v - v_ref).square().mean()
        for column in (KL_PUBLISHED, KL_EXACT):
            torch.testing.assert_close(table[i, column] * ours, kl, rtol=10 * FLOAT32, atol=0)


def test_a_window_that_cannot_be_is_refused() -> None:
    """Field, value and remedy; without GRPO there is no window."""
    grpo = {"objective.name": "grpo", "rollout.num_steps": 12, "rollout.window_size": 2}
    for wrong in ([0, 12], [5, 6], [-1, 4], [3], [1, 2, 3], [6, 3]):
        with pytest.raises(
            ValueError, match=rf"rollout\.window_range is {re.escape(str(wrong))}: must be \[first, end\]"
        ):
            from_overrides(grpo | {"rollout.window_range": wrong})
    with pytest.raises(ValueError, match=r"rollout\.window_range is \[0, 6\]: .* room for window_size, 0, above 0"):
        from_overrides(grpo | {"rollout.window_range": [0, 6], "rollout.window_size": 0})
    with pytest.raises(ValueError, match=r"rollout\.window_range is 'first': must be a list of whole numbers"):
        from_overrides(grpo | {"rollout.window_range": "first"})
    with pytest.raises(ValueError, match=r"rollout\.iters_per_window is 25: is of a window that moves"):
        from_overrides(grpo | {"rollout.iters_per_window": 25})
    with pytest.raises(ValueError, match=r"rollout\.is_start_shared is True: NFT rolls out the ODE"):
        from_overrides({"rollout.is_start_shared": True})
    assert from_overrides({"rollout.window_range": [0, 99], "rollout.iters_per_window": 3}).objective.name == "nft"
    moving = {"rollout.window_placement": "progressive", "rollout.iters_per_window": 25, "rollout.window_range": [0, 6]}
    objective, sigmas = build_objective(from_overrides(grpo | moving)), sigma_schedule(12, 16)
    assert objective.schedule(sigmas, 24).trained_steps == (0, 1) and objective.schedule(sigmas, 25).trained_steps == (
        1,
        2,
    )
    assert objective.schedule(sigmas, 5 * 25).trained_steps == (0, 1)


def test_wrong_values_are_named() -> None:
    sigmas = sigma_schedule(8, 16)
    with pytest.raises(ValueError, match="rule"):
        step_table(sigmas, noise_level=0.5, rule="euler")
    with pytest.raises(ValueError, match="noise_level"):
        step_table(sigmas, noise_level=1.5, rule="cps")
    with pytest.raises(ValueError, match="noisy_steps"):
        step_table(sigmas, noise_level=0.5, noisy_steps=[8])
    with pytest.raises(ValueError, match="sigmas"):
        step_table(sigmas.flip(0), noise_level=0.5)
    with pytest.raises(ValueError, match="placement"):
        window_steps(8, 2, "middle", 0, 1, 0)
    with pytest.raises(ValueError, match="window_size"):
        window_steps(8, 8, "random", 0, 1, 0)


def test_second_order_is_that_of_diffusers() -> None:
    """Velocity plus correction in an Euler step, against DPMSolverMultistepScheduler, on any velocity."""
    sigmas = sigma_schedule(6, 1024)
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=2, final_sigmas_type="zero"
    )
    scheduler.set_timesteps(6)
    scheduler.sigmas = sigmas
    factors, previous = second_order(sigmas), torch.zeros(5)
    assert [factor != 0 for factor in factors] == [False, False, True, True, True, False]
    own = theirs = torch.linspace(-1, 1, 5).double()
    for i, timestep in enumerate(scheduler.timesteps):
        velocity = torch.sin(3 * own + i)
        estimate = own - sigmas[i] * velocity
        corrected = velocity + factors[i] * (estimate - previous)
        own, previous = own + corrected * (sigmas[i + 1] - sigmas[i]), estimate
        theirs = scheduler.step(torch.sin(3 * theirs + i), timestep, theirs, return_dict=False)[0]
        # float64; diffusers casts nothing here but computes through exp and log of the signal-to-noise ratio
        torch.testing.assert_close(own, theirs, rtol=0, atol=1e-6)


def test_second_order_converges_faster() -> None:
    """The ODE of one normal image, N(0, 1/4): x at sigma is a known multiple of x at 1."""

    def error(num_steps: int, is_second: bool) -> float:
        sigmas = torch.linspace(0.99, 0.01, num_steps + 1, dtype=torch.float64)
        std = torch.sqrt((1 - sigmas) ** 2 / 4 + sigmas**2)
        x, previous, factors = std[0], torch.zeros(()), second_order(sigmas)
        for i in range(num_steps):
            velocity = x * (sigmas[i] - (1 - sigmas[i]) / 4) / std[i] ** 2  # d std / d sigma / std
            estimate = x - sigmas[i] * velocity
            velocity = velocity + (factors[i] if is_second else 0.0) * (estimate - previous)
            x, previous = x + velocity * (sigmas[i + 1] - sigmas[i]), estimate
        return abs((x - std[-1]).item())

    assert 1.8 < error(40, False) / error(80, False) < 2.2
    # less than 4 at these sizes: the last step is of first order
    assert error(40, True) / error(80, True) > 3 and error(40, True) < error(40, False) / 4
