"""The embedded world's own rewards: its verifier reads every picture of a trajectory; and a judge with known faults,
made from it: bias, variance, leniency and failures by choice.

    answer = clip(round(grade + bias + leniency corruption [grade < 4] + std eps), 1, 5)

Training sees the answer, evaluation the grade: what a judge's faults do to training can be measured. The profiles,
ours, are after the paper's two ways of asking: a judge that thinks first errs at random, one that answers directly is
kind. Noise and failures are counted by Philox, so an answer depends neither on the batch nor on ranks nor on a resume.
"""

from dataclasses import dataclass

import torch
from mteditflow_kernels import counter_normal, counter_uniform
from torch import Tensor

from mteditflow.config.reward import RewardConfig
from mteditflow.noise import Place
from mteditflow.types import Rollout, Score
from mteditflow.world.edits import Session
from mteditflow.world.render import render
from mteditflow.world.scenes import Scene
from mteditflow.world.verify import MIN_SCORE_DONE, Reading, consistency, grade, read


def grade_pictures(sessions: list[Session], sources: Tensor, pictures: Tensor) -> Tensor:
    """Grade every turn from 1 to 5, (N, K), of N sessions with pictures (K, N, 3, 64, 64)."""
    before, grades = read(sources), []
    for turn, picture in enumerate(pictures):
        after = read(picture)
        grades.append(grade([session.edits[turn] for session in sessions], before, after))
        before = after
    return torch.tensor(grades).T


def measure_consistency(sessions: list[Session], sources: Tensor, pictures: Tensor) -> Tensor:
    """Compare every turn's picture with the source, (N, K), NaN where nothing is left untouched."""
    return torch.tensor(
        [
            [consistency(s, turn, i0, ik) for s, i0, ik in zip(sessions, sources, picture, strict=True)]
            for turn, picture in enumerate(pictures)
        ]
    ).T


def quality(grades: Tensor, scale: str) -> Tensor:
    """q in [0, 1] of grades 1 to 5: (grade - 1) / 4 on scale 'five', whether the turn counts as done on 'binary'."""
    return (grades >= MIN_SCORE_DONE).float() if scale == "binary" else (grades.float() - 1) / 4


def read_rollout(rollout: Rollout) -> tuple[list[Session], Tensor, Tensor]:
    """Sessions (N), sources (N, 3, H, W) and pictures (K, N, 3, H, W) of a rollout, on the CPU.

    ValueError where a task is a user's own.
    """
    sessions = [rollout.tasks[g].truth for g in rollout.group.tolist()]
    if any(session is None for session in sessions):
        raise ValueError("a task has no truth to compare with: take another reward.judge, which looks at the pictures")
    return sessions, rollout.sources.cpu(), rollout.pictures.cpu()


class ExactInstruction:
    """The verifier's grades; a trajectory with a non-finite pixel gets none."""

    is_remote = False

    def __init__(self, scale: str = "five") -> None:
        self.scale = scale

    def __call__(self, rollout: Rollout) -> Score:
        """Instruction scores (N, K)."""
        sessions, sources, pictures = read_rollout(rollout)
        is_finite = pictures.isfinite().all(dim=0).flatten(1).all(dim=1)
        grades = grade_pictures(sessions, sources, pictures.nan_to_num())
        return Score(values=quality(grades, self.scale).masked_fill(~is_finite[:, None], torch.nan))


class ExactConsistency:
    """The verifier's comparison of what no edit has touched with the source."""

    is_remote = False

    def __call__(self, rollout: Rollout) -> Score:
        """Consistency (N, K) in [0, 1]."""
        sessions, sources, pictures = read_rollout(rollout)
        return Score(values=measure_consistency(sessions, sources, pictures.nan_to_num()))


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
