"""Instruction following by a vision-language model (MT-EditFlow, arXiv 2606.01985): one question per trajectory.

It shows the source I_0, the K instructions and the K edited images in order, and asks for a score from 1 to 5 per turn,
after reasoning ('thinking', which the paper finds better) or at once. The rubric and the form of the answer are the
paper's; the words around them are ours. An answer that does not have that form is asked for again with another seed;
after the last try the trajectory is invalid, and gets no number.

Scoring needs tasks and images alone, no policy.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from mteditflow.config.reward import RewardConfig
from mteditflow.noise import Place
from mteditflow.pictures import to_uint8
from mteditflow.reward.exact import quality
from mteditflow.types import FAULTS, Rollout, Score

IMAGE_SIZE = 512  # longest side of the images that the judge is shown, pixels; larger ones are shrunk. Ours
SCORE = re.compile(r"<Turn(\d)Score>\s*([1-5])\s*</Turn\1Score>")

RUBRIC = """You judge the work of an image editor. You see a source image and then, turn by turn, an instruction and \
the image after it. Each turn edits the image of the turn before, so compare each image with the one before it.

Score every turn with a whole number from 1 to 5:
1: failed. The instruction was not carried out.
2: minimal. There is a trace of what was asked for.
3: partial. Some of what was asked for is there, some is missing or wrong.
4: mostly compliant. What was asked for is there, with small faults, or with small changes elsewhere.
5: fully compliant. Exactly what was asked for, and everything else preserved."""
THINKING = "First write one block <Thought>...</Thought> that goes through the turns one by one. After it, write the \
scores, each X a whole number from 1 to 5, in this form and nothing else:"
DIRECT = "Do not explain. Write the scores at once, each X a whole number from 1 to 5, in this form and nothing else:"


@dataclass(frozen=True, kw_only=True)
class Question:
    """What the judge is asked about one trajectory."""

    images: tuple[Tensor, ...]  # K + 1 of (3, h, w) uint8 on the host: the source, then the edits
    instructions: tuple[str, ...]  # K
    readout: str  # as in RewardConfig
    key: Tensor  # (5,) int64: what the sampling of the answer depends on
    rubric: str = RUBRIC  # the system's text

    @property
    def parts(self) -> list[str | Tensor]:
        """The user's message: text and images in their order."""
        parts: list[str | Tensor] = ["Source image:", self.images[0]]
        for turn, (instruction, image) in enumerate(zip(self.instructions, self.images[1:], strict=True), start=1):
            parts += [f"Turn {turn}. Instruction: {instruction}\nImage after turn {turn}:", image]
        form = "\n".join(f"<Turn{turn}Score>X</Turn{turn}Score>" for turn in range(1, len(self.instructions) + 1))
        return [*parts, f"{THINKING if self.readout == 'thinking' else DIRECT}\n{form}"]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the judge said to one question."""

    text: str  # its own words, whatever their form
    grades: tuple[float, ...] | None  # K in [1, 5]; None: it gave none that can be used
    fault: str = ""  # why there are none: one of FAULTS, and after a colon what more there is to say
    off_mass: float = 0.0  # read-out 'expected': the largest probability at a turn's place of what is no score


class Ask(Protocol):
    """A VLM: questions -> answers, in order. An answer depends on its own question alone, its key included."""

    is_remote: bool
    """Whether several threads may ask at once; else one does, and it is always the same."""

    def __call__(self, questions: Sequence[Question]) -> list[Answer]:
        """One answer per question; what is wrong with one question alone is an answer with a fault. ValueError, one
        line, where no VLM can be asked at all.
        """
        ...

    def close(self) -> None:
        """Have what is on its way end soon."""
        ...


def read_answer(text: str, num_turns: int) -> list[int] | None:
    """The scores of turns 1 to K after the last </Thought>, each there once; None where the answer has another form.

    The closing tag keeps 4.5 or 10 from being read as 4 or 1. A thought that was cut off holds no scores.
    """
    rest = text.rpartition("</Thought>")[2]
    found = [(int(turn), int(score)) for turn, score in SCORE.findall(rest)]
    if "<Thought>" in rest or sorted(turn for turn, _ in found) != list(range(1, num_turns + 1)):
        return None
    return [score for _, score in sorted(found)]


def closed_at(text: str, num_turns: int) -> int | None:
    """Where the tags of all turns have been closed, after the thought; None: not yet."""
    start = text.rfind("</Thought>") + 1
    tags = [f"</Turn{turn}Score>" for turn in range(1, num_turns + 1)]
    if "<Thought>" in text[start:] or any(tag not in text[start:] for tag in tags):
        return None
    return max(text.index(tag, start) + len(tag) for tag in tags)


def answer_of(text: str, num_turns: int) -> Answer:
    """The answer that a text is."""
    grades = read_answer(text, num_turns)
    return Answer(text=text, grades=tuple(grades) if grades else None, fault="" if grades else "form")


def to_judge_size(pictures: Tensor, size: int) -> Tensor:
    """Pictures (N, 3, H, W) in [-1, 1] as the judge sees them: uint8 on the host, longest side at most `size`."""
    longest = max(pictures.shape[-2:])
    pictures = pictures.float()
    if longest > size:
        height, width = (max(1, round(side * size / longest)) for side in pictures.shape[-2:])
        pictures = interpolate(pictures, (height, width), mode="bicubic", antialias=True)
    return to_uint8(pictures).cpu()


class VlmJudge:
    """Instruction scores by the VLM behind `ask`."""

    def __init__(self, config: RewardConfig, ask: Ask) -> None:
        self.config, self.ask = config, ask
        self.is_remote = ask.is_remote

    def close(self) -> None:
        """Have what is on its way end soon."""
        self.ask.close()

    def __call__(self, rollout: Rollout) -> Score:
        """Instruction scores (N, K).

        A trajectory without a score is NaN at every turn; one with a non-finite pixel is not asked about.
        """
        num_turns, num_rows = rollout.pictures.shape[:2]
        is_finite = rollout.pictures.isfinite().flatten(2).all(2).all(0).cpu()  # (N,)
        answers = [Answer(text="", grades=None, fault="not_finite")] * num_rows
        rows = is_finite.nonzero()[:, 0].tolist()  # those that still need scores
        is_repeated = self.config.readout == "expected" and not self.is_remote  # the same every time
        for attempt in range(1 if is_repeated else self.config.num_retries + 1):
            if not rows:
                break
            for row, answer in zip(rows, self.ask(self._questions(rollout, rows, attempt)), strict=True):
                answers[row] = answer
            rows = [row for row in rows if answers[row].grades is None]
        grades = torch.tensor([answer.grades or (math.nan,) * num_turns for answer in answers])
        return Score(
            values=quality(grades, self.config.scale).masked_fill(grades.isnan(), math.nan),
            words=tuple(answer.text for answer in answers),
            faults=torch.tensor([FAULTS.index(answer.fault.partition(":")[0]) for answer in answers]),
            off_mass=torch.tensor([answer.off_mass for answer in answers]),
        )

    def _questions(self, rollout: Rollout, rows: list[int], attempt: int) -> list[Question]:
        keys = rollout.keys(turn=0, place=Place.VLM_QUESTION, number=attempt)
        group = rollout.group.tolist()
        sources = {g: to_judge_size(rollout.tasks[g].source[None], IMAGE_SIZE)[0] for g in {group[row] for row in rows}}
        edits = [to_judge_size(picture[rows], IMAGE_SIZE) for picture in rollout.pictures]
        return [
            Question(
                images=(sources[group[row]], *(edit[place] for edit in edits)),
                instructions=rollout.tasks[group[row]].instructions[: len(edits)],
                readout=self.config.readout,
                key=keys[row],
            )
            for place, row in enumerate(rows)
        ]
