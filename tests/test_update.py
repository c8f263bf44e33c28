"""From advantages to optimizer steps: ratio, gradients, guards, and the sign of the whole thing."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mteditflow_kernels import counter_normal, counter_uniform
from torch import Tensor
from update_parts import (
    ADVANTAGE,
    ONE_RANK,
    KeepsGradients,
    as_nft,
    assert_near,
    assert_same_adapter,
    build,
    change,
    counted,
    in_chunks,
    minibatches,
    roll,
    step,
)

from mteditflow.config import (
    Config,
)
from mteditflow.guards import GuardError, check_adapter
from mteditflow.noise import Place
from mteditflow.objective import build_objective
from mteditflow.objective.grpo import transitions
from mteditflow.objective.nft import noised
from mteditflow.policy import Policy
from mteditflow.policy.optimizer import learning_rate
from mteditflow.types import Rollout
from mteditflow.update import Microbatches, update


@pytest.fixture(scope="module")
def config(tiny_config: Config) -> Config:
    return change(tiny_config, "objective", clip_range=1e-2)


@pytest.mark.parametrize("ratio", ["plain", "guard"])
@pytest.mark.parametrize("rule", ["sde", "cps"])
@pytest.mark.parametrize("size", [128, 4, 3])
def test_ratio_is_exactly_one_before_the_first_update(config: Config, rule: str, size: int, ratio: str) -> None:
    config = change(in_chunks(change(config, "rollout", rule=rule), size), "objective", ratio=ratio)
    policy = build(config)
    figures, _ = step(policy, roll(policy, config), ADVANTAGE, config)
    # the guard's old velocity comes from the noise, to a few roundings of 2^-24, whose squares are what is added
    limit = 0.0 if ratio == "plain" else 100 * 2.0**-48
    assert figures["update/first_ratio_error"] == 0 and figures["update/log_prob_difference"] <= limit
    assert figures["update/ratio_mean"] == 1 and figures["update/ratio_error"] == 0
    assert figures["update/clip_fraction"] == 0 and figures["update/approx_kl"] <= limit**2
    assert figures["update/grad_norm"] > 0


def test_another_ratio_trips_the_guard(config: Config) -> None:
    policy = build(config)
    rollout, before = roll(policy, config), policy.adapters.state("current")
    turns = [replace(turn, old_log_prob=turn.old_log_prob + 1e-6) for turn in rollout.turns]
    off = replace(rollout, turns=turns)
    with pytest.raises(GuardError, match=r"ratio before the first update is off by .*microbatch_size") as caught:
        update(policy, KeepsGradients(policy, 1e-3), build_objective(config), off, ADVANTAGE, config, ONE_RANK)
    assert "\n" not in str(caught.value)
    assert_same_adapter(policy, before)
    policy = build(config)
    allowed = replace(config, run=replace(config.run, max_ratio_error=1e-4))
    figures, _ = step(policy, off, ADVANTAGE, allowed)
    # The shift is 1e-6 up to the rounding of a log-prob below 8.
    assert figures["update/first_ratio_error"] == pytest.approx(1e-6, abs=8 * 2**-23)


def test_another_geometry_is_exact_or_trips_the_guard(config: Config) -> None:
    """Cut elsewhere than the rollout: the same bits by luck, or the guard; never a silent difference."""
    policy = build(config)
    rollout = roll(policy, config)
    cut = change(config, "optimizer", microbatch_size=1)
    with torch.no_grad():
        worst = 0.0
        for chunk in minibatches(rollout, ADVANTAGE, build_objective(cut), cut)[0]:
            t = transitions(rollout, ADVANTAGE, chunk)
            alone = policy.velocity(t.latents, t.sigma, t.condition)
            turn, every = rollout.turns[chunk.turn], torch.arange(4)
            sigma = rollout.schedule.sigmas[chunk.draw].expand(4)
            whole = policy.velocity(turn.latents[chunk.draw], sigma, turn.condition.rows(every))[chunk.rows]
            worst = max(worst, (alone - whole).abs().max().item())
    try:
        figures, _ = step(policy, rollout, ADVANTAGE, cut)
        assert figures["update/first_ratio_error"] == 0
    except GuardError:
        assert worst > 0


@pytest.mark.parametrize("name", ["grpo", "nft"])
def test_accumulation_over_chunks_is_one_big_chunk(config: Config, name: str) -> None:
    config = replace(change(config, "objective", name=name), run=replace(config.run, max_ratio_error=1e-3))
    gradients = []
    for size in (4, 3, 1):
        policy = build(config)
        rollout = roll(policy, config)  # always in one chunk: the same rollout
        figures, (gradient,) = step(policy, rollout, ADVANTAGE, change(config, "optimizer", microbatch_size=size))
        gradients.append(gradient)
        assert figures["update/grad_norm"] == pytest.approx(gradient.norm().item(), rel=1e-5)
    # Sums in another order: a few hundred roundings, and GRPO's ratio magnifies those of the latents by 1 / std^2.
    assert_near(gradients[1], gradients[0], 2e3)
    assert_near(gradients[2], gradients[0], 2e3)
    assert gradients[0].abs().max() > 1e-5


@pytest.mark.parametrize("ratio", ["plain", "guard"])
def test_gradient_is_that_of_the_loss_written_out(config: Config, ratio: str) -> None:
    """grad of -1/(N K T) sum A log_prob, which at ratio 1 is that of the clipped objective; GRPO-Guard's is std times
    that of a step, and divided by -dt.
    """
    config = change(config, "objective", ratio=ratio)
    policy = build(config)
    rollout = roll(policy, config)
    total = torch.zeros(())
    for t, turn in enumerate(rollout.turns):
        for s in rollout.schedule.trained_steps:
            row, x, y = rollout.schedule.table[s], turn.latents[s], turn.latents[s + 1]
            mean = row[0] * x + row[1] * policy.velocity(x, rollout.schedule.sigmas[s].expand(4), turn.condition)
            log_prob = -((y - mean) ** 2).flatten(1).mean(1) / (2 * row[2] ** 2)
            if ratio == "guard":
                log_prob = log_prob * row[2] / (rollout.schedule.sigmas[s] - rollout.schedule.sigmas[s + 1])
            total = total - (ADVANTAGE[:, t] * log_prob).sum() / (4 * 2 * len(rollout.schedule.trained_steps))
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(total, [p for _, p in policy.adapters.trainable])])
    _, (gradient,) = step(policy, rollout, ADVANTAGE, config)
    assert_near(gradient, expected, 2e3)  # sums in another order, as above


def test_second_update_is_off_policy(config: Config) -> None:
    config = change(config, "optimizer", num_updates=2)
    policy = build(config)
    rollout = roll(policy, config)
    parts = minibatches(rollout, ADVANTAGE, build_objective(config), config)
    assert [len(part) for part in parts] == [2, 2]  # 2 turns x 2 trained steps in all
    assert len({(chunk.turn, chunk.draw) for part in parts for chunk in part}) == 4
    figures, gradients = step(policy, rollout, ADVANTAGE, config, learning_rate=0.1)
    assert len(gradients) == 2
    assert figures["update/first_ratio_error"] == 0 and figures["update/ratio_error"] > 1e-6
    assert figures["update/log_prob_difference"] > 1e-6 and figures["update/approx_kl"] > 0


def test_kl_moves_only_an_adapter_that_is_not_zero(config: Config) -> None:
    for is_moved in (False, True):
        gradients, kl = [], []
        for kl_beta in (0.0, 0.5):
            policy = build(config, is_moved)
            own = change(config, "objective", kl_beta=kl_beta)
            figures, (gradient,) = step(policy, roll(policy, own), ADVANTAGE, own)
            gradients.append(gradient)
            kl.append(figures["update/kl"])
        assert torch.equal(*gradients) is not is_moved
        assert kl[0] == 0 and (kl[1] > 0) is is_moved


def test_nothing_finite_is_refused_and_nothing_moves(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    for own in (config, as_nft(config)):
        policy = build(own)
        rollout, before, averaged = roll(policy, own), policy.adapters.state("current"), policy.adapters.state("ema")
        bad = ADVANTAGE.clone()
        bad[2, 1] = torch.nan
        with pytest.raises(GuardError, match="not finite"):
            step(policy, rollout, bad, own)
        original = policy.velocity
        with monkeypatch.context() as patch:
            patch.setattr(policy, "velocity", lambda *args, run=original: run(*args) * torch.nan)
            with pytest.raises(GuardError, match="not finite"):
                step(policy, rollout, ADVANTAGE, own)
        assert_same_adapter(policy, before)
        assert_same_adapter(policy, averaged, "ema")


@pytest.mark.parametrize("name", ["grpo", "nft"])
def test_rows_of_zero_advantage_are_not_run(config: Config, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row of every chunk carries no gradient, and is NaN, as a trajectory without a score may be: half of the
    forward passes, and the loss and gradient that the others have beside rows of almost no advantage.
    """
    config = in_chunks(change(config, "objective", name=name), 2)
    half = ADVANTAGE.clone()
    half[[0, 2]] = 0
    policy = build(config)
    rollout = roll(policy, config)
    with counted(policy, monkeypatch) as calls:
        full, (expected,) = step(policy, rollout, half + 1e-30 * (half == 0), config)
    times = 2 if name == "grpo" else 1
    assert calls == [2] * 4 * times  # turns x (trained steps or times) x 2 chunks
    for turn in rollout.turns:
        for rows in (turn.latents[:, [0, 2]], turn.condition.image[[0, 2]]):
            assert rows.isfinite().all()
        turn.latents[:, [0, 2]] = torch.nan
    policy = build(config)
    with counted(policy, monkeypatch) as calls:
        figures, (gradient,) = step(policy, rollout, half, config)
    assert calls == [2] * 2 * times
    assert figures.get("update/first_ratio_error", 0.0) == 0
    assert_near(gradient, expected, 100)  # sums in another order
    if name == "grpo":  # NFT's rows of no advantage have a loss, without a slope
        assert abs(figures["update/loss"] - full["update/loss"]) <= 1e-6


