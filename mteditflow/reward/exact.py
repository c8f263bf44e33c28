"""The embedded world's own rewards: its verifier reads every picture of a trajectory."""

import torch
from torch import Tensor

from mteditflow.types import Rollout, Score
from mteditflow.world.edits import Session
from mteditflow.world.verify import MIN_SCORE_DONE, consistency, grade, read


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
