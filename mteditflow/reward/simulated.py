"""A VLM judge with known faults, made from the exact verifier: bias, variance, leniency and failures by choice.

    answer = clip(round(grade + bias + leniency corruption [grade < 4] + std eps), 1, 5)

Training sees the answer, evaluation the grade: what a judge's faults do to training can be measured. The profiles,
ours, are after the paper's two ways of asking: a judge that thinks first errs at random, one that answers directly is
kind.
Noise and failures are counted by Philox, so an answer depends neither on the batch nor on ranks nor on a resume.
"""

from dataclasses import dataclass, replace

import torch
from mteditflow_kernels import counter_normal, counter_uniform
from torch import Tensor

from mteditflow.config import RewardConfig
from mteditflow.noise import Place
from mteditflow.reward.exact import ExactReward, quality
from mteditflow.types import Rollout, Scores
from mteditflow.world.render import render
from mteditflow.world.scenes import Scene
from mteditflow.world.verify import MIN_SCORE_DONE, Reading, read


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Points on the scale from 1 to 5, before rounding and clipping."""

    bias: float
    std: float


PROFILES = {"thinking": Profile(bias=0.1, std=0.9), "direct": Profile(bias=0.8, std=0.3)}


def corruption(pictures: Tensor) -> Tensor:
    """How far pictures (N, 3, 64, 64) are from any that the world can draw, (N,) in [0, 1].

    Mean absolute difference to the clean drawing of what is read in them, in units of half the range of a pixel; a
    place that cannot be read counts as empty. 0 for the world's own pictures.
    """
    clean = render([_scene(reading) for reading in read(pictures)]).to(pictures)
    return (pictures - clean).abs().flatten(1).mean(1).clamp(max=1)


def _scene(reading: Reading) -> Scene:
    a, b, c, d = (None if isinstance(cell, str) else cell for cell in reading.cells)
    return Scene(background=reading.background, cells=(a, b, c, d))


def answers(grades: Tensor, damage: Tensor, noise: Tensor, profile: Profile, leniency: float) -> Tensor:
    """Answers 1 to 5 from true grades 1 to 5, corruption and standard normal noise, all (N, K)."""
    shown = grades + profile.bias + leniency * damage * (grades < MIN_SCORE_DONE) + profile.std * noise
    return shown.round().clamp(1, 5)


def answer_probabilities(grade: int, profile: Profile) -> Tensor:
    """(5,) of the answers 1 to 5 to an undamaged turn of that grade, float64."""
    edges = torch.tensor([-torch.inf, 1.5, 2.5, 3.5, 4.5, torch.inf], dtype=torch.float64)
    return torch.special.ndtr((edges - grade - profile.bias) / profile.std).diff()


class SimulatedJudge:
    """The exact verifier behind a profile; a trajectory whose question fails is not valid."""

    def __init__(self, config: RewardConfig) -> None:
        self.config = config

    def __call__(self, rollout: Rollout) -> Scores:
        """Scores of the N trajectories."""
        exact = ExactReward()(rollout)
        images = torch.stack([turn.image for turn in rollout.turns]).cpu().nan_to_num()  # (K, N, 3, H, W)
        damage = torch.stack([corruption(picture) for picture in images], dim=1)  # (N, K)
        keys = [rollout.keys(turn=turn, place=Place.JUDGE_ANSWER) for turn in range(len(images))]
        noise = torch.cat([counter_normal(own, (1,)) for own in keys], dim=1)  # (N, K)
        chance = counter_uniform(rollout.keys(turn=0, place=Place.JUDGE_FAILURE), 1)[:, 0]
        grades = exact.instruction * 4 + 1
        shown = answers(grades, damage, noise, PROFILES[self.config.judge], self.config.leniency)
        return replace(
            exact,
            instruction=quality(shown, self.config.scale),
            truth=quality(grades, self.config.scale),
            valid=exact.valid & (chance >= self.config.failure_rate),
        )
