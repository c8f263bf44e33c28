"""The values that flow through a training step.

Legend: P tasks, G trajectories per group, N = P*G, K turns, S denoising steps, L latent tokens, C latent channels,
T text tokens, B rows of a microbatch, H x W pixels. Trajectories are ordered by task: row n belongs to task n // G.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mteditflow.flow import Schedule
from mteditflow.noise import NoiseSource, Place, row_keys

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in shares of width and height."""
Shape = tuple[tuple[int, int], ...]
"""What the sessions of a batch have alike: height and width of the source and its edits, then of each reference."""


@dataclass(frozen=True, kw_only=True)
class Region:
    """An object of the source image."""

    name: str
    box: Box | None = None  # None: unknown


@dataclass(frozen=True, kw_only=True)
class EditTask:
    """One multi-turn editing session to be carried out: a source image and K instructions."""

    id: int
    source: Tensor  # (3, H, W) in [-1, 1]
    instructions: tuple[str, ...]  # K
    edit_types: tuple[str, ...]  # K
    references: tuple[Tensor, ...] = ()  # (3, h, w) each: further pictures, which every turn is given as they are
    truth: Any = None  # for the embedded world, its Session: what the exact verifier needs to know
    objects: tuple[Region, ...] = ()  # all that were found in the source, touched or not; (): unknown
    untouched: tuple[tuple[Region, ...], ...] = ()  # K: what no instruction so far touches; (): unknown

    @property
    def shape(self) -> Shape:
        """The sizes of its pictures."""
        return tuple((image.shape[1], image.shape[2]) for image in (self.source, *self.references))


@dataclass(frozen=True, kw_only=True)
class Condition:
    """What the velocity is conditioned on, fixed within a turn."""

    text: dict[str, Tensor]  # (N, ...) each: what the family's text encoders made of the instructions
    image: Tensor  # (N, L', C) clean latents of the image that is edited, then of the references
    cfg_scale: float = 1.0  # true classifier-free guidance; 1: none

    def rows(self, index: Tensor) -> "Condition":
        """The condition of some trajectories; `index` (B,) int64."""
        text = {name: value[index] for name, value in self.text.items()}
        return Condition(text=text, image=self.image[index], cfg_scale=self.cfg_scale)


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One instruction carried out by all N trajectories."""

    condition: Condition
    latents: Tensor  # (S+1, N, L, C); [0] noise, [S] the edit
    old_log_prob: Tensor  # (S, N); NaN at ODE steps
    image: Tensor  # (N, 3, H, W) in [-1, 1]: the next turn's input


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """K turns of N trajectories, of tasks of one shape."""

    tasks: list[EditTask]
    turns: list[Turn]
    group: Tensor  # (N,) int64: the task's place in `tasks`
    member: Tensor  # (N,) int64: the trajectory's number in its group
    schedule: Schedule  # made the denoising steps
    noise: NoiseSource  # made all that was random, and makes what is drawn from this rollout later

    @property
    def parts(self) -> "tuple[Rollout, ...]":
        """Itself, as the one part of a rollout of one shape."""
        return (self,)

    @property
    def shape(self) -> Shape:
        """That of its tasks."""
        return self.tasks[0].shape

    @property
    def sources(self) -> Tensor:
        """The source image of every trajectory, (N, 3, H, W)."""
        return torch.stack([task.source for task in self.tasks])[self.group]

    @property
    def pictures(self) -> Tensor:
        """The edited images, (K, N, 3, H, W)."""
        return torch.stack([turn.image for turn in self.turns])

    def keys(self, *, turn: int, place: Place, number: int = 0) -> Tensor:
        """Noise keys (N, 5) of the trajectories, at a draw of a place within a turn."""
        task_ids = torch.tensor([task.id for task in self.tasks])
        return row_keys(task_ids[self.group], self.member, self.noise, turn=turn, place=place, number=number)


@dataclass(frozen=True, kw_only=True)
class Rollouts:
    """K turns of N trajectories, of tasks of several shapes."""

    parts: tuple[Rollout, ...]  # in the order of the trajectories, each of one shape


@dataclass(frozen=True, kw_only=True)
class Score:
    """What one reward says of N trajectories."""

    values: Tensor  # (N, K); NaN where undefined
    truth: Tensor | None = None  # (N, K): what the values should be, where that is known and may differ
    words: tuple[str, ...] = ()  # N: a judge's own, '' where it had none; (): no such judge
    faults: Tensor | None = None  # (N,) int64: why there are no values, a place in FAULTS; None: no such judge
    off_mass: Tensor | None = None  # (N,): probability that a judge gave to what is no score, read-out 'expected'


FAULTS = ("", "not_finite", "form", "cut", "refused", "empty", "status", "late", "too_large", "mass", "broken")
"""Why a trajectory has no score: '' it has one; a pixel is not finite; the answer has another form, was cut, is a
refusal, or empty; the server refused the question, answered too late or too much; the mass is on other tokens; the
connection broke, or gave no answer in the form of one."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What all rewards say of N trajectories, by name; the first is the instruction score, (score - 1) / 4."""

    rewards: dict[str, Tensor]  # (N, K) each; NaN where undefined
    weights: dict[str, float]
    valid: Tensor  # (N,) bool; False where the instruction score is undefined
    truth: Tensor | None = None  # as in the instruction score's `Score`; so the rest
    words: tuple[str, ...] = ()
    faults: Tensor | None = None
    off_mass: Tensor | None = None

    @property
    def instruction(self) -> Tensor:
        """The first reward, (N, K)."""
        return next(iter(self.rewards.values()))


@dataclass(frozen=True, kw_only=True)
class Transitions:
    """B denoising steps to learn from."""

    condition: Condition
    latents: Tensor  # (B, L, C)
    next_latents: Tensor  # (B, L, C)
    step: Tensor  # (B,) int64, row of the table
    sigma: Tensor  # (B,)
    sigma_next: Tensor  # (B,)
    old_log_prob: Tensor  # (B,)
    advantage: Tensor  # (B,)


@dataclass(frozen=True, kw_only=True)
class Microbatch:
    """Rows of a rollout that go through the model together in training, at one turn and one draw."""

    part: int = 0  # of the rollout
    turn: int
    draw: int  # a denoising step (GRPO), or a number (NFT)
    rows: Tensor  # (B,) int64, of the part
    weight: Tensor  # (B,) of each row's loss; 0 for a row that only fills the microbatch