@pytest.mark.parametrize(
    ("wanted", "size", "expected"),
    [
        ([1, 1, 1, 1], 2, [([0, 1], [1, 1]), ([2, 3], [1, 1])]),
        ([0, 1, 0, 1, 0], 2, [([1, 3], [1, 1])]),
        ([0, 1, 0, 1, 1], 2, [([1, 3], [1, 1]), ([4], [1])]),
        ([1, 0, 1, 1, 0, 1, 0], 4, [([0, 2, 3], [1, 1, 1]), ([5], [1])]),
        ([0, 0, 1], 2, [([2], [1])]),
        ([0, 0, 0], 2, []),
    ],
)
def test_microbatches_are_filled(wanted: list[int], size: int, expected: list[tuple[list[int], list[int]]]) -> None:
    """Whole ones keep the rollout's size: a repeated row of weight 0 fills them up."""
    rollout: Any = SimpleNamespace(group=wanted, turns=[None], schedule=None)
    rollout.parts = (rollout,)
    objective: Any = SimpleNamespace(draws=lambda schedule: [0])
    config = change(Config(), "optimizer", microbatch_size=size)
    advantages = torch.tensor(wanted).float()[:, None]
    microbatches = [chunk for _, chunk in Microbatches(rollout, objective, config, ONE_RANK)([advantages])]
    parts = [(chunk.rows, chunk.weight * len(wanted)) for chunk in microbatches]
    for cuts in ([1] * len(wanted), [2, len(wanted) - 2]):  # as they become known
        again = Microbatches(rollout, objective, config, ONE_RANK)(advantages.split(cuts))
        assert all(torch.equal(a.rows, b.rows) for a, (_, b) in zip(microbatches, again, strict=True))
    assert [(rows[weight > 0].tolist(), weight[weight > 0].tolist()) for rows, weight in parts] == expected
    tail = len(wanted) % size
    assert all(len(rows) == len(weight) and len(rows) in (size, tail) for rows, weight in parts)
    assert all(wanted[row] for rows, _ in parts for row in rows)


