"""Counted randomness: every random number is a function of (seed, step, task, trajectory, turn, place, element).

Philox counts the numbers of a key (`mteditflow_kernels.philox`), so a trajectory has the same noise whatever the batch,
its place in it, the number of ranks, or a resume. `Place` is the register of what is drawn within a turn: two uses of
one place would be the same noise.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, unique

import torch
from mteditflow_kernels import noise_keys
from torch import Tensor

NUM_PLACES = 2**16  # of a turn: the low half of a key's number; the turn is the high half
TURN_SHIFT = 16


@unique
class Place(Enum):
    """Where each use of randomness stands within a turn: its first place, and how many it has."""

    DENOISING_STEP = (0, 2**15)
    NFT_TIMES = (2**15, 1)
    NFT_NOISE = (2**15 + 1, 2**14 - 1)  # one for each training time
    JUDGE_ANSWER = (2**15 + 2**14, 1)
    JUDGE_FAILURE = (2**15 + 2**14 + 1, 1)
    VLM_QUESTION = (2**15 + 2**14 + 2, 10)  # one for each try; the tokens of an answer count on in the turn's place
    INITIAL_LATENTS = (2**16 - 1, 1)

    def at(self, number: int = 0) -> int:
        """The place of the use's `number`-th draw."""
        first, size = self.value
        assert 0 <= number < size, (self.name, number)
        return first + number


@dataclass(frozen=True, kw_only=True)
class NoiseSource:
    """What all noise of a rollout depends on: the run's seed and the iteration."""

    seed: int
    step: int


EVALUATION = NoiseSource(seed=20_606, step=2**31)
"""Of every evaluation, so that all are paired; training counts its iterations from 0."""


def row_keys(
    task_ids: Sequence[int] | Tensor, members: Tensor, source: NoiseSource, *, turn: int, place: Place, number: int = 0
) -> Tensor:
    """Noise keys (N, 5) int64 of trajectories, each the member (N,) of its task's group, at the `number`-th draw of a
    place.
    """
    return noise_keys(
        seed=source.seed, step=source.step, task=torch.as_tensor(task_ids), trajectory=members, turn=turn,
        denoising_step=place.at(number),
    )  # fmt: skip
