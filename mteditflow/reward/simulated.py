"""A VLM judge with known faults, made from the exact verifier: bias, variance, leniency and failures by choice.

    answer = clip(round(grade + bias + leniency corruption [grade < 4] + std eps), 1, 5)

Training sees the answer, evaluation the grade: what a judge's faults do to training can be measured. The profiles,
ours, are after the paper's two ways of asking: a judge that thinks first errs at random, one that answers directly is
kind.
Noise and failures are counted by Philox, so an answer depends neither on the batch nor on ranks nor on a resume.
"""

from dataclasses import dataclass

import torch
from mteditflow_kernels import counter_normal, counter_uniform
from torch import Tensor

from mteditflow.config import RewardConfig
from mteditflow.noise import Place
from mteditflow.reward.exact import ExactInstruction, quality
from mteditflow.types import Rollout, Score
from mteditflow.world.render import render
from mteditflow.world.scenes import Scene
from mteditflow.world.verify import MIN_SCORE_DONE, Reading, read


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Points on the scale from 1 to 5, before rounding and clipping."""

    bias: float
    std: float


PROFILES = {
    "simulated_thinking": Profile(bias=0.1, std=0.9),
    "simulated_direct": Profile(bias=0.8, std=0.3),
}


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


def answer_with_faults(grades: Tensor, damage: Tensor, noise: Tensor, profile: Profile, leniency: float) -> Tensor:
    """Answers 1 to 5 from true grades 1 to 5, corruption and standard normal noise, all (N, K)."""
    points = grades + profile.bias + leniency * damage * (grades < MIN_SCORE_DONE) + profile.std * noise
    return points.round().clamp(1, 5)


class SimulatedJudge:
    """The exact verifier behind a profile; a trajectory whose question fails gets no score."""

    is_remote = False

    def __init__(self, config: RewardConfig) -> None:
        self.config, self.verifier = config, ExactInstruction()

    def __call__(self, rollout: Rollout) -> Score:
        """Instruction scores (N, K), with the truth beside them."""
        grades = self.verifier(rollout).values * 4 + 1
        pictures = rollout.pictures.cpu().nan_to_num()
        damage = torch.stack([corruption(picture) for picture in pictures], dim=1)  # (N, K)
        keys = [rollout.keys(turn=turn, place=Place.JUDGE_ANSWER) for turn in range(len(pictures))]
        noise = torch.cat([counter_normal(turn_keys, (1,)) for turn_keys in keys], dim=1)  # (N, K)
        chance = counter_uniform(rollout.keys(turn=0, place=Place.JUDGE_FAILURE), 1)  # (N, 1)
        answers = answer_with_faults(grades, damage, noise, PROFILES[self.config.judge], self.config.leniency)
        has_failed = (chance < self.config.failure_rate) | grades.isnan()
        values = quality(answers, self.config.scale).masked_fill(has_failed, torch.nan)
        return Score(values=values, truth=quality(grades, self.config.scale))
