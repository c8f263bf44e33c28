"""Rewards: rollout -> scores, one instruction score and one consistency per turn of every trajectory."""

from typing import Protocol

from mteditflow.reward.exact import ExactReward
from mteditflow.types import Rollout, Scores


class Reward(Protocol):
    """Scores the N trajectories of a rollout. A trajectory that could not be scored is not valid; it never gets a
    default number.
    """

    def __call__(self, rollout: Rollout) -> Scores:
        """Scores of N trajectories."""
        ...


def build_reward() -> Reward:
    """The reward of the embedded world."""
    return ExactReward()