def test_two_steps_of_one_microbatch_are_refused() -> None:
    one = change(change(Config(), "data", num_turns=1), "optimizer", microbatch_size=10_000)
    with pytest.raises(ValueError, match=r"^optimizer\.num_updates is 2: all transitions are one microbatch"):
        change(one, "optimizer", num_updates=2)
    change(change(one, "optimizer", microbatch_size=32), "optimizer", num_updates=2)


@pytest.mark.parametrize("num_draws", [1, 2, 3])
@pytest.mark.parametrize("num_turns", [1, 2, 3])
@pytest.mark.parametrize("num_rows", [6, 12, 14])
def test_each_optimizer_step_has_a_mean_loss(num_rows: int, num_turns: int, num_draws: int) -> None:
    """However many of the transitions fall to it: the weights of a step are all alike, and sum to 1."""
    rollout: Any = SimpleNamespace(group=list(range(num_rows)), turns=[None] * num_turns, schedule=None)
    rollout.parts = (rollout,)
    objective: Any = SimpleNamespace(draws=lambda schedule: range(num_draws))
    config = change(Config(), "optimizer", microbatch_size=4, num_updates=2)
    weights: list[list[float]] = [[], []]
    for number, chunk in Microbatches(rollout, objective, config, ONE_RANK)([torch.ones(num_rows, num_turns)]):
        weights[number] += chunk.weight[chunk.weight > 0].tolist()
    assert sum(map(len, weights)) == num_rows * num_turns * num_draws
    for own in weights:
        assert len(set(own)) == 1 and sum(own) == pytest.approx(1)


