"""K turns on the model's own output: whose noise, which input, which log-prob."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from mteditflow_kernels import counter_normal

from mteditflow.config import Config, DataConfig, ObjectiveConfig
from mteditflow.data import training_tasks
from mteditflow.distributed import Ranks
from mteditflow.flow import make_schedule, window_steps
from mteditflow.noise import NoiseSource, Place, row_keys
from mteditflow.objective import build_objective
from mteditflow.pictures import round_to_8_bit
from mteditflow.policy import Policy, build_policy
from mteditflow.rollout import roll_out, sample_rollout
from mteditflow.types import EditTask, Rollout

ONE_RANK = Ranks(rank=0, world_size=1, device=torch.device("cpu"))
# Latents are of the order of 1 to 10 (largest here: below 16), and a row in a batch of another size has float32 sums in
# another order: two turns of 3 steps of about 1e2 operations each, of relative error 2^-24.
BATCH_TOLERANCE = 2 * 3 * 1e2 * 2**-24 * 16


@pytest.fixture(scope="module")
def config(tiny_config: Config) -> Config:
    return with_rollout(tiny_config, window_size=1)


@pytest.fixture(scope="module")
def policy(config: Config) -> Policy:
    return build_policy(config.model, config.lora, seed=0, has_old=False)


def with_rollout(config: Config, **values: Any) -> Config:
    return replace(config, rollout=replace(config.rollout, **values))


def roll(policy: Policy, config: Config, tasks: list[EditTask] | None = None, iteration: int = 0) -> Rollout:
    tasks = tasks or training_tasks(config, iteration, ONE_RANK)
    return sample_rollout(policy, build_objective(config), tasks, config, iteration)


def test_same_seed_same_bits_and_another_iteration_others(policy: Policy, config: Config) -> None:
    tasks = training_tasks(config, 0, ONE_RANK)
    first, again, other = roll(policy, config, tasks), roll(policy, config, tasks), roll(policy, config, tasks, 1)
    for a, b, c in zip(first.turns, again.turns, other.turns, strict=True):
        assert torch.equal(a.latents, b.latents) and torch.equal(a.image, b.image)
        assert torch.equal(a.old_log_prob.nan_to_num(), b.old_log_prob.nan_to_num())
        assert not torch.equal(a.latents[0], c.latents[0])


def test_a_group_may_start_from_the_same_noise(policy: Policy, config: Config) -> None:
    """As a group of one, in each turn a noise of its own; the window's noise tells the trajectories apart."""
    tasks = training_tasks(config, 0, ONE_RANK)
    apart, shared = roll(policy, config, tasks), roll(policy, with_rollout(config, is_start_shared=True), tasks)
    for turn, (one, other) in enumerate(zip(apart.turns, shared.turns, strict=True)):
        groups = other.latents[0].unflatten(0, (2, 2))
        assert torch.equal(groups[:, 0], groups[:, 1]) and not torch.equal(groups[0], groups[1])
        assert torch.equal(groups[:, 0], one.latents[0].unflatten(0, (2, 2))[:, 0])
        assert not torch.equal(one.latents[0, 0], one.latents[0, 1])
        assert not torch.equal(other.latents[-1, 0], other.latents[-1, 1])
        assert turn == 0 or not torch.equal(other.latents[0], shared.turns[0].latents[0])


def test_a_trajectory_does_not_depend_on_the_others(policy: Policy, config: Config) -> None:
    config = with_rollout(config, window_size=0)
    one, two = training_tasks(config, 0, ONE_RANK)
    both, alone, swapped = (
        roll(policy, config, [one, two]),
        roll(policy, config, [two]),
        roll(policy, config, [two, one]),
    )
    for together, single, turned in zip(both.turns, alone.turns, swapped.turns, strict=True):
        assert torch.equal(together.latents[0, 2:], single.latents[0])  # the first latents are noise alone
        assert torch.equal(turned.latents[:, :2], together.latents[:, 2:])  # the same batch size: the same bits
        assert together.latents.abs().max() < 16
    # The first turn; the second edits 8-bit pictures, where rounding may make a step of 1/127.5.
    a, b = both.turns[0].latents[:, 2:], alone.turns[0].latents
    torch.testing.assert_close(a, b, rtol=0, atol=BATCH_TOLERANCE)


