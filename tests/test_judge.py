"""The simulated judge: its faults are those that are stated, and counted; training sees them, the truth is kept."""

from dataclasses import replace

import pytest
import torch
from mteditflow_kernels import counter_normal
from torch import Tensor

from mteditflow.config import AdvantageConfig, Config, RewardConfig
from mteditflow.data import training_tasks
from mteditflow.distributed import Ranks
from mteditflow.noise import NoiseSource, Place, row_keys
from mteditflow.objective import build_objective
from mteditflow.policy import build_policy
from mteditflow.record.metrics import score_figures
from mteditflow.reward import build_reward
from mteditflow.reward.exact import quality
from mteditflow.reward.simulated import PROFILES, Profile, SimulatedJudge, answer_with_faults, corruption
from mteditflow.rollout import sample_rollout
from mteditflow.types import Rollout
from mteditflow.world.edits import make_session
from mteditflow.world.render import render

ONE_RANK = Ranks(rank=0, world_size=1, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def rollout(tiny_config: Config) -> Rollout:
    policy = build_policy(tiny_config.model, tiny_config.lora, seed=0, has_old=False)
    tasks = training_tasks(tiny_config, 0, ONE_RANK)
    return sample_rollout(policy, build_objective(tiny_config), tasks, tiny_config, 0)


def config_of(judge: str, **values: object) -> Config:
    return Config(reward=RewardConfig(judge=judge, **values))  # pyright: ignore[reportArgumentType]


def at(rollout: Rollout, iteration: int, seed: int = 0) -> Rollout:
    """The same pictures, with the chance of another iteration or run."""
    return replace(rollout, noise=NoiseSource(seed=seed, step=iteration))


def answer_probabilities(grade: int, profile: Profile) -> Tensor:
    """(5,) of the answers 1 to 5 to an undamaged turn of that grade, float64."""
    edges = torch.tensor([-torch.inf, 1.5, 2.5, 3.5, 4.5, torch.inf], dtype=torch.float64)
    return torch.special.ndtr((edges - grade - profile.bias) / profile.std).diff()


@pytest.mark.parametrize("name", PROFILES)
def test_answers_have_the_stated_distribution(name: str) -> None:
    """Rounding and clipping included: 20,000 answers to each grade, each frequency within 5 standard deviations."""
    tasks = training_tasks(Config(), 0, ONE_RANK)
    source = NoiseSource(seed=3, step=0)
    ids, members = [task.id for task in tasks for _ in range(2500)], torch.arange(2500).repeat(len(tasks))
    keys = row_keys(ids, members, source, turn=0, place=Place.JUDGE_ANSWER)
    noise = counter_normal(keys, (1,))
    for grade in range(1, 6):
        given = answer_with_faults(torch.full_like(noise, grade), torch.zeros(()), noise, PROFILES[name], leniency=0.0)
        expected = answer_probabilities(grade, PROFILES[name])
        assert expected.sum() == pytest.approx(1)
        for answer in range(1, 6):
            p = expected[answer - 1].item()
            assert abs((given == answer).double().mean().item() - p) <= 5 * (p * (1 - p) / len(noise)) ** 0.5 + 1e-12


def test_thinking_is_less_biased_and_direct_less_noisy() -> None:
    """Over the five grades alike, in points, after rounding and clipping."""
    points = torch.arange(1, 6).double()
    error = {}
    for name, profile in PROFILES.items():
        p = torch.stack([answer_probabilities(grade, profile) for grade in range(1, 6)])  # (grade, answer)
        mean = p @ points
        error[name] = (mean - points).mean().item(), (p @ points.square() - mean.square()).mean().sqrt().item()
    assert abs(error["simulated_thinking"][0]) < 0.1 < 0.4 < error["simulated_direct"][0]
    assert error["simulated_direct"][1] < 0.6 < 0.7 < error["simulated_thinking"][1]


def test_corruption_is_zero_for_the_worlds_own_pictures_and_grows() -> None:
    clean = render([make_session(str(i), 1, held_out=False).source for i in range(4)])
    assert corruption(clean).max() == 0
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    levels = [corruption((clean + level * noise).clamp(-1, 1)).mean().item() for level in (0.0, 0.1, 0.3, 1.0)]
    assert levels == sorted(levels) and levels[3] > 0.3
    assert levels[1] == pytest.approx(0.1 * (2 / torch.pi) ** 0.5, rel=0.2)  # mean |noise|, a little clipped


def test_leniency_goes_to_failed_turns_alone() -> None:
    grades, damage, zero = torch.tensor([1.0, 3.0, 4.0, 5.0]), torch.full((4,), 0.5), torch.zeros(4)
    kind = replace(PROFILES["simulated_direct"], bias=0.0)
    assert answer_with_faults(grades, damage, zero, kind, leniency=4.0).tolist() == [3, 5, 4, 5]
    assert answer_with_faults(grades, damage, zero, kind, leniency=0.0).tolist() == [1, 3, 4, 5]


def is_same(a: Tensor, b: Tensor) -> bool:
    """The same bits, NaN being NaN."""
    return torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def test_an_answer_depends_on_its_trajectory_alone(rollout: Rollout) -> None:
    """Not on the tasks beside it, so neither on ranks nor on a resume; another iteration has another."""
    judge = build_reward(config_of("simulated_thinking", failure_rate=0.4, leniency=2.0))
    rollout = at(rollout, 3, seed=1)
    whole, again, other = judge(rollout), judge(rollout), judge(at(rollout, 4, seed=1))
    assert is_same(whole.instruction, again.instruction) and torch.equal(whole.valid, again.valid)
    assert not is_same(whole.instruction, other.instruction)
    turned = [2, 3, 0, 1]  # two tasks of two trajectories
    swapped = replace(
        rollout,
        tasks=rollout.tasks[::-1],
        turns=[replace(turn, image=turn.image[turned]) for turn in rollout.turns],
    )
    assert is_same(judge(swapped).instruction[turned], whole.instruction)
    assert torch.equal(judge(swapped).valid[turned], whole.valid)


def test_the_truth_is_kept_and_measured(rollout: Rollout) -> None:
    exact, scores = build_reward(Config())(rollout), build_reward(config_of("simulated_direct"))(rollout)
    assert scores.truth is not None and torch.equal(scores.truth, exact.instruction) and exact.truth is None
    assert is_same(scores.rewards["consistency"], exact.rewards["consistency"]) and scores.valid.all()
    figures = score_figures(scores, torch.ones(4, 2), rollout.group, AdvantageConfig())
    error = scores.instruction - exact.instruction
    assert figures["judge/bias"] == pytest.approx(error.mean().item()) and figures["judge/bias"] > 0
    assert figures["judge/std"] == pytest.approx(error.std(correction=0).item())
    assert "judge/bias" not in score_figures(exact, torch.ones(4, 2), rollout.group, AdvantageConfig())


def test_binary_scores(rollout: Rollout) -> None:
    """A trajectory without a score has none on this scale either."""
    assert quality(torch.tensor([1, 3, 4, 5]), "binary").tolist() == [0, 0, 1, 1]
    assert quality(torch.tensor([1, 3, 4, 5]), "five").tolist() == [0, 0.5, 0.75, 1]
    broken = replace(rollout.turns[1], image=rollout.turns[1].image.clone())
    broken.image[2, 0, 5, 5] = torch.nan
    rollout = replace(rollout, turns=[rollout.turns[0], broken])
    for judge in ("exact", "simulated_direct"):
        scores = build_reward(config_of(judge, scale="binary"))(rollout)
        assert scores.valid.tolist() == [True, True, False, True] and scores.instruction[2].isnan().all()
        assert set(scores.instruction[scores.valid].flatten().tolist()) <= {0, 1}


def test_failures_come_at_the_stated_rate(rollout: Rollout) -> None:
    judge = SimulatedJudge(RewardConfig(judge="simulated_thinking", failure_rate=0.25))
    values = torch.cat([judge(at(rollout, iteration)).values for iteration in range(50)])
    assert torch.equal(values.isnan().any(1), values.isnan().all(1))
    valid = (~values.isnan().any(1)).float()
    assert abs(valid.mean().item() - 0.75) <= 4 * (0.25 * 0.75 / len(valid)) ** 0.5
    never = SimulatedJudge(RewardConfig(judge="simulated_thinking", failure_rate=1.0))
    assert never(rollout).values.isnan().all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"leniency": 1.0}, "reward.leniency is 1.0: judge 'exact' has none"),
        ({"failure_rate": 0.1}, "reward.failure_rate is 0.1: judge 'exact' has none"),
        ({"judge": "simulated_direct", "failure_rate": 1.5}, r"reward.failure_rate is 1.5: must lie in \[0, 1\]"),
        ({"judge": "simulated_direct", "leniency": -1.0}, "reward.leniency is -1.0: must lie in"),
    ],
)
def test_what_is_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RewardConfig(**values)
