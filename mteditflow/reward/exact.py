"""The exact reward: the embedded world's verifier reads every picture of a trajectory."""

import torch
from torch import Tensor

from mteditflow.types import Rollout, Scores
from mteditflow.world.edits import Session
from mteditflow.world.verify import consistency, grade, read


def score_pictures(sessions: list[Session], sources: Tensor, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Grades 1 to 5 (N, K) and consistency (N, K), NaN where undefined, of N sessions with pictures (K, N, 3, 64,
    64).
    """
    before, grades, kept = read(sources), [], []
    for turn, picture in enumerate(pictures):
        after = read(picture)
        grades.append(grade([session.edits[turn] for session in sessions], before, after))
        kept.append([consistency(s, turn, i0, ik) for s, i0, ik in zip(sessions, sources, picture, strict=True)])
        before = after
    return torch.tensor(grades).T, torch.tensor(kept).T


class ExactReward:
    """q = (grade - 1) / 4 and consistency against the source; a trajectory with a non-finite pixel is not valid."""

    def __call__(self, rollout: Rollout) -> Scores:
        """Scores of the N trajectories."""
        sessions = [rollout.tasks[g].truth for g in rollout.group.tolist()]
        sources = torch.stack([task.source for task in rollout.tasks])[rollout.group].cpu()
        pictures = torch.stack([turn.image for turn in rollout.turns]).cpu()  # (K, N, 3, H, W)
        valid = pictures.isfinite().all(dim=0).flatten(1).all(dim=1)
        grades, kept = score_pictures(sessions, sources, pictures.nan_to_num())
        return Scores(instruction=(grades.float() - 1) / 4, consistency=kept, valid=valid)
