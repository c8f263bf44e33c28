"""The objectives' losses written out: which weights are compared with which, and how the old ones follow."""

import pytest
import torch
from mteditflow_kernels import C_V, KL_PUBLISHED, counter_normal, counter_uniform
from update_parts import ADVANTAGE, as_nft, build, change, minibatches, roll

from mteditflow.config import Config
from mteditflow.noise import Place
from mteditflow.objective import build_objective
from mteditflow.objective.grpo import transitions
from mteditflow.objective.nft import noised


@pytest.fixture(scope="module")
def config(tiny_config: Config) -> Config:
    return change(tiny_config, "objective", clip_range=1e-2)


@pytest.mark.parametrize("name", ["grpo", "nft"])
def test_kl_is_to_the_model_without_an_adapter(config: Config, name: str) -> None:
    """Neither to the old weights nor to the trained ones: all three differ here. Written out in float64."""
    config = change(config, "objective", name=name, kl_beta=0.5, nft_old_decay="ramp")
    policy = build(config)
    rollout, objective = roll(policy, config), build_objective(config)
    moved = {key: weight * 1.5 for key, weight in policy.adapters.state("current").items()}
    policy.adapters.load("current", moved)
    for microbatch in minibatches(rollout, ADVANTAGE, objective, config)[0]:
        turn, sigmas = rollout.turns[microbatch.turn], rollout.schedule.sigmas
        if name == "grpo":
            t = transitions(rollout, ADVANTAGE, microbatch)
            latents, sigma = t.latents, t.sigma
            row = rollout.schedule.table[microbatch.draw].double()
            scale = row[C_V] ** 2 * row[KL_PUBLISHED]  # KL of two normals: the means differ by C_V (v - v_ref)
        else:
            order = counter_uniform(rollout.keys(turn=microbatch.turn, place=Place.NFT_TIMES), 3).argsort(dim=1)
            sigma, clean = sigmas[order[:, microbatch.draw]], turn.latents[-1]
            keys = rollout.keys(turn=microbatch.turn, place=Place.NFT_NOISE, number=microbatch.draw)
            latents = noised(clean, counter_normal(keys, tuple(clean.shape[1:])), sigma)
            scale = torch.ones((), dtype=torch.float64)
        with torch.no_grad():
            velocity = policy.velocity(latents, sigma, turn.condition).double()
            with policy.adapters.use("off"):
                reference = policy.velocity(latents, sigma, turn.condition).double()
            _, figures = objective.loss(policy, rollout, ADVANTAGE, microbatch, is_first_update=True)
        expected = (scale * (velocity - reference).square()).mean()
        assert expected > 1e-6
        assert figures["kl"].item() == pytest.approx(expected.item(), rel=1e-4)  # float32 sums of a few thousand terms


def test_old_adapter_follows_by_the_schedule(config: Config) -> None:
    """NFT's three published schedules; GRPO has no old adapter."""
    decays = {"on_policy": [0, 0, 0], "ramp": [0, 0.1, 0.5], "late_ramp": [0, 0.1875, 0.999]}
    for schedule, expected in decays.items():
        objective = build_objective(change(as_nft(config), "objective", nft_old_decay=schedule))
        assert [objective.old_decay(n) for n in (0, 100, 900)] == pytest.approx(expected)
        assert objective.has_old and objective.rollout_adapter == "old"
    grpo = build_objective(config)
    assert not grpo.has_old and grpo.rollout_adapter == "current"


def test_what_an_objective_cannot_have_is_one_line(config: Config) -> None:
    with pytest.raises(ValueError, match=r"^rollout.solver is 'dpm2': .*must be 'euler'$"):
        build_objective(change(config, "rollout", solver="dpm2"))
    with pytest.raises(ValueError, match=r"^objective.nft_num_times is 4: must be at most rollout.num_steps = 3$"):
        build_objective(change(as_nft(config), "objective", nft_num_times=4))


def test_nft_moves_away_from_the_old_weights(config: Config) -> None:
    """The loss written out in float64, with old weights that are not the trained ones; A is that of each row."""
    config = change(as_nft(config), "objective", nft_old_decay="ramp", nft_beta=0.5)
    policy = build(config)
    rollout, objective = roll(policy, config), build_objective(config)
    policy.adapters.load("current", {key: 1.5 * weight for key, weight in policy.adapters.state("current").items()})
    for microbatch in minibatches(rollout, ADVANTAGE, objective, config)[0]:
        turn, keys = rollout.turns[microbatch.turn], {"turn": microbatch.turn}
        order = counter_uniform(rollout.keys(**keys, place=Place.NFT_TIMES), 3).argsort(dim=1)
        sigma, clean = rollout.schedule.sigmas[order[:, microbatch.draw]], turn.latents[-1].double()
        noise_keys = rollout.keys(**keys, place=Place.NFT_NOISE, number=microbatch.draw)
        latents = noised(turn.latents[-1], counter_normal(noise_keys, tuple(clean.shape[1:])), sigma)
        with torch.no_grad():
            velocity = policy.velocity(latents, sigma, turn.condition).double()
            with policy.adapters.use("old"):
                old = policy.velocity(latents, sigma, turn.condition).double()
            _, figures = objective.loss(policy, rollout, ADVANTAGE, microbatch, is_first_update=True)
        r, level = ADVANTAGE[:, microbatch.turn].double() / 10 + 0.5, sigma.double()[:, None, None]
        expected = torch.zeros(4, dtype=torch.float64)
        for share, beta in ((r, 0.5), (1 - r, -0.5)):
            error = latents.double() - level * (old + beta * (velocity - old)) - clean
            expected += share * error.square().mean((1, 2)) / error.abs().mean((1, 2)).clamp(min=1e-5)
        assert figures["policy_loss"].item() == pytest.approx(5 * expected.mean().item() / 0.5, rel=1e-5)
        assert (velocity - old).abs().max() > 1e-3
