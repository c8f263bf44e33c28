"""How far a VLM judge agrees with the exact verifier, on held-out sessions of the embedded world.

Half of the sessions are the embedded editor's, half are composed so that all grades are frequent; their pictures go
through the editor's autoencoder one by one. No session or source scene is one that the small judge has learnt from.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor

from mteditflow.config import EMBEDDED, ModelConfig
from mteditflow.judge.sessions import Judged, compose_session, judge_sessions, roll_out_editor
from mteditflow.pictures import to_uint8
from mteditflow.policy.pipelines import load_pipeline
from mteditflow.reward.vlm import Answer, Ask, Question
from mteditflow.world.autoencoder import decode, encode
from mteditflow.world.edits import EDIT_TYPES
from mteditflow.world.render import render
from mteditflow.world.scenes import Scene
from mteditflow.world.verify import read

NUM_TURNS = 3
SEED = 20_606


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Of the judge's scores with the verifier's grades, both from 1 to 5, over `num` turns."""

    num: int
    bias: float  # mean of score - grade
    std: float  # of score - grade
    rank: float  # Spearman's correlation; NaN where either is constant
    exact: float  # share of turns whose rounded score is the grade
    faults: int = 0  # turns without a score, which have no part in the rest


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's: the correlation of ranks, equal numbers having the mean of theirs."""
    ranks = torch.stack([_ranks(a), _ranks(b)]).double()
    return torch.corrcoef(ranks)[0, 1].item()


def _ranks(values: Tensor) -> Tensor:
    _, place, count = values.double().unique(return_inverse=True, return_counts=True)
    return (count.cumsum(0) - (count - 1) / 2)[place]


def compare(grades: Tensor, scores: Tensor) -> Agreement:
    """Compare scores with grades, both (M,); NaN is a turn without a score."""
    is_scored = ~scores.isnan()
    grades, scores = grades[is_scored].double(), scores[is_scored].double()
    error = scores - grades
    return Agreement(
        num=len(error), bias=error.mean().item(), std=error.std().item(), rank=rank_correlation(grades, scores),
        exact=(scores.round() == grades).double().mean().item(), faults=int((~is_scored).sum()),
    )  # fmt: skip


def held_out_sessions(num_sessions: int) -> dict[str, list[Judged]]:
    """The sessions, by kind, half of `num_sessions` each."""
    size, vae = num_sessions // 2, load_pipeline(ModelConfig(path=EMBEDDED)).vae
    random = Random(f"agreement/{SEED}")
    editor = roll_out_editor(judge_sessions("agreement/editor", size, NUM_TURNS, held_out=True), SEED)
    composed = [
        compose_session(session, random)
        for session in judge_sessions("agreement/composed", size, NUM_TURNS, held_out=True)
    ]
    return {"editor": editor, "composed": [_with_pictures(vae, session) for session in composed]}


@torch.no_grad()
def _with_pictures(vae: Any, session: Judged) -> Judged:
    """The session with its pictures: the source clean, as in a run, the others as the editor's autoencoder has them."""
    scenes = [Scene(background=r.background, cells=r.cells) for r in session.readings]  # pyright: ignore
    drawn = render(scenes)
    pictures = to_uint8(torch.cat([drawn[:1], decode(vae, encode(vae, drawn[1:]))]))
    return Judged.graded(session.edits, pictures, read(pictures / 127.5 - 1))


def ask_about(ask: Ask, sessions: Sequence[Judged], readout: str) -> tuple[Tensor, list[Answer]]:
    """The judge's scores (N, K), NaN where it gave none, and its answers."""
    questions = []
    for number, session in enumerate(sessions):
        assert session.pictures is not None
        key = torch.tensor([SEED, 0, 0, number, 0])
        instructions = tuple(edit.instruction for edit in session.edits)
        questions.append(Question(images=tuple(session.pictures), instructions=instructions, readout=readout, key=key))
    answers = ask(questions)
    num_turns = len(sessions[0].edits)
    scores = [[float(grade) for grade in answer.grades or [torch.nan] * num_turns] for answer in answers]
    return torch.tensor(scores), answers


def measure(ask: Ask, sessions: dict[str, list[Judged]], readout: str) -> dict[str, Agreement]:
    """The agreement by kind of session, by edit type, and in all ('all')."""
    rows = [(kind, session) for kind, part in sessions.items() for session in part]
    scores, _ = ask_about(ask, [session for _, session in rows], readout)
    grades = torch.tensor([session.grades for _, session in rows])
    kinds = [kind for kind, session in rows for _ in session.edits]
    types = [edit.edit_type for _, session in rows for edit in session.edits]
    named = {"all": [True] * len(kinds)}
    named |= {kind: [found == kind for found in kinds] for kind in sessions}
    named |= {name: [found == name for found in types] for name in EDIT_TYPES}
    return {
        name: compare(grades.flatten()[torch.tensor(rows)], scores.flatten()[torch.tensor(rows)])
        for name, rows in named.items()
    }


def table(found: dict[str, Agreement]) -> str:
    """Write a table in Markdown."""
    lines = ["| | turns | bias | std | rank | exact |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {name} | {a.num} | {a.bias:+z.2f} | {a.std:.2f} | {a.rank:z.2f} | {a.exact:.0%} |"
        for name, a in found.items()
    ]
    return "\n".join(lines)
