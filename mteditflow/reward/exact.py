"""The exact reward: the embedded world's verifier reads every picture of a trajectory."""

import torch
from torch import Tensor

from mteditflow.types import Rollout, Scores
from mteditflow.world.edits import Session
from mteditflow.world.verify import MIN_SCORE_DONE, consistency, grade, read


def score_pictures(sessions: list[Session], sources: Tensor, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Grades 1 to 5 (N, K) and consistency (N, K), NaN where undefined, of N sessions with pictures (K, N, 3, 64,
    64). ValueError where a session is None: a task of a user's own.
    """
    if any(session is None for session in sessions):
        raise ValueError(
            "reward.judge is 'exact': a task has no truth to compare with; take a judge that looks at yours"
        )
    before, grades, kept = read(sources), [], []
    for turn, picture in enumerate(pictures):
        after = read(picture)
        grades.append(grade([session.edits[turn] for session in sessions], before, after))
        kept.append([consistency(s, turn, i0, ik) for s, i0, ik in zip(sessions, sources, picture, strict=True)])
        before = after
    return torch.tensor(grades).T, torch.tensor(kept).T


def quality(grades: Tensor, scale: str) -> Tensor:
    """q in [0, 1] of grades 1 to 5: (grade - 1) / 4 on scale 'five', whether the turn counts as done on 'binary'."""
    return (grades >= MIN_SCORE_DONE).float() if scale == "binary" else (grades.float() - 1) / 4


class ExactReward:
    """The verifier's grades and consistency against the source; a trajectory with a non-finite pixel is not valid."""

    def __init__(self, scale: str = "five") -> None:
        self.scale = scale

    def __call__(self, rollout: Rollout) -> Scores:
        """Scores of the N trajectories."""
        sessions = [rollout.tasks[g].truth for g in rollout.group.tolist()]
        sources = torch.stack([task.source for task in rollout.tasks])[rollout.group].cpu()
        pictures = torch.stack([turn.image for turn in rollout.turns]).cpu()  # (K, N, 3, H, W)
        valid = pictures.isfinite().all(dim=0).flatten(1).all(dim=1)
        grades, kept = score_pictures(sessions, sources, pictures.nan_to_num())
        return Scores(instruction=quality(grades, self.scale), consistency=kept, valid=valid)
