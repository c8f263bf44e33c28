"""The reference ops against torch.distributions, closed-form gradients, finite differences, and other batches."""

import math
from collections.abc import Iterator

import closed_forms
import pytest
import torch
from mteditflow_kernels import (
    C_V,
    C_X,
    KL_EXACT,
    KL_PUBLISHED,
    STD,
    counter_normal,
    grpo_loss,
    nft_loss,
    noise_keys,
    noised,
    sde_log_prob,
    sde_step,
)
from mteditflow_kernels.reference import row_mean
from torch import Tensor

from mteditflow.config import Config, ObjectiveConfig
from mteditflow.flow import sigma_schedule, step_table
from mteditflow.objective import Nft
from mteditflow.objective.grpo import clipped_loss
from mteditflow.objective.nft import contrastive_loss
from mteditflow.types import Condition, Transitions

SHAPE = (4, 3, 5)  # B, L, C
D = 15
STEP = torch.tensor([0, 1, 5, 10])
SIGMAS = sigma_schedule(12, 1024)
F64 = 1e-12  # float64 rounding, 2e-16, of sums of 15 terms of order 1 and std down to 0.2, with room


def make_table(rule: str = "sde") -> Tensor:
    return step_table(SIGMAS, noise_level=0.9, rule=rule)


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make_keys(num_rows: int) -> Tensor:
    rows = torch.arange(num_rows)
    return noise_keys(seed=0, step=1, task=rows, trajectory=rows, turn=0, denoising_step=3)


def make_step(dtype: torch.dtype = torch.float64, rule: str = "sde") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """velocity, latents, next_latents, log_prob of four rows at four denoising steps."""
    velocity, latents = draw(0, *SHAPE, dtype=dtype), draw(1, *SHAPE, dtype=dtype)
    return velocity, latents, *sde_step(velocity, latents, make_table(rule), STEP, make_keys(4))


def column(values: Tensor) -> Tensor:
    return values[:, None, None]


def mean_and_std(velocity: Tensor, latents: Tensor, rule: str = "sde") -> tuple[Tensor, Tensor]:
    rows = make_table(rule).double()[STEP]
    return column(rows[:, C_X]) * latents + column(rows[:, C_V]) * velocity, column(rows[:, STD])


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_log_prob_is_the_normal_density() -> None:
    velocity, latents, next_latents, log_prob = make_step()
    mean, std = mean_and_std(velocity, latents)
    expected = torch.distributions.Normal(mean, std).log_prob(next_latents).mean((1, 2))
    # scale and const of the table are float32 (relative 6e-8) of terms up to 1/2 chi^2 = 3 and 2
    torch.testing.assert_close(log_prob, expected, rtol=0, atol=5e-7)


def test_step_is_mean_plus_noise() -> None:
    velocity, latents, next_latents, _ = make_step()
    mean, std = mean_and_std(velocity, latents)
    noise = counter_normal(make_keys(4), SHAPE[1:]).double()
    torch.testing.assert_close(next_latents, mean + std * noise, rtol=0, atol=F64)


def test_cps_log_prob_is_minus_the_mean_square() -> None:
    velocity, latents, next_latents, log_prob = make_step(rule="cps")
    mean, _ = mean_and_std(velocity, latents, "cps")
    torch.testing.assert_close(log_prob, -(next_latents - mean).square().mean((1, 2)), rtol=0, atol=F64)


