"""`mteditflow judge check`: whether the judge of a config can be used, by sessions whose grades are known.

They are of the embedded world: drawn as every instruction wants it, which its verifier grades 5 throughout, and left as
the source was, which it grades 1. A judge that is any good tells the two apart, in any data's place.
"""

import math
import time
from collections import Counter
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import interpolate

from mteditflow.config import EMBEDDED, Config
from mteditflow.config.ranges import require
from mteditflow.distributed import local_device
from mteditflow.guards import MAX_INVALID_SHARE
from mteditflow.noise import EVALUATION, Place, row_keys
from mteditflow.reward import build_ask
from mteditflow.reward.exact import grade_pictures
from mteditflow.reward.vlm import IMAGE_SIZE, Answer, Ask, Question, rubric_of, to_judge_size
from mteditflow.world.edits import make_session
from mteditflow.world.render import render
from mteditflow.world.scenes import IMAGE

MIN_GAP = 1.0  # points between the good sessions' mean score and the bad ones', of 4
KINDS = ("good", "bad")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A session whose grades are known, as a question."""

    kind: str
    question: Question
    truth: tuple[int, ...]  # K grades by the verifier


def check_judge(config: Config, num_sessions: int) -> int:
    """Print what the judge says of so many sessions, and how fast; 1 where it cannot be used, else 0.

    ValueError, one line: it is not there.
    """
    require(config.reward.judge == "vlm", "reward.judge", config.reward.judge, "must be 'vlm': no other can be asked")
    require(2 <= num_sessions <= 1000, "--num_sessions", num_sessions, "must lie in [2, 1000]")
    samples = make_samples(config, num_sessions)
    ask = build_ask(config.reward, local_device(), samples[0].question)
    console = Console(width=None if Console().is_terminal else 120)
    try:
        before = num_tokens(ask)
        start = time.perf_counter()
        answers = ask([samples[0].question])
        first_s = time.perf_counter() - start
        answers += ask([sample.question for sample in samples[1:]])
        rest_s = time.perf_counter() - start - first_s
        counted = [after - base for after, base in zip(num_tokens(ask), before, strict=True)]
    finally:
        ask.close()
    console.print(score_table(samples, answers))
    say = [f"one question alone: {first_s:.2f} s; the others at once: {(num_sessions - 1) / rest_s:.2f} per second"]
    if any(counted):
        prompt, answer = (total / num_sessions for total in counted)
        say.append(f"tokens of a question: {prompt:.0f}; of an answer: {answer:.0f}")
    num = config.rollout.num_tasks * config.rollout.group_size
    say.append(f"an iteration's {num} trajectories: about {num / (num_sessions - 1) * rest_s:.0f} s of judging")
    problems = find_problems(samples, answers)
    say += [f"wrong: {problem}" for problem in problems] or ["the judge can be used"]
    for line in say:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return 1 if problems else 0


def make_samples(config: Config, num_sessions: int) -> list[Sample]:
    """Good and bad sessions in turn, of the size that the judge will be shown."""
    num_turns, samples = config.data.num_turns, []
    ids = list(range(num_sessions))
    keys = row_keys(ids, torch.zeros(num_sessions, dtype=torch.int64), EVALUATION, turn=0, place=Place.VLM_QUESTION)
    for number in ids:
        kind, session = KINDS[number % 2], make_session(f"judge/{number}", num_turns, held_out=True)
        scenes = session.scenes() if kind == "good" else [session.source] * (num_turns + 1)
        drawn = render(scenes)
        grades = grade_pictures([session], drawn[:1], drawn[1:, None])[0].tolist()
        pictures = as_shown(drawn, config)
        question = Question(
            images=tuple(pictures), instructions=tuple(edit.instruction for edit in session.edits),
            readout=config.reward.readout, key=keys[number], rubric=rubric_of(config.reward, num_turns),
        )  # fmt: skip
        samples.append(Sample(kind=kind, question=question, truth=tuple(grades)))
    return samples


def as_shown(pictures: Tensor, config: Config) -> Tensor:
    """The world's pictures (N, 3, 64, 64), as large as a judge of other data is shown them: uint8 on the host."""
    if config.data.path != EMBEDDED:
        size = min(IMAGE_SIZE, max(config.model.height, config.model.width))
        pictures = interpolate(pictures, scale_factor=max(1, size // IMAGE), mode="nearest-exact")
    return to_judge_size(pictures, IMAGE_SIZE)


def num_tokens(ask: Ask) -> list[int]:
    """Tokens of all questions and of all answers so far, where they are counted."""
    counts: dict[str, int] = getattr(ask, "num_tokens", {})
    return [counts.get(name, 0) for name in ("prompt_tokens", "completion_tokens")]


def score_table(samples: list[Sample], answers: list[Answer]) -> Table:
    """A row for each session: the verifier's grades, the judge's scores, and its words or what is wrong."""
    table = Table("session", "truth", "scores", "the answer ends", title="scores, 1 to 5")
    for sample, answer in zip(samples, answers, strict=True):
        truth = " ".join(map(str, sample.truth))
        scores = "-" if answer.grades is None else " ".join(f"{grade:.3g}" for grade in answer.grades)
        words = " ".join(answer.text.split())[-60:]
        off_mass = f"off mass {answer.off_mass:.1e}" if answer.off_mass else ""
        table.add_row(sample.kind, truth, scores, (answer.fault or off_mass or words).replace("[", r"\["))
    return table


def find_problems(samples: list[Sample], answers: list[Answer]) -> list[str]:
    """What makes the judge unfit: too few scores, or scores that do not tell good from bad."""
    faults = Counter(answer.fault.partition(":")[0] for answer in answers if answer.grades is None)
    problems, num = [], len(answers)
    if sum(faults.values()) > MAX_INVALID_SHARE * num:
        counts = ", ".join(f"{kind} {count}" for kind, count in faults.most_common())
        problems.append(f"{sum(faults.values())} of {num} answers hold no scores ({counts})")
    means = {
        kind: mean([g for s, a in zip(samples, answers, strict=True) if s.kind == kind for g in a.grades or ()])
        for kind in KINDS
    }
    gap = means["good"] - means["bad"]
    if gap < MIN_GAP:
        problems.append(
            f"it does not tell good sessions from bad ones: {means['good']:.2f} and {means['bad']:.2f} points, "
            f"{gap:.2f} apart, should be at least {MIN_GAP:g}"
        )
    return problems


def mean(values: list[float]) -> float:
    """The mean; NaN of nothing."""
    return sum(values) / len(values) if values else math.nan