@pytest.mark.parametrize("name", ["grpo", "nft"])
def test_without_any_advantage_nothing_moves(config: Config, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = change(config, "objective", name=name)
    policy = build(config)
    rollout, before = roll(policy, config), policy.adapters.state("current")
    with counted(policy, monkeypatch) as calls:
        figures, gradients = step(policy, rollout, torch.zeros(4, 2), config)
    assert not calls and not gradients
    assert figures["update/loss"] == figures["update/grad_norm"] == figures["update/num_transitions"] == 0
    assert figures.keys() == names_of_figures(config)  # as on the other ranks
    assert_same_adapter(policy, before)


def names_of_figures(config: Config) -> set[str]:
    objective, others = build_objective(config), ("loss", "grad_norm", "num_transitions")
    return {f"update/{name}" for name in (*objective.figures, *objective.worst_figures, *others)}


def test_figures_are_named(config: Config) -> None:
    for own in (config, as_nft(config)):
        policy = build(own)
        figures, _ = step(policy, roll(policy, own), ADVANTAGE, own)
        assert figures.keys() == names_of_figures(own)
        assert all(value == value for value in figures.values())


def test_average_and_clipping(config: Config) -> None:
    policy = build(config)
    rollout, before = roll(policy, config), policy.adapters.state("current")
    small = change(config, "optimizer", max_grad_norm=1e-6, ema_decay=0.75)
    optimizer = KeepsGradients(policy, 1e3)
    figures = update(policy, optimizer, build_objective(small), rollout, ADVANTAGE, small, ONE_RANK)
    assert figures["update/grad_norm"] > 1e-5  # the norm before clipping
    # clip_grad_norm_ divides by norm + 1e-6: here that is at most 10 % of the norm.
    assert optimizer.gradients[0].norm().item() == pytest.approx(1e-6, rel=0.1)
    for key, weight in policy.adapters.state("ema").items():
        expected = 0.75 * before[key].double() + 0.25 * policy.adapters.state("current")[key].double()
        torch.testing.assert_close(weight.double(), expected, rtol=0, atol=3 * 2 * 2**-24)  # three roundings below 2


def log_prob_of(policy: Policy, rollout: Rollout) -> Tensor:
    """(N,): mean over turns and trained steps, scaled residual alone, in float64."""
    total = torch.zeros(4, dtype=torch.float64)
    with torch.no_grad():
        for turn in rollout.turns:
            for s in rollout.schedule.trained_steps:
                velocity = policy.velocity(
                    turn.latents[s], rollout.schedule.sigmas[s].expand(4), turn.condition
                ).double()
                row = rollout.schedule.table[s].double()
                residual = turn.latents[s + 1].double() - row[0] * turn.latents[s].double() - row[1] * velocity
                total -= residual.square().flatten(1).mean(1) / (2 * row[2] ** 2)
    return total


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_grpo_raises_what_was_rewarded(config: Config, sign: float) -> None:
    """The sign of the whole thing: a small step makes a rewarded trajectory likelier, a punished one less so."""
    policy = build(config)
    rollout = roll(policy, config)
    before = log_prob_of(policy, rollout)
    advantage = torch.zeros(4, 2)
    advantage[1] = sign
    _, (gradient,) = step(policy, rollout, advantage, config, learning_rate=0.1)
    gain = (log_prob_of(policy, rollout) - before)[1].item() / 4  # mean over 2 turns x 2 steps
    # First order: a step -lr g of the loss -A log_prob / 4 trajectories changes A log_prob by 4 lr |g|^2.
    assert sign * gain == pytest.approx(4 * 0.1 * gradient.square().sum().item(), rel=0.2)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_nft_moves_towards_what_was_rewarded(config: Config, sign: float) -> None:
    """The velocity at the noised edit comes nearer to noise - x0 of the rewarded edit, and leaves a punished one."""
    config = as_nft(config)
    policy = build(config)
    rollout = roll(policy, config)

    def error() -> float:
        total = 0.0
        for number, turn in enumerate(rollout.turns):
            order = counter_uniform(rollout.keys(turn=number, place=Place.NFT_TIMES), 3).argsort(dim=1)
            for draw in range(config.objective.nft_num_times):
                sigma, clean = rollout.schedule.sigmas[order[:, draw]], turn.latents[-1]
                noise = counter_normal(
                    rollout.keys(turn=number, place=Place.NFT_NOISE, number=draw), tuple(clean.shape[1:])
                )
                with torch.no_grad():
                    velocity = policy.velocity(noised(clean, noise, sigma), sigma, turn.condition)
                total += (sigma[1] * (velocity - (noise - clean))[1]).double().square().mean().item()
        return total

    before = error()
    advantage = torch.zeros(4, 2)
    advantage[1] = 5 * sign
    step(policy, rollout, advantage, config, learning_rate=1e-2)
    assert sign * (before - error()) > 1e-7 * before


def test_an_adapter_without_effect_stops_the_run(config: Config) -> None:
    policy = build(config, is_moved=False)
    rollout = roll(policy, config)
    with pytest.raises(GuardError, match="does not change the velocity"):
        check_adapter(policy, rollout, config)  # B is 0
    step(policy, rollout, ADVANTAGE, config, learning_rate=1.0)
    check_adapter(policy, rollout, config)


@pytest.mark.parametrize("chunk_size", [2, 4])
def test_on_policy_saves_the_old_forward_pass_and_nothing_else(
    config: Config, chunk_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first step of an iteration the old adapter is the trained one, so its velocity is already there."""
    gradients, num_forwards = [], []
    for schedule in ("on_policy", "ramp"):
        own = change(in_chunks(as_nft(config), chunk_size), "objective", nft_old_decay=schedule, nft_num_times=2)
        policy = build(own)
        rollout = roll(policy, own)
        with counted(policy, monkeypatch) as sizes:
            gradients += step(policy, rollout, ADVANTAGE, own)[1]
            num_forwards.append(len(sizes))
    assert num_forwards[1] == 2 * num_forwards[0]
    assert torch.equal(gradients[0], gradients[1])


def test_learning_rate_of_an_iteration(config: Config) -> None:
    """Under 'linear' a fall that would reach 0 one iteration after the last."""
    run = replace(config, run=replace(config.run, num_iterations=6))
    run = change(run, "optimizer", learning_rate=1.0, schedule="linear")
    assert [learning_rate(run, i) for i in range(7)] == pytest.approx([1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0])
    constant = change(run, "optimizer", schedule="constant")
    assert [learning_rate(constant, i) for i in range(3)] == [1, 1, 1]
