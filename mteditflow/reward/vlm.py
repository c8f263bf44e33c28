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
from mteditflow.config.rubric import fill_rubric, form_of, read_rubric
from mteditflow.noise import Place
from mteditflow.pictures import to_uint8
from mteditflow.reward.exact import ExactInstruction, quality
from mteditflow.types import FAULTS, EditTask, Rollout, Score

IMAGE_SIZE = 512  # longest side of the images that the judge is shown, pixels; larger ones are shrunk. Ours
SCORE = re.compile(r"<Turn(\d)Score>[\s*_`]*([1-5])[\s*_`]*</Turn\1Score>")  # some write it bold
THOUGHT_ENDS = ("</Thought>", "</think>")  # ours, and that of models that think unasked
MAX_OFF_MASS = 0.5  # of the probability at a turn's place, read-out 'expected': above it the answer is no score

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

    images: tuple[Tensor, ...]  # (3, h, w) uint8 on the host: the source, references if any, then the K edits
    instructions: tuple[str, ...]  # K
    readout: str  # as in RewardConfig
    key: Tensor  # (5,) int64: what the sampling of the answer depends on
    rubric: str = RUBRIC  # the system's text

    @property
    def parts(self) -> list[str | Tensor]:
        """The user's message: text and images in their order."""
        parts: list[str | Tensor] = ["Source image:", self.images[0]]
        num_references = len(self.images) - 1 - len(self.instructions)
        references, edits = self.images[1 : 1 + num_references], self.images[1 + num_references :]
        for number, image in enumerate(references, start=2):
            parts += [f"Reference image, which instructions may call image {number}:", image]
        for turn, (instruction, image) in enumerate(zip(self.instructions, edits, strict=True), start=1):
            parts += [f"Turn {turn}. Instruction: {instruction}\nImage after turn {turn}:", image]
        return [*parts, f"{THINKING if self.readout == 'thinking' else DIRECT}\n{form_of(len(self.instructions))}"]


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
    """The scores of turns 1 to K after the last thought, each there once; None where the answer has another form.

    The closing tag keeps 4.5 or 10 from being read as 4 or 1. A thought that was cut off holds no scores.
    """
    rest = after_thought(text)
    found = [(int(turn), int(score)) for turn, score in SCORE.findall(rest)]
    if is_thought(rest) or sorted(turn for turn, _ in found) != list(range(1, num_turns + 1)):
        return None
    return [score for _, score in sorted(found)]


def after_thought(text: str) -> str:
    """The end of an answer, behind the last thought."""
    for end in THOUGHT_ENDS:
        text = text.rpartition(end)[2]
    return text


def is_thought(rest: str) -> bool:
    """Whether what `after_thought` gives begins another thought, which is not closed."""
    return any(end.replace("/", "") in rest for end in THOUGHT_ENDS)


def closed_at(text: str, num_turns: int) -> int | None:
    """Where the tags of all turns have been closed, after the thought; None: not yet."""
    rest = after_thought(text)
    tags = [f"</Turn{turn}Score>" for turn in range(1, num_turns + 1)]
    if is_thought(rest) or any(tag not in rest for tag in tags):
        return None
    return len(text) - len(rest) + max(rest.index(tag) + len(tag) for tag in tags)


def rubric_of(config: RewardConfig, num_turns: int) -> str:
    """What a judge is told of sessions of K turns."""
    return fill_rubric(read_rubric(config.rubric) if config.rubric else RUBRIC, num_turns)


def sample_question(task: EditTask, num_turns: int, config: RewardConfig) -> Question:
    """A question about a task whose edits are all its source, to try a judge with before there is a rollout."""
    given = _given(task)
    instructions = [task.instructions[turn % len(task.instructions)] for turn in range(num_turns)]
    return Question(
        images=(*given, *[given[0]] * num_turns),
        instructions=tuple(instructions),
        readout=config.readout,
        key=torch.zeros(5, dtype=torch.int64),
        rubric=rubric_of(config, num_turns),
    )


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


def _given(task: EditTask) -> list[Tensor]:
    """Source and references of a task as the judge sees them."""
    return [to_judge_size(image[None], IMAGE_SIZE)[0] for image in (task.source, *task.references)]


class VlmJudge:
    """Instruction scores by the VLM behind `ask`."""

    def __init__(self, config: RewardConfig, ask: Ask) -> None:
        self.config, self.ask = config, ask
        self.is_remote = ask.is_remote
        self.rubric = read_rubric(config.rubric) if config.rubric else RUBRIC

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
        has_truth = all(task.truth is not None for task in rollout.tasks)
        grades = torch.tensor([answer.grades or (math.nan,) * num_turns for answer in answers])
        return Score(
            values=quality(grades, self.config.scale).masked_fill(grades.isnan(), math.nan),
            truth=ExactInstruction(self.config.scale)(rollout).values if has_truth else None,
            words=tuple(answer.text for answer in answers),
            faults=torch.tensor([FAULTS.index(answer.fault.partition(":")[0]) for answer in answers]),
            off_mass=torch.tensor([answer.off_mass for answer in answers]),
        )

    def _questions(self, rollout: Rollout, rows: list[int], attempt: int) -> list[Question]:
        keys = rollout.keys(turn=0, place=Place.VLM_QUESTION, number=attempt)
        group = rollout.group.tolist()
        given = {g: _given(rollout.tasks[g]) for g in {group[row] for row in rows}}
        edits = [to_judge_size(picture[rows], IMAGE_SIZE) for picture in rollout.pictures]
        return [
            Question(
                images=(*given[group[row]], *(edit[place] for edit in edits)),
                instructions=rollout.tasks[group[row]].instructions[: len(edits)],
                readout=self.config.readout,
                key=keys[row],
                rubric=fill_rubric(self.rubric, len(edits)),
            )
            for place, row in enumerate(rows)
        ]
