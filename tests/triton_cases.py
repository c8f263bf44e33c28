"""The Triton ops against the reference in float64, uninitialised memory filled with NaN. `test_triton.py` runs this
file in a process of its own under the interpreter (TRITON_INTERPRET=1), `pytest bench/` on the GPU.
"""

import math
import os
from collections.abc import Callable
from itertools import product

import closed_forms
import pytest
import torch
import triton
import triton.language as tl
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
from mteditflow_kernels.triton_common import NORMAL_ERROR, _normal_pair
from near import ROUNDING, ROW_ROUNDING, assert_near, draw, gradient, make_keys
from test_flow import PUBLISHED, SDE_ROWS
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


def test_what_is_not_written_is_poisoned() -> None:
    for dtype in DTYPES:
        assert torch.empty(9, dtype=dtype).isnan().all()
        assert torch.empty_like(draw(0, 3, 3, dtype=dtype)).isnan().all()


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


@triton.jit
def _pair_kernel(words0, words1, out, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    pair = _normal_pair(tl.load(words0 + place).to(tl.uint32), tl.load(words1 + place).to(tl.uint32))
    tl.store(out + place, pair[0])
    tl.store(out + SIZE + place, pair[1])


def test_box_muller_at_the_ends_of_its_polynomials() -> None:
    """Radii: the smallest and largest words, both sides of every octave and of every seam of the logarithm at sqrt 1/2.
    Angles: both sides of every eighth of a turn, where the sine's polynomials end or pass through zero. (Over all 2^24
    of either, with the other one random, the worst is 1.9e-6.)
    """
    octaves = [int(2**k * end) + side for k in range(25) for end in (1, 0.5**0.5) for side in (-2, -1, 0, 1)]
    counts = torch.tensor(sorted({*range(1, 9), *(n for n in octaves if 1 <= n <= 1 << 24)}))
    angles = torch.tensor([(eighth * (1 << 21) + side) % (1 << 24) for eighth in range(8) for side in (-1, 0, 1)])
    words = torch.cartesian_prod((counts - 1) * 256, angles * 256)
    words = torch.cat([words, words | 255])  # the lowest eight bits count for nothing
    assert words.min() == 0 and words.max() == 2**32 - 1
    size = 1 << (len(words) - 1).bit_length()
    padded = torch.zeros(2, size, dtype=torch.int64)
    padded[:, : len(words)] = words.T
    out = torch.empty(2, size)
    _pair_kernel[(1,)](padded[0], padded[1], out, SIZE=size)  # pyright: ignore[reportArgumentType]
    radius = (-2 * (((padded[0] >> 8) + 1) * 2.0**-24).double().log()).sqrt()
    angle = (padded[1] >> 8) * (math.tau * 2.0**-24)
    exact = radius * torch.stack([angle.cos(), angle.sin()])
    assert (out - exact).abs().max() <= NORMAL_ERROR


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


@pytest.mark.parametrize("op", [sde_step, reference.sde_step])
def test_published_coefficients_are_what_a_step_does(op: Callable) -> None:
    """mean + std noise and its normal density by the published table, which has six decimals."""
    steps, _, std, c_x, c_v = (torch.tensor(column, dtype=torch.float64) for column in zip(*SDE_ROWS, strict=True))
    velocity, latents, keys = draw(0, 5, 63), draw(1, 5, 63), make_keys(5)
    made, log_prob = op(velocity, latents, step_table(SIGMAS, noise_level=0.9), steps.long(), keys)
    noise, std = philox.counter_normal(keys, (63,)).double(), std[:, None]
    expected = c_x[:, None] * latents + c_v[:, None] * velocity + std * noise
    off = PUBLISHED * (latents.abs() + velocity.abs() + noise.abs())
    # the rest: float32 noise, three products and two sums of numbers below 8
    assert ((made - expected).abs() <= off + std * NORMAL_ERROR + 5 * 8 * 2.0**-24).all()
    density = torch.distributions.Normal(expected - std * noise, std).log_prob(made.double()).mean(1)
    # d log_prob = (1 + eps^2) d std / std + |eps| d mean / std
    off = ((1 + noise.square()) * PUBLISHED + noise.abs() * off) / std
    assert ((log_prob - density).abs() <= off.mean(1) + ROW_ROUNDING).all()


def test_an_ode_step_has_no_log_prob() -> None:
    table = step_table(SIGMAS, noise_level=0.9, noisy_steps=(3,))
    velocity, latents = draw(0, 3, 100), draw(1, 3, 100)
    made, log_prob = sde_step(velocity, latents, table, 5, None)
    assert torch.equal(made, reference.sde_step(velocity, latents, table, 5, None)[0]) and log_prob.isnan().all()


def test_a_row_has_the_same_bits_in_every_batch() -> None:
    table, shape = step_table(SIGMAS, noise_level=0.9), (16, 2100)
    velocity, latents, keys = draw(0, *shape), draw(1, *shape), make_keys(16)
    made, log_prob = sde_step(velocity, latents, table, 4, keys)
    order = torch.arange(16) * 7 % 16
    other, other_log_prob = sde_step(velocity[order], latents[order], table, 4, keys[order])
    assert torch.equal(other, made[order]) and torch.equal(other_log_prob, log_prob[order])
    for row in (0, 9):
        own = slice(row, row + 1)
        alone, alone_log_prob = sde_step(velocity[own], latents[own], table, 4, keys[own])
        assert torch.equal(alone, made[own]) and torch.equal(alone_log_prob, log_prob[own])


@pytest.mark.parametrize("own", [(grpo_loss, nft_loss), (reference.grpo_loss, reference.nft_loss)])
def test_a_row_has_the_same_gradient_in_every_batch(own: tuple[Callable, Callable]) -> None:
    """Bit for bit, where its weight is given: 1/B would depend on the batch."""
    table, steps = step_table(SIGMAS, noise_level=0.9), torch.arange(16) % 12
    velocity, latents, ref, old = (draw(i, 16, 1030) for i in range(4))
    made, old_log_prob = sde_step(velocity, latents, table, steps, make_keys(16))
    old_log_prob, advantage, weight = old_log_prob - 1e-3 * draw(4, 16), draw(5, 16), draw(6, 16).abs()
    sigma, probability = torch.linspace(1, 0.1, 16), torch.linspace(0.1, 0.9, 16)

    def grpo_gradient(at: list[int]) -> Tensor:
        rows = (latents[at], made[at], old_log_prob[at], advantage[at], table, steps[at])
        more = {"clip_range": 1e-3, "kl_beta": 0.1, "ref_velocity": ref[at], "weight": weight[at]}
        return gradient(lambda v: own[0](v, *rows, **more)[0], velocity[at])[1]

    def nft_gradient(at: list[int]) -> Tensor:
        rows = (old[at], latents[at], made[at], sigma[at], probability[at])
        more = {"beta": 0.4, "kl_beta": 0.1, "ref_velocity": ref[at], "weight": weight[at]}
        return gradient(lambda v: own[1](v, *rows, **more)[0], velocity[at])[1]

    for gradient_of in (grpo_gradient, nft_gradient):
        whole = gradient_of([*range(16)])
        for at in ([0], [9], [15, 2, 14]):
            assert torch.equal(gradient_of(at), whole[at])


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
    weights = [None, draw(5, shape[0]).abs()]
    for step, weight in zip(steps_of("sde", shape[0]), weights * 2, strict=True):
        assert_grpo(dtype, shape, kl_form, step, weight)


def assert_grpo(
    dtype: torch.dtype, shape: tuple[int, ...], kl_form: str, step: int | Tensor, weight: Tensor | None
) -> None:
    """A lone row is not clipped, several are above and below; the loss, every diagnostic and the gradient. The form
    'guard' is the published penalty with GRPO-Guard's ratio.
    """
    table, clip_range, kl_beta = step_table(SIGMAS, noise_level=0.9), 1e-3, 0.1
    velocity, latents, ref = (draw(i, *shape, dtype=dtype) for i in range(3))
    advantage = torch.tensor([-2.0, 1.0, 0.5, -1.0]).repeat(4)[: shape[0]]
    shift = torch.tensor([3e-3, 4e-3, -2e-4, -4e-3, 1e-4]).repeat(4)[: shape[0]]  # none within rounding of the clip
    made, log_prob = reference.sde_step(velocity, latents, table, step, make_keys(shape[0]))
    old_velocity = velocity + 0.01 * draw(7, *shape, dtype=dtype) if kl_form == "guard" else None
    kl_form = "published" if kl_form == "guard" else kl_form
    old = log_prob - shift
    figures: dict[object, dict[str, Tensor]] = {}

    def run(op: Callable, v: Tensor, to: torch.dtype) -> Tensor:
        loss, figures[op, to] = op(
            v, latents.to(to), made.to(to), old.to(to if to == torch.float64 else torch.float32), advantage, table,
            step, clip_range=clip_range, kl_beta=kl_beta, ref_velocity=ref.to(to), kl_form=kl_form, weight=weight,
            old_velocity=None if old_velocity is None else old_velocity.to(to),
        )  # fmt: skip
        return loss

    own = gradient(lambda v: run(grpo_loss, v, dtype), velocity)
    eager = gradient(lambda v: run(reference.grpo_loss, v, dtype), velocity)
    exact = gradient(lambda v: run(reference.grpo_loss, v, torch.float64), velocity.double())
    rows = torch.as_tensor(step).expand(shape[0])
    score = reference.sde_log_prob(velocity.double(), latents.double(), made.double(), table, step)
    closed, is_clipped = closed_forms.grpo_gradient(
        velocity=velocity, latents=latents, next_latents=made, ref_velocity=ref, ratio=(score - old).exp(),
        advantage=advantage, weight=torch.full_like(old, 1 / shape[0]) if weight is None else weight,
        coefficients=table[rows], clip_range=clip_range, kl_beta=kl_beta,
        kl_scale=1.0 if kl_form == "exact" else -SIGMAS.diff()[rows],
    )  # fmt: skip
    if old_velocity is None:
        assert is_clipped.any() == (shape[0] > 1) and not is_clipped.all()
    assert_near(own[0], eager[0], exact[0], extra=ROW_ROUNDING)
    scale = exact[1].abs().max()
    for grad in (exact[1], *([closed] if old_velocity is None else [])):
        assert_near(own[1] / scale, eager[1] / scale, grad / scale, ROUNDING[dtype], extra=ROW_ROUNDING)
    mine, theirs, true = (
        figures[grpo_loss, dtype],
        figures[reference.grpo_loss, dtype],
        figures[reference.grpo_loss, torch.float64],
    )
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert_near(mine[name], theirs[name], true[name], extra=ROW_ROUNDING)


@pytest.mark.parametrize(
    ("rule", "dtype", "num_elements"),
    [
        ("sde", torch.float32, 1030),
        ("sde", torch.bfloat16, 63),
        ("sde", torch.float16, 63),
        ("cps", torch.bfloat16, 63),
    ],
)
def test_before_the_first_update_the_ratio_is_one(rule: str, dtype: torch.dtype, num_elements: int) -> None:
    num_steps = 12 if rule == "sde" else 11  # the last CPS step has no noise
    table, steps = step_table(SIGMAS, noise_level=0.9, rule=rule), torch.arange(num_steps)
    velocity, latents = (draw(i, num_steps, num_elements, dtype=dtype) for i in range(2))
    advantage = draw(2, num_steps)
    made, old = sde_step(velocity, latents, table, steps, make_keys(num_steps))
    loss, figures = grpo_loss(velocity, latents, made, old, advantage, table, steps, clip_range=1e-5)
    assert figures["ratio_mean"] == 1 and figures["ratio_error"] == 0 and figures["log_prob_difference"] == 0
    assert figures["clip_fraction"] == 0 and figures["approx_kl"] == 0
    assert abs(loss + advantage.double().mean()) <= num_steps * 2.0**-24 * advantage.abs().max()


@pytest.mark.parametrize("op", [grpo_loss, reference.grpo_loss])
def test_published_penalty_is_the_exact_one_times_dt(op: Callable) -> None:
    """Of every step, in value and in gradient; the advantage is 0, so the loss is the penalty."""
    table, zero = step_table(SIGMAS, noise_level=0.9), torch.zeros(1)
    velocity, latents, made, ref = (draw(i, 1, 63) for i in range(4))
    for step, dt in enumerate(SIGMAS.diff().tolist()):
        (published, published_grad), (exact, exact_grad) = (
            gradient(
                lambda v, s=step, form=form: op(
                    v, latents, made, zero, zero, table, s, clip_range=10.0, kl_beta=1.0, ref_velocity=ref, kl_form=form
                )[0],
                velocity,
            )
            for form in ("published", "exact")
        )
        # each side has the rounding of a float32 column and of at most seven products and quotients after it
        rounding = 16 * 2.0**-24
        torch.testing.assert_close(published.double(), exact.double() * -dt, rtol=rounding, atol=0)
        torch.testing.assert_close(published_grad.double(), exact_grad.double() * -dt, rtol=rounding, atol=0)


@pytest.mark.parametrize(("dtype", "shape"), product(DTYPES, SHAPES))
def test_nft(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    velocity, old, clean, noise, ref = (draw(i, *shape, dtype=dtype) for i in range(5))
    sigma, probability = torch.linspace(1, 0.1, shape[0]), torch.linspace(0.1, 0.9, shape[0])
    for beta, weight in ((1.0, None), (0.4, draw(5, shape[0]).abs())):

        def run(op: Callable, v: Tensor, to: torch.dtype, beta: float = beta, weight: Tensor | None = weight) -> Tensor:
            return op(
                v, old.to(to), clean.to(to), noise.to(to), sigma, probability, beta=beta, kl_beta=0.1,
                ref_velocity=ref.to(to), weight=weight,
            )[0]  # fmt: skip

        own = gradient(lambda v: run(nft_loss, v, dtype), velocity)
        eager = gradient(lambda v: run(reference.nft_loss, v, dtype), velocity)
        exact = gradient(lambda v: run(reference.nft_loss, v, torch.float64), velocity.double())
        share = torch.full((shape[0],), 1 / shape[0]).double() if weight is None else weight.double()
        policy, kl, closed = closed_forms.nft(
            velocity=velocity, old_velocity=old, clean=clean, noise=noise, ref_velocity=ref, sigma=sigma,
            probability=probability, weight=share, beta=beta, kl_beta=0.1, max_advantage=5.0,
        )  # fmt: skip
        scale = closed.abs().max()
        for loss, grad in (exact, (((policy + 0.1 * kl) * share).sum(), closed)):
            assert_near(own[0], eager[0], loss, extra=ROW_ROUNDING)
            assert_near(own[1] / scale, eager[1] / scale, grad / scale, ROUNDING[dtype])


@pytest.mark.parametrize(("op", "dtype"), product([nft_loss, reference.nft_loss], DTYPES))
def test_nft_without_preference_is_flat_at_the_old_policy(op: Callable, dtype: torch.dtype) -> None:
    velocity, clean, noise = (draw(i, 3, 100, dtype=dtype) for i in range(3))
    half, sigma = torch.full((3,), 0.5), torch.tensor([1.0, 0.5, 0.1])
    loss, grad = gradient(lambda v: op(v, velocity, clean, noise, sigma, half, beta=1.0)[0], velocity)
    assert loss > 0 and not grad.any()
