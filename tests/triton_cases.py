"""The Triton ops against the reference in float64, uninitialised memory filled with NaN. `test_triton.py` runs this
file in a process of its own under the interpreter (TRITON_INTERPRET=1), `pytest bench/` on the GPU.
"""

import os
from collections.abc import Callable
from itertools import product

import pytest
import registered_cases
import torch
from mteditflow_kernels import (
    STD,
    counter_normal,
    grpo_loss,
    nft_loss,
    philox,
    reference,
    sde_log_prob,
    sde_step,
    use_backend,
)
from mteditflow_kernels.triton_common import NORMAL_ERROR
from near import ROUNDING, ROW_ROUNDING, assert_near, draw, gradient, make_keys
from torch import Tensor

from mteditflow.flow import sigma_schedule, step_table

torch.use_deterministic_algorithms(True)  # fills what `torch.empty` returns with NaN
use_backend("triton")
if "TRITON_INTERPRET" not in os.environ:
    torch.set_default_device("cuda")

SIGMAS = sigma_schedule(12, 1024)
SHAPES = [(1, 4097), (3, 63), (16, 1), (3, 5, 7)]
DTYPES = list(ROUNDING)


def steps_of(rule: str, num_rows: int) -> list[int | Tensor]:
    """The first step, one in the middle, the last noisy one, and another one for each row."""
    last = 11 if rule == "sde" else 10
    return [0, 5, last, torch.arange(num_rows) % (last + 1)]


@pytest.mark.parametrize("num_elements", [1, 2, 3, 63, 4097])
def test_noise(num_elements: int) -> None:
    keys = make_keys(2)
    difference = counter_normal(keys, (num_elements,)) - philox.counter_normal(keys, (num_elements,))
    assert difference.abs().max() <= NORMAL_ERROR


def test_noise_at_its_ends() -> None:
    """Every quarter turn and the smallest and largest radius occur in so many draws, and the moments are right."""
    noise, twin = (f(make_keys(4, 100), (50_000,)) for f in (counter_normal, philox.counter_normal))
    assert (noise - twin).abs().max() <= NORMAL_ERROR
    assert abs(noise.mean().item()) < 4 / 200_000**0.5 and abs(noise.var().item() - 1) < 4 * (2 / 200_000) ** 0.5
    assert noise.abs().max() > 4