def test_noise_is_that_of_the_keys(policy: Policy, config: Config) -> None:
    """Element by element: seed, iteration, task, trajectory, turn and step, and nothing else."""
    config = with_rollout(config, window_size=0)
    tasks = training_tasks(config, 3, ONE_RANK)
    rollout = roll(policy, config, tasks, 3)
    shape, source = (policy.num_tokens, policy.num_channels), NoiseSource(seed=config.run.seed, step=3)
    assert [task.id for task in tasks] == [6, 7]
    ids, members = [6, 6, 7, 7], torch.tensor([0, 1, 0, 1])
    for number, turn in enumerate(rollout.turns):
        keys = row_keys(ids, members, source, turn=number, place=Place.INITIAL_LATENTS)
        assert torch.equal(turn.latents[0], counter_normal(keys, shape))
        for step, row in enumerate(rollout.schedule.table):
            keys = row_keys(ids, members, source, turn=number, place=Place.DENOISING_STEP, number=step)
            with torch.no_grad():
                sigma = rollout.schedule.sigmas[step].expand(4)
                velocity = policy.velocity(turn.latents[step], sigma, turn.condition)
            mean = row[0] * turn.latents[step] + row[1] * velocity
            assert torch.equal(turn.latents[step + 1], mean + row[2] * counter_normal(keys, shape))


@pytest.mark.parametrize("hand_off", ["pixels", "latents"])
def test_a_turn_edits_what_the_turn_before_made(policy: Policy, config: Config, hand_off: str) -> None:
    config = replace(with_rollout(config, hand_off=hand_off), data=DataConfig(num_turns=3))
    tasks = training_tasks(config, 0, ONE_RANK)
    rollout = roll(policy, config, tasks)
    sources = policy.encode_image(torch.stack([task.source for task in tasks]))
    assert torch.equal(rollout.turns[0].condition.image, sources.repeat_interleave(2, dim=0))
    for number, (before, after) in enumerate(zip(rollout.turns, rollout.turns[1:], strict=False)):
        levels = (before.image.double() + 1) * 127.5
        # An 8-bit level l is stored as float32 l / 127.5 - 1: two roundings at values below 2.
        assert (levels - levels.round()).abs().max() < 2 * 2 * 2**-24 * 127.5
        assert torch.equal(before.image, round_to_8_bit(policy.decode(before.latents[-1])))
        expected = policy.encode_image(before.image) if hand_off == "pixels" else before.latents[-1]
        assert torch.equal(after.condition.image, expected)
        prompts = [task.instructions[number + 1] for task in tasks for _ in range(2)]
        text = policy.encode_text(prompts, before.image, has_cfg=False)["text"]
        assert torch.equal(after.condition.text["text"], text)


@pytest.mark.parametrize("rule", ["sde", "cps"])
@pytest.mark.parametrize("window_size", [0, 1, 2])
def test_log_prob_is_finite_exactly_at_noisy_steps(policy: Policy, config: Config, rule: str, window_size: int) -> None:
    config = with_rollout(config, rule=rule, window_size=window_size, num_tasks=1)
    rollout = roll(policy, config)
    trained = window_steps(3, window_size, "random", 0, config.run.num_iterations, config.run.seed)
    noisy = set(trained) if window_size else {0, 1, 2} if rule == "sde" else {0, 1}  # CPS adds nothing at its last step
    assert rollout.schedule.trained_steps == trained and set(trained) <= noisy
    for turn in rollout.turns:
        assert {s for s in range(3) if turn.old_log_prob[s].isfinite().all()} == noisy
        assert {s for s in range(3) if turn.old_log_prob[s].isnan().all()} == {0, 1, 2} - noisy
        assert {s for s in range(3) if rollout.schedule.table[s, 2] > 0} == noisy


def test_log_prob_is_the_normal_density(policy: Policy, config: Config) -> None:
    """log N(next; mean, std^2), averaged over the elements, in float64."""
    rollout = roll(policy, with_rollout(config, window_size=0, num_tasks=1))
    turn, sigmas = rollout.turns[1], rollout.schedule.sigmas
    for step, row in enumerate(rollout.schedule.table.double()):
        with torch.no_grad():
            velocity = policy.velocity(turn.latents[step], sigmas[step].expand(2), turn.condition).double()
        mean, std = row[0] * turn.latents[step] + row[1] * velocity, row[2]
        z = (turn.latents[step + 1] - mean) / std
        expected = (-0.5 * z.square() - std.log() - 0.5 * math.log(2 * math.pi)).flatten(1).mean(1)
        # The residual next - mean loses about |latents| / std = 1e2 of its digits: 2 * 1e2 * 2^-24 of terms of the
        # order of 1.
        torch.testing.assert_close(turn.old_log_prob[step].double(), expected, rtol=0, atol=2e-5)


