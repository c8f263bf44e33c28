"""The simulated judge: its faults are those that are stated, and counted; training sees them, the truth is kept."""

from dataclasses import replace

import pytest
import torch
from mteditflow_kernels import counter_normal

from mteditflow.config import Config, RewardConfig
from mteditflow.data import training_tasks
from mteditflow.distributed import Ranks
from mteditflow.policy import build_policy
from mteditflow.record.metrics import score_figures
from mteditflow.reward import build_reward
from mteditflow.reward.exact import ExactReward, quality
from mteditflow.reward.simulated import PROFILES, SimulatedJudge, answer_probabilities, answers, corruption
from mteditflow.rollout import row_keys, sample_rollout
from mteditflow.types import Rollout
from mteditflow.world.edits import make_session
from mteditflow.world.render import render

ONE_RANK = Ranks(rank=0, world_size=1, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def rollout(tiny_config: Config) -> Rollout:
    policy = build_policy(tiny_config.model, tiny_config.lora, seed=0, has_old=False)
    return sample_rollout(policy, training_tasks(tiny_config, 0, ONE_RANK), tiny_config, 0)


@pytest.mark.parametrize("name", PROFILES)
def test_answers_have_the_stated_distribution(name: str) -> None:
    """Rounding and clipping included: 20,000 answers to each grade, each frequency within 5 standard deviations."""
    tasks = training_tasks(Config(), 0, ONE_RANK)
    keys = row_keys(tasks, 2500, seed=3, step=0, turn=0, denoising_step=5)
    noise = counter_normal(keys, (1,))
    for grade in range(1, 6):
        given = answers(torch.full_like(noise, grade), torch.zeros(()), noise, PROFILES[name], leniency=0.0)
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
    assert abs(error["thinking"][0]) < 0.1 < 0.4 < error["direct"][0]
    assert error["direct"][1] < 0.6 < 0.7 < error["thinking"][1]


def test_corruption_is_zero_for_the_worlds_own_pictures_and_grows() -> None:
    clean = render([make_session(str(i), 1, held_out=False).source for i in range(4)])
    assert corruption(clean).max() == 0
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    levels = [corruption((clean + level * noise).clamp(-1, 1)).mean().item() for level in (0.0, 0.1, 0.3, 1.0)]
    assert levels == sorted(levels) and levels[3] > 0.3
    assert levels[1] == pytest.approx(0.1 * (2 / torch.pi) ** 0.5, rel=0.2)  # mean |noise|, a little clipped


def test_leniency_goes_to_failed_turns_alone() -> None:
    grades, damage, zero = torch.tensor([1.0, 3.0, 4.0, 5.0]), torch.full((4,), 0.5), torch.zeros(4)
    kind = replace(PROFILES["direct"], bias=0.0)
    assert answers(grades, damage, zero, kind, leniency=4.0).tolist() == [3, 5, 4, 5]
    assert answers(grades, damage, zero, kind, leniency=0.0).tolist() == [1, 3, 4, 5]


def test_an_answer_depends_on_its_trajectory_alone(tiny_config: Config, rollout: Rollout) -> None:
    """Not on the tasks beside it, so neither on ranks nor on a resume; another iteration has another."""
    judge = build_reward(RewardConfig(judge="thinking", failure_rate=0.4, leniency=2.0), seed=1)
    whole, again, other = judge(rollout, 3), judge(rollout, 3), judge(rollout, 4)
    assert torch.equal(whole.instruction, again.instruction) and torch.equal(whole.valid, again.valid)
    assert not (torch.equal(whole.instruction, other.instruction) and torch.equal(whole.valid, other.valid))
    turned = [2, 3, 0, 1]  # two tasks of two trajectories
    swapped = replace(
        rollout,
        tasks=rollout.tasks[::-1],
        turns=[replace(turn, image=turn.image[turned]) for turn in rollout.turns],
    )
    assert torch.equal(judge(swapped, 3).instruction[turned], whole.instruction)
    assert torch.equal(judge(swapped, 3).valid[turned], whole.valid)


def test_the_truth_is_kept_and_measured(rollout: Rollout) -> None:
    exact = ExactReward()(rollout)
    scores = SimulatedJudge(RewardConfig(judge="direct"))(rollout, 0)
    assert scores.truth is not None and torch.equal(scores.truth, exact.instruction) and exact.truth is None
    assert torch.equal(scores.consistency.nan_to_num(), exact.consistency.nan_to_num()) and scores.valid.all()
    figures = score_figures(scores, torch.ones(4, 2), rollout.group)
    error = scores.instruction - exact.instruction
    assert figures["judge/bias"] == pytest.approx(error.mean().item()) and figures["judge/bias"] > 0
    assert figures["judge/std"] == pytest.approx(error.std(correction=0).item())
    assert "judge/bias" not in score_figures(exact, torch.ones(4, 2), rollout.group)


def test_binary_scores() -> None:
    assert quality(torch.tensor([1, 3, 4, 5]), "binary").tolist() == [0, 0, 1, 1]
    assert quality(torch.tensor([1, 3, 4, 5]), "five").tolist() == [0, 0.5, 0.75, 1]


def test_failures_come_at_the_stated_rate(rollout: Rollout) -> None:
    judge = SimulatedJudge(RewardConfig(judge="thinking", failure_rate=0.25), seed=0)
    valid = torch.cat([judge(rollout, iteration).valid for iteration in range(50)]).float()
    assert abs(valid.mean().item() - 0.75) <= 4 * (0.25 * 0.75 / len(valid)) ** 0.5
    assert not SimulatedJudge(RewardConfig(judge="thinking", failure_rate=1.0))(rollout, 0).valid.any()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"leniency": 1.0}, "reward.leniency is 1.0: judge 'exact' has none"),
        ({"failure_rate": 0.1}, "reward.failure_rate is 0.1: judge 'exact' has none"),
        ({"judge": "direct", "failure_rate": 1.5}, r"reward.failure_rate is 1.5: must lie in \[0, 1\]"),
        ({"judge": "direct", "leniency": -1.0}, "reward.leniency is -1.0: must not be negative"),
    ],
)
def test_what_is_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RewardConfig(**values)