@pytest.mark.parametrize(("rule", "dtype", "shape"), product(["sde", "cps"], DTYPES, SHAPES))
def test_step_and_log_prob(rule: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    table = step_table(SIGMAS, noise_level=0.9, rule=rule)
    velocity, latents, keys = draw(0, *shape, dtype=dtype), draw(1, *shape, dtype=dtype), make_keys(shape[0])
    for step in steps_of(rule, shape[0]):
        made, log_prob = sde_step(velocity, latents, table, step, keys)
        assert made.dtype == dtype and log_prob.dtype == torch.float32
        exact, _ = reference.sde_step(velocity.double(), latents.double(), table, step, keys)
        eager, _ = reference.sde_step(velocity, latents, table, step, keys)
        noise_error = float(table[step, STD].max()) * NORMAL_ERROR
        assert_near(made, eager, exact, ROUNDING[dtype], extra=noise_error)
        assert torch.equal(sde_log_prob(velocity, latents, made, table, step), log_prob)  # bit for bit
        exact = reference.sde_log_prob(velocity.double(), latents.double(), made.double(), table, step)
        assert_near(log_prob, reference.sde_log_prob(velocity, latents, made, table, step), exact)


def test_an_ode_step_has_no_log_prob() -> None:
    table = step_table(SIGMAS, noise_level=0.9, noisy_steps=(3,))
    velocity, latents = draw(0, 3, 100), draw(1, 3, 100)
    made, log_prob = sde_step(velocity, latents, table, 5, None)
    assert torch.equal(made, reference.sde_step(velocity, latents, table, 5, None)[0]) and log_prob.isnan().all()


def test_a_row_has_the_same_bits_in_every_batch() -> None:
    table, shape = step_table(SIGMAS, noise_level=0.9), (16, 2100)
    velocity, latents, keys = draw(0, *shape), draw(1, *shape), make_keys(16)
    made, log_prob = sde_step(velocity, latents, table, 4, keys)
    order = draw(5, 16).argsort()
    other, other_log_prob = sde_step(velocity[order], latents[order], table, 4, keys[order])
    assert torch.equal(other, made[order]) and torch.equal(other_log_prob, log_prob[order])
    for row in (0, 9):
        own = slice(row, row + 1)
        alone, alone_log_prob = sde_step(velocity[own], latents[own], table, 4, keys[own])
        assert torch.equal(alone, made[own]) and torch.equal(alone_log_prob, log_prob[own])


@pytest.mark.parametrize(("dtype", "shape"), product(DTYPES, SHAPES))
def test_gradient_of_the_log_prob(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    table = step_table(SIGMAS, noise_level=0.9)
    velocity, latents, made = (draw(i, *shape, dtype=dtype) for i in range(3))
    weight = draw(3, shape[0])
    for step in steps_of("sde", shape[0]):
        _, own = gradient(lambda v, s=step: (sde_log_prob(v, latents, made, table, s) * weight).sum(), velocity)
        exact, eager = (
            gradient(
                lambda v, s=step, x=x, y=y: (reference.sde_log_prob(v, x, y, table, s) * weight).sum(), velocity.to(d)
            )[1]
            for x, y, d in ((latents.double(), made.double(), torch.float64), (latents, made, dtype))
        )
        assert_near(own / exact.abs().max(), eager / exact.abs().max(), exact / exact.abs().max(), ROUNDING[dtype])


@pytest.mark.parametrize(("dtype", "shape", "kl_form"), product(DTYPES, SHAPES, ["published", "exact", "guard"]))
def test_grpo(dtype: torch.dtype, shape: tuple[int, ...], kl_form: str) -> None:
    """Rows clipped above and below and not at all, all weights; the loss, every diagnostic and the gradient. The third
    form is GRPO-Guard's ratio.
    """
    table, clip_range = step_table(SIGMAS, noise_level=0.9), 1e-3
    velocity, latents, ref = (draw(i, *shape, dtype=dtype) for i in range(3))
    advantage = torch.tensor([1.0, -2.0, 0.5, -1.0]).repeat(4)[: shape[0]]
    shift = torch.tensor([4e-3, 3e-3, -2e-4, -4e-3, 1e-4]).repeat(4)[: shape[0]]  # none within rounding of the clip
    weights = [None, draw(5, shape[0]).abs()]
    for step, weight in zip(steps_of("sde", shape[0]), weights * 2, strict=True):
        made, old = reference.sde_step(velocity, latents, table, step, make_keys(shape[0]))
        old = old - shift
        figures: dict[object, dict[str, Tensor]] = {}
        old_velocity = velocity + 0.01 * draw(7, *shape, dtype=dtype) if kl_form == "guard" else None

        def run(
            op: Callable, v: Tensor, to: torch.dtype, step=step, weight=weight, made=made, old=old, figures=figures,
            old_velocity=old_velocity,
        ) -> Tensor:  # fmt: skip
            loss, figures[op, to] = op(
                v, latents.to(to), made.to(to), old.to(to if to == torch.float64 else torch.float32), advantage, table,
                step, clip_range=clip_range, kl_beta=0.1, ref_velocity=ref.to(to), weight=weight,
                kl_form="published" if kl_form == "guard" else kl_form,
                old_velocity=None if old_velocity is None else old_velocity.to(to),
            )  # fmt: skip
            return loss

        own = gradient(lambda v: run(grpo_loss, v, dtype), velocity)
        eager = gradient(lambda v: run(reference.grpo_loss, v, dtype), velocity)
        exact = gradient(lambda v: run(reference.grpo_loss, v, torch.float64), velocity.double())
        assert_near(own[0], eager[0], exact[0], extra=ROW_ROUNDING)
        scale = exact[1].abs().max()
        assert_near(own[1] / scale, eager[1] / scale, exact[1] / scale, ROUNDING[dtype], extra=ROW_ROUNDING)
        mine, theirs, true = (
            figures[grpo_loss, dtype],
            figures[reference.grpo_loss, dtype],
            figures[reference.grpo_loss, torch.float64],
        )
        assert mine.keys() == theirs.keys()
        for name in mine:
            assert_near(mine[name], theirs[name], true[name], extra=ROW_ROUNDING)


def test_before_the_first_update_the_ratio_is_one() -> None:
    table = step_table(SIGMAS, noise_level=0.9)
    velocity, latents = draw(0, 3, 4097), draw(1, 3, 4097)
    for step in (0, 5, 10):
        made, old = sde_step(velocity, latents, table, step, make_keys(3))
        _, figures = grpo_loss(velocity, latents, made, old, draw(2, 3), table, step, clip_range=1e-5)
        assert figures["ratio_mean"] == 1 and figures["ratio_error"] == 0 and figures["log_prob_difference"] == 0


@pytest.mark.parametrize(("dtype", "shape"), product(DTYPES, SHAPES))
def test_nft(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    velocity, old, clean, noise, ref = (draw(i, *shape, dtype=dtype) for i in range(5))
    sigma, probability = torch.linspace(1, 0.1, shape[0]), torch.linspace(0.1, 0.9, shape[0])
    for beta, weight in ((1.0, None), (0.4, draw(5, shape[0]).abs())):

        def run(op: Callable, v: Tensor, to: torch.dtype, beta=beta, weight=weight) -> Tensor:
            return op(
                v, old.to(to), clean.to(to), noise.to(to), sigma, probability, beta=beta, kl_beta=0.1,
                ref_velocity=ref.to(to), weight=weight,
            )[0]  # fmt: skip

        own = gradient(lambda v: run(nft_loss, v, dtype), velocity)
        eager = gradient(lambda v: run(reference.nft_loss, v, dtype), velocity)
        exact = gradient(lambda v: run(reference.nft_loss, v, torch.float64), velocity.double())
        scale = exact[1].abs().max()
        assert_near(own[0], eager[0], exact[0], extra=ROW_ROUNDING)
        assert_near(own[1] / scale, eager[1] / scale, exact[1] / scale, ROUNDING[dtype])


def test_nft_without_preference_is_flat_at_the_old_policy() -> None:
    velocity, clean, noise = (draw(i, 3, 100) for i in range(3))
    half, sigma = torch.full((3,), 0.5), torch.tensor([1.0, 0.5, 0.1])
    loss, grad = gradient(lambda v: nft_loss(v, velocity, clean, noise, sigma, half, beta=1.0)[0], velocity)
    assert loss > 0 and not grad.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", registered_cases.registered_arguments(torch.float32))
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    registered_cases.check_op(name, dtype)


@pytest.mark.parametrize("name", registered_cases.calls())
def test_compiled_without_a_graph_break(name: str) -> None:
    registered_cases.check_compiled(name, "aot_eager")