def test_a_group_shares_its_source_and_differs_in_noise(policy: Policy, config: Config) -> None:
    rollout = roll(policy, config)
    first, second = rollout.turns
    assert rollout.group.tolist() == [0, 0, 1, 1]
    for value in (first.condition.image, *first.condition.text.values(), *second.condition.text.values()):
        assert torch.equal(value[0], value[1])
    assert not torch.equal(first.condition.image[0], first.condition.image[2])
    assert not torch.equal(first.latents[0, 0], first.latents[0, 1])
    assert not torch.equal(first.image[0], first.image[1])
    assert not torch.equal(second.condition.image[0], second.condition.image[1])  # each goes on from its own


def test_microbatches_are_cut_at_the_same_places(policy: Policy, config: Config) -> None:
    whole, cut = roll(policy, config), roll(policy, with_rollout(config, microbatch_size=3))
    assert torch.equal(whole.turns[0].latents[0], cut.turns[0].latents[0])
    torch.testing.assert_close(whole.turns[0].latents, cut.turns[0].latents, rtol=0, atol=BATCH_TOLERANCE)
    # 3 + 1 rows: the last alone has the bits of a batch of one
    tasks = training_tasks(config, 0, ONE_RANK)
    again = roll(policy, with_rollout(config, microbatch_size=3), tasks)
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(cut.turns, again.turns, strict=True))


def test_one_turn(policy: Policy, config: Config) -> None:
    one, two = replace(config, data=DataConfig(num_turns=1)), config
    tasks = training_tasks(two, 0, ONE_RANK)
    short, long = roll(policy, one, tasks), roll(policy, two, tasks)
    assert len(short.turns) == 1 and torch.equal(short.turns[0].latents, long.turns[0].latents)


def test_nft_rolls_out_the_ode_of_the_old_adapter(policy: Policy, config: Config) -> None:
    config = replace(config, objective=ObjectiveConfig(name="nft"))
    policy = build_policy(config.model, config.lora, seed=0, has_old=True)
    tasks = training_tasks(config, 0, ONE_RANK)
    before = roll(policy, config, tasks)
    moved = {key: weight + 0.1 for key, weight in policy.adapters.state("current").items()}
    policy.adapters.load("current", moved)
    assert torch.equal(roll(policy, config, tasks).turns[1].latents, before.turns[1].latents)
    policy.adapters.load("old", moved)
    assert not torch.equal(roll(policy, config, tasks).turns[0].latents[1], before.turns[0].latents[1])
    assert all(turn.old_log_prob.isnan().all() for turn in before.turns)
    schedule, source = make_schedule(policy.sigmas(3)), NoiseSource(seed=0, step=0)
    with policy.adapters.use("off"):
        ode = roll_out(policy, tasks, schedule, source, config.rollout, num_turns=2, group_size=2)
    assert torch.equal(ode.turns[1].latents, before.turns[1].latents)  # B is 0: the old adapter was none


def test_8_bits() -> None:
    levels = torch.arange(256) / 127.5 - 1
    assert torch.equal(round_to_8_bit(levels), levels)
    assert torch.equal(round_to_8_bit(levels[:-1] + 0.4 / 127.5), levels[:-1])
    assert torch.equal(round_to_8_bit(levels[1:] - 0.4 / 127.5), levels[1:])


def test_second_order_rollout(policy: Policy, config: Config) -> None:
    """Turn 1 of NFT's rollout by dpm2 is what diffusers' scheduler makes of the same velocities."""
    tasks, sigmas = training_tasks(config, 0, ONE_RANK), policy.sigmas(5)
    source, schedules = NoiseSource(seed=0, step=0), [make_schedule(sigmas, is_second_order=i) for i in (True, False)]
    rollout, euler = (
        roll_out(policy, tasks, schedule, source, config.rollout, num_turns=1, group_size=1) for schedule in schedules
    )
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=2)
    scheduler.set_timesteps(5)
    scheduler.sigmas = sigmas
    (turn,) = rollout.turns
    latents = turn.latents[0]
    for i, timestep in enumerate(scheduler.timesteps):
        with torch.no_grad():
            velocity = policy.velocity(latents, sigmas[i].float().expand(len(latents)), turn.condition)
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    # 5 steps of about 10 float32 roundings of latents below 16, and what the velocity makes of them, less than twice
    torch.testing.assert_close(turn.latents[-1], latents, rtol=0, atol=5 * 10 * 2**-24 * 16 * 2)
    assert (euler.turns[0].latents[-1] - latents).abs().max() > 1e-3