def test_guard_ratio_is_linear_in_the_velocity() -> None:
    """GRPO-Guard's log ratio is mean_d eps (mean - mean_old): no step's scale, no bias below 1."""
    velocity, latents, next_latents, old_log_prob = make_step()
    moved = velocity + draw(6, *SHAPE)
    for row in range(4):
        own = slice(row, row + 1)
        _, figures = grpo_loss(
            moved[own], latents[own], next_latents[own], old_log_prob[own], torch.ones(1).double(), make_table(),
            STEP[own], clip_range=1.0, old_velocity=velocity[own],
        )  # fmt: skip
        noise = counter_normal(make_keys(4), SHAPE[1:]).double()[own]
        c_v = make_table().double()[STEP[own], C_V]
        expected = torch.exp((noise * c_v * (moved - velocity)[own]).mean())
        # the table's scale, float32, is 1 / (2 std^2) to 6e-8; log-probs of up to 100 carry that into the ratio
        torch.testing.assert_close(figures["ratio_mean"], expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_step_gives_the_log_prob_of_what_it_stores(dtype: torch.dtype) -> None:
    velocity, latents, next_latents, log_prob = make_step(dtype)
    assert next_latents.dtype == dtype
    assert log_prob.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(sde_log_prob(velocity, latents, next_latents, make_table(), STEP), log_prob)


def test_ode_rows() -> None:
    velocity, latents = draw(0, *SHAPE), draw(1, *SHAPE)
    table = step_table(SIGMAS, noise_level=0.9, noisy_steps=(1, 5))
    next_latents, log_prob = sde_step(velocity, latents, table, STEP, make_keys(4))
    ode = latents + velocity * column(SIGMAS.diff().float().double()[STEP])
    assert torch.equal(next_latents[[0, 3]], ode[[0, 3]])
    assert log_prob.isnan().tolist() == [True, False, False, True]
    one_step, none = sde_step(velocity, latents, table, 0, make_keys(4))
    assert torch.equal(one_step, latents + velocity * SIGMAS.diff().float().double()[0]) and none.isnan().all()


# 65536 is D at 512 px: there torch's own mean of one row splits over threads, and gives other bits than in a batch
@pytest.mark.parametrize("num_elements", [63, 1024, 4097, 65536])
def test_a_row_has_the_same_bits_in_every_batch(num_elements: int, two_threads: None) -> None:
    table = make_table()
    velocity, latents = draw(2, 16, num_elements, dtype=torch.float32), draw(3, 16, num_elements, dtype=torch.float32)
    keys, step = make_keys(16), torch.arange(16) % 11
    next_latents, log_prob = sde_step(velocity, latents, table, step, keys)
    for num_rows in (1, 3):
        for start in range(0, 16 - num_rows, 4):
            at = slice(start, start + num_rows)
            part = sde_step(velocity[at], latents[at], table, step[at], keys[at])
            assert torch.equal(part[0], next_latents[at]) and torch.equal(part[1], log_prob[at])
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(
        sde_log_prob(velocity[order], latents[order], next_latents[order], table, step[order]), log_prob[order]
    )


@pytest.mark.parametrize("num_elements", [1, 2, 63, 1024, 4097])
def test_row_mean(num_elements: int) -> None:
    values = draw(4, 3, num_elements, dtype=torch.float32)
    exact = values.double().mean(1)
    # a tree of depth log2 D: at most that many roundings of 6e-8, and the division's
    bound = (math.ceil(math.log2(num_elements)) + 1) * 2.0**-24 * values.double().abs().mean(1)
    assert ((row_mean(values).double() - exact).abs() <= bound).all()
    assert torch.autograd.gradcheck(row_mean, draw(5, 2, min(num_elements, 63)).requires_grad_())


def test_log_prob_gradient_is_the_closed_form() -> None:
    for rule in ("sde", "cps"):
        velocity, latents, next_latents, _ = make_step(rule=rule)
        velocity.requires_grad_()
        (grad,) = torch.autograd.grad(
            sde_log_prob(velocity, latents, next_latents, make_table(rule), STEP).sum(), velocity
        )
        mean, std = mean_and_std(velocity.detach(), latents, rule)
        c_v = column(make_table(rule).double()[STEP, C_V])
        expected = c_v * (next_latents - mean) / D * (1 / std**2 if rule == "sde" else 2)
        # 1/(2 s^2) is a float32 column: 6e-8 relative, and s squared beside it twice that
        torch.testing.assert_close(grad, expected, rtol=3e-7, atol=0)


def moved(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As make_step, with another velocity than the one that made the step: ratios differ from 1 by some percent."""
    velocity, latents, next_latents, log_prob = make_step()
    return velocity + 0.02 * draw(seed, *SHAPE), latents, next_latents, log_prob


ADVANTAGE = torch.tensor([1.5, -0.7, 0.4, -2.0], dtype=torch.float64)


@pytest.mark.parametrize("kl_form", ["published", "exact"])
@pytest.mark.parametrize("clip_range", [1e-3, 0.5])
def test_grpo_gradient_is_the_closed_form(kl_form: str, clip_range: float) -> None:
    velocity, latents, next_latents, old_log_prob = moved(9)
    reference, table, kl_beta = draw(7, *SHAPE), make_table(), 0.3
    velocity.requires_grad_()

    def loss_of(velocity: Tensor) -> Tensor:
        return grpo_loss(
            velocity, latents, next_latents, old_log_prob, ADVANTAGE, table, STEP,
            clip_range=clip_range, kl_beta=kl_beta, ref_velocity=reference, kl_form=kl_form,
        )[0]  # fmt: skip

    (grad,) = torch.autograd.grad(loss_of(velocity), velocity)
    at = velocity.detach()
    expected, is_clipped = closed_forms.grpo_gradient(
        velocity=at, latents=latents, next_latents=next_latents, ref_velocity=reference,
        ratio=torch.exp(sde_log_prob(at, latents, next_latents, table, STEP) - old_log_prob), advantage=ADVANTAGE,
        weight=torch.full((4,), 0.25), coefficients=table[STEP], clip_range=clip_range, kl_beta=kl_beta,
        kl_scale=1.0 if kl_form == "exact" else -SIGMAS.diff()[STEP],
    )  # fmt: skip
    assert is_clipped.any() == (clip_range < 0.1) and not is_clipped.all()
    # float32 columns: 3e-7 relative of each of the two terms, whose sum may cancel; they are of order 0.1
    torch.testing.assert_close(grad, expected, rtol=3e-7, atol=1e-8)
    assert torch.autograd.gradcheck(loss_of, velocity)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_ratio_is_exactly_one_before_the_update(dtype: torch.dtype) -> None:
    velocity, latents, next_latents, old_log_prob = make_step(dtype)
    loss, diagnostics = grpo_loss(
        velocity, latents, next_latents, old_log_prob, ADVANTAGE.float(), make_table(), STEP, clip_range=1e-4
    )
    assert diagnostics["ratio_mean"] == 1 and diagnostics["ratio_error"] == 0
    assert diagnostics["clip_fraction"] == 0 and diagnostics["approx_kl"] == 0 and diagnostics["kl"] == 0
    assert loss.item() == pytest.approx(-ADVANTAGE.mean().item(), rel=1e-6)  # four float32 additions


def test_grpo_diagnostics() -> None:
    velocity, latents, next_latents, old_log_prob = moved(9)
    reference, table = draw(7, *SHAPE), make_table()
    ratio = torch.exp(sde_log_prob(velocity, latents, next_latents, table, STEP) - old_log_prob)
    arguments = (velocity, latents, next_latents, old_log_prob, ADVANTAGE, table, STEP)
    loss, diagnostics = grpo_loss(*arguments, clip_range=1e-3, kl_beta=0.3, ref_velocity=reference)
    policy = torch.maximum(-ADVANTAGE * ratio, -ADVANTAGE * ratio.clamp(0.999, 1.001)).mean()
    expected = {
        "ratio_mean": ratio.mean(),
        "ratio_error": (ratio - 1).abs().max(),
        "clip_fraction": ((ratio - 1).abs() > 1e-3).double().mean(),
        "approx_kl": ratio.log().square().mean() / 2,
        "policy_loss": policy,
        "log_prob_difference": ratio.log().abs().max(),
    }
    for name, value in expected.items():
        torch.testing.assert_close(diagnostics[name], value, rtol=0, atol=F64)
    torch.testing.assert_close(loss, policy + 0.3 * diagnostics["kl"], rtol=0, atol=F64)
    assert all(value.ndim == 0 and not value.requires_grad for value in diagnostics.values())


def test_published_kl_is_exact_times_dt() -> None:
    velocity, latents, next_latents, old_log_prob = make_step()
    table, kl = make_table(), {}
    for form in ("published", "exact"):
        kl[form] = torch.stack([
            grpo_loss(
                velocity[i : i + 1], latents[i : i + 1], next_latents[i : i + 1], old_log_prob[i : i + 1],
                ADVANTAGE[i : i + 1], table, STEP[i : i + 1],
                clip_range=1e-3, ref_velocity=draw(7, 1, *SHAPE[1:]), kl_form=form,
            )[1]["kl"]
            for i in range(4)
        ])  # fmt: skip
    # two float32 columns, 6e-8 relative each
    torch.testing.assert_close(kl["published"], kl["exact"] * -SIGMAS.diff()[STEP], rtol=1.3e-7, atol=0)
    mean, std = mean_and_std(velocity[1:2].expand(4, -1, -1), latents)
    other, _ = mean_and_std(draw(7, 1, *SHAPE[1:]).expand(4, -1, -1), latents)
    by_density = ((mean - other).square() / (2 * std**2)).mean((1, 2))[1]  # KL of two normals of equal variance
    torch.testing.assert_close(kl["exact"][1], by_density, rtol=3e-7, atol=0)
    assert table[0, KL_PUBLISHED] != table[0, KL_EXACT]


def make_nft() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """velocity, old velocity, clean latents, noise, sigma."""
    sigma = torch.tensor([0.95, 0.6, 0.3, 0.1], dtype=torch.float64)
    old = draw(10, *SHAPE)
    return old + 0.3 * draw(11, *SHAPE), old, draw(12, *SHAPE), draw(13, *SHAPE), sigma


PROBABILITY = torch.tensor([0.67, 0.5, 0.34, 1.0], dtype=torch.float64)


@pytest.mark.parametrize("beta", [1.0, 0.4])
def test_nft_gradient_is_the_closed_form(beta: float) -> None:
    velocity, old, clean, noise, sigma = make_nft()
    reference, kl_beta, max_advantage = draw(14, *SHAPE), 0.2, 5.0
    velocity.requires_grad_()
    loss, diagnostics = nft_loss(
        velocity, old, clean, noise, sigma, PROBABILITY,
        beta=beta, kl_beta=kl_beta, ref_velocity=reference, max_advantage=max_advantage,
    )  # fmt: skip
    (grad,) = torch.autograd.grad(loss, velocity)
    policy, kl, expected = closed_forms.nft(
        velocity=velocity.detach(), old_velocity=old, clean=clean, noise=noise, ref_velocity=reference, sigma=sigma,
        probability=PROBABILITY, weight=torch.full((4,), 0.25), beta=beta, kl_beta=kl_beta,
        max_advantage=max_advantage,
    )  # fmt: skip
    torch.testing.assert_close(grad, expected, rtol=0, atol=F64)
    torch.testing.assert_close(diagnostics["policy_loss"], policy.mean(), rtol=F64, atol=0)
    torch.testing.assert_close(diagnostics["kl"], kl.mean(), rtol=F64, atol=0)
    torch.testing.assert_close(loss.detach(), policy.mean() + kl_beta * kl.mean(), rtol=F64, atol=0)


def test_nft_gradient_against_finite_differences() -> None:
    velocity, old, clean, noise, sigma = make_nft()
    velocity.requires_grad_()
    (grad,) = torch.autograd.grad(nft_loss(velocity, old, clean, noise, sigma, PROBABILITY, beta=1.0)[0], velocity)
    latents, base = noised(clean, noise, sigma), velocity.detach()
    scales = [(latents - column(sigma) * v - clean).abs().mean((1, 2)) for v in (base, 2 * old - base)]  # held constant

    def frozen(v: Tensor) -> Tensor:
        terms = [(latents - column(sigma) * mix - clean).square().mean((1, 2)) for mix in (v, 2 * old - v)]
        return 5 * (PROBABILITY * terms[0] / scales[0] + (1 - PROBABILITY) * terms[1] / scales[1]).mean()

    direction, size = draw(15, *SHAPE), 1e-4
    slope = (frozen(base + size * direction) - frozen(base - size * direction)) / (2 * size)
    # quadratic in v: central differences are exact up to float64 rounding of a loss of order 10, over 2e-4
    torch.testing.assert_close((grad * direction).sum(), slope, rtol=0, atol=1e-9)


def test_nft_gradient_vanishes_at_the_old_policy() -> None:
    _, old, clean, noise, sigma = make_nft()
    velocity = old.clone().requires_grad_()
    loss, _ = nft_loss(velocity, old, clean, noise, sigma, torch.full((4,), 0.5, dtype=torch.float64), beta=1.0)
    (grad,) = torch.autograd.grad(loss, velocity)
    assert grad.abs().max() < F64


def test_microbatches_add_up() -> None:
    velocity, latents, next_latents, old_log_prob = moved(6)
    reference, table, weight = draw(7, *SHAPE), make_table(), torch.full((4,), 0.25, dtype=torch.float64)

    def grpo_part(at: slice, weight: Tensor | None) -> Tensor:
        arguments = (velocity[at], latents[at], next_latents[at], old_log_prob[at], ADVANTAGE[at], table, STEP[at])
        return grpo_loss(*arguments, clip_range=1e-3, kl_beta=0.3, ref_velocity=reference[at], weight=weight)[0]

    def nft_part(at: slice, weight: Tensor | None) -> Tensor:
        arguments = [tensor[at] for tensor in (*make_nft(), PROBABILITY)]
        return nft_loss(*arguments, beta=1.0, weight=weight)[0]  # pyright: ignore[reportArgumentType, reportCallIssue]

    for part in (grpo_part, nft_part):
        whole = part(slice(None), None)
        parts = part(slice(0, 1), weight[:1]) + part(slice(1, 4), weight[1:])
        torch.testing.assert_close(parts, whole, rtol=F64, atol=0)


def make_transitions(advantage: Tensor) -> tuple[Tensor, Transitions]:
    velocity, latents, next_latents, old_log_prob = moved(6)
    condition = Condition(text={}, image=latents)
    return velocity, Transitions(
        condition=condition, latents=latents, next_latents=next_latents, step=STEP, sigma=SIGMAS[STEP],
        sigma_next=SIGMAS[STEP + 1], old_log_prob=old_log_prob, advantage=advantage,
    )  # fmt: skip


def test_objectives_clamp_the_advantage() -> None:
    config = ObjectiveConfig(clip_range=0.5, max_advantage=2.0)
    losses, nft_losses = [], []
    for scale in (1.0, 10.0):
        velocity, transitions = make_transitions(torch.tensor([2.0, -2.0, 2.0, -2.0], dtype=torch.float64) * scale)
        losses.append(clipped_loss(velocity, transitions, make_table(), config)[0])
        moving, old, clean, noise, sigma = make_nft()
        nft_losses.append(contrastive_loss(moving, old, clean, noise, sigma, transitions.advantage, config)[0])
    assert losses[0] == losses[1] and nft_losses[0] == nft_losses[1]


def test_old_decay() -> None:
    cases = {
        "on_policy": {0: 0, 1000: 0},
        "ramp": {0: 0, 100: 0.1, 900: 0.5},
        "late_ramp": {75: 0, 95: 0.15, 900: 0.999},
    }
    for mode, expected in cases.items():
        objective = Nft(Config(objective=ObjectiveConfig(nft_old_decay=mode)))  # pyright: ignore[reportArgumentType]
        assert {n: objective.old_decay(n) for n in expected} == pytest.approx(expected)


def test_a_penalty_without_a_reference_is_an_error() -> None:
    velocity, transitions = make_transitions(ADVANTAGE)
    with pytest.raises(ValueError, match="ref_velocity"):
        clipped_loss(velocity, transitions, make_table(), ObjectiveConfig(kl_beta=0.1))
    moving, old, clean, noise, sigma = make_nft()
    with pytest.raises(ValueError, match="ref_velocity"):
        contrastive_loss(moving, old, clean, noise, sigma, ADVANTAGE, ObjectiveConfig(kl_beta=0.1))
