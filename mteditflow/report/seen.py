"""What the judge saw: of each iteration and evaluation a few sessions, with pictures, scores and the judge's own words.

They are the sessions with the lowest and the highest scores, those on which judge and truth differ most, those that got
no score, and those on which the judge and another reward differ most: a second judge, as a function of `reward.also`,
is compared so. A number is compared with a number of its own kind, in standard deviations over the sessions, since
rewards may be of any size.

In the end the sessions that are worst after training, and those that training changed most, are kept as they were
before and after it, in `judge/compared.json`.

A line of `judge/training.jsonl` has the sessions of an iteration, counted as in metrics.jsonl; one of
`judge/evaluation.jsonl` those of an evaluation, counted by the iterations before it. Their pictures, the source and the
edits side by side, lie beside, of the newest NUM_KEPT lines and of the one written last.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mteditflow.advantage import SUCCESS
from mteditflow.distributed import Ranks
from mteditflow.record.files import read_json, write_json
from mteditflow.record.metrics import put_line, read_lines, truncate
from mteditflow.report.charts import data_uri
from mteditflow.report.strips import draw_tiles
from mteditflow.types import FAULTS, Rollout, Rollouts, Scores

COMPARED = "compared.json"
MAX_JUDGED = 64  # the most that run.num_judged may be
NUM_KEPT = 10  # lines whose strips stay: 4 sessions of 3 turns at 512 px are at most 2.5 MB
NUM_SHOWN = {"training": 2, "evaluation": 1}  # newest lines on the page of a run
ROUNDING = 1e-6  # of numbers in float32: what differs by less, relative to their size, does not differ
MAX_WORDS, MAX_INSTRUCTION = 1500, 300  # characters that are kept, so that a line stays small
LOWEST, HIGHEST, TRUTH, UNSCORED = "lowest score", "highest score", "judge and truth differ", "no score"

Kind = Literal["training", "evaluation"]


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A session as it was judged. `claims`: by reason to show it, how much speaks for that. `reasons`: why it was
    chosen.
    """

    task: int
    member: int
    instructions: tuple[str, ...]  # K
    pictures: tuple[Tensor, ...]  # K + 1 of (3, H, W) in [-1, 1]: source and edits
    rewards: dict[str, list[float]]  # K each; NaN where undefined
    truth: list[float] | None  # K
    words: str
    fault: str  # one of types.FAULTS
    claims: Mapping[str, float] = field(repr=False)
    reasons: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[int, int]:
        """What tells it from all others of an iteration or evaluation."""
        return self.task, self.member


def seen_sessions(rollout: Rollout, scores: Scores) -> list[Seen]:
    """Put together what was judged, a session for each trajectory of the rollout. Pictures are views."""
    claims = _claims(scores)
    return [_see(rollout, scores, n, 0, claims[n]) for n in range(len(rollout.group))]


def _see(rollout: Rollout | Rollouts, scores: Scores, n: int, first: int, claims: Mapping[str, float]) -> Seen:
    """Put together trajectory `n` of a rollout, whose first is the `first` in the scores; words are the rollout's."""
    part, row = next(
        itertools.islice(((part, row) for part in rollout.parts for row in range(len(part.group))), n, None)
    )
    task, turns, place = part.tasks[int(part.group[row])], part.turns, first + n
    return Seen(
        task=task.id, member=int(part.member[row]), instructions=task.instructions[: len(turns)],
        pictures=(task.source, *(turn.image[row] for turn in turns)),
        rewards={name: values[place].tolist() for name, values in scores.rewards.items()},
        truth=None if scores.truth is None else scores.truth[place].tolist(),
        words=scores.words[n] if n < len(scores.words) else "",
        fault="" if scores.faults is None else FAULTS[int(scores.faults[place])], claims=claims,
    )  # fmt: skip


def _claims(scores: Scores) -> list[dict[str, float]]:
    """Say how much speaks for each reason to show a trajectory, for N of them."""
    names, claims = list(scores.rewards), [dict[str, float]() for _ in scores.valid]
    valid = scores.valid.tolist()
    judge, *others = (values.double().nanmean(1) for values in scores.rewards.values())  # (N,) each
    columns = {LOWEST: -judge, HIGHEST: judge}
    if scores.truth is not None:
        columns[TRUTH] = (scores.instruction - scores.truth).double().abs().nanmean(1)
    for name, other in zip(names[1:], others, strict=True):
        columns[f"judge and {name} differ"] = (_standardise(judge) - _standardise(other)).abs()
    for reason, column in columns.items():
        for row, value in zip(claims, column.tolist(), strict=True):
            if math.isfinite(value) and (reason in (LOWEST, HIGHEST) or value > ROUNDING):
                row[reason] = value
    return [row if is_valid else {UNSCORED: 1.0} for row, is_valid in zip(claims, valid, strict=True)]


def _standardise(values: Tensor) -> Tensor:
    """Measure values (N,) from their mean in standard deviations, 0 where there is no spread; NaN stays."""
    known = values[~values.isnan()]
    if not len(known):
        return values
    std = known.std(correction=0)
    return (values - known.mean()) / std if std > ROUNDING * known.abs().max() else values * 0


def choose(sessions: Sequence[Seen], num: int) -> list[Seen]:
    """Choose at most `num` sessions. Chosen in parts and again among the chosen, they are the same."""
    ordered = sorted(sessions, key=lambda session: session.key)
    chosen = _choose_places([session.claims for session in ordered], num)
    return [_keep(ordered[place], why) for place, why in chosen.items()]


def choose_of_all(rollout: Rollout | Rollouts, scores: Scores, num: int, ranks: Ranks) -> list[Seen]:
    """Choose at most `num` of the trajectories of all ranks, whose scores every rank has; what another rank made comes
    to the main one, and the others are given nothing.
    """
    share, claims = ranks.share(len(scores.valid)), _claims(scores)
    chosen: list[Seen | None] = []
    for place, why in _choose_places(claims, num).items():
        maker, session = place // len(share), None
        if maker == ranks.rank:
            session = _keep(_see(rollout, scores, place - share.start, share.start, claims[place]), why)
        chosen.append(ranks.to_main(session, maker))
    return [session for session in chosen if session] if ranks.is_main else []


def _choose_places(claims: Sequence[Mapping[str, float]], num: int) -> dict[int, tuple[str, ...]]:
    """Choose at most `num` trajectories by what speaks for them, with the reasons: as many for each reason, the earlier
    reasons first. One that two reasons choose is there once.
    """
    known = list(dict.fromkeys(reason for row in claims for reason in row))
    first = [reason for reason in (LOWEST, HIGHEST, TRUTH, UNSCORED) if reason in known]
    reasons = [*first, *(reason for reason in known if reason not in first)]
    chosen: dict[int, tuple[str, ...]] = {}
    for number, reason in enumerate(reasons):
        quota = num // len(reasons) + (number < num % len(reasons))
        having = [(-row[reason], place) for place, row in enumerate(claims) if reason in row]
        for _, place in sorted(having)[:quota]:
            chosen[place] = (*chosen.get(place, ()), reason)
    return chosen


def _keep(session: Seen, reasons: tuple[str, ...]) -> Seen:
    """Copy a session to the host, so that it outlives the rollout."""
    return replace(session, reasons=reasons, pictures=tuple(picture.cpu().clone() for picture in session.pictures))


def save_seen(folder: Path, kind: Kind, iteration: int, judge: str, sessions: Sequence[Seen]) -> None:
    """Write the chosen sessions of an iteration, or of an evaluation after so many: strips, then the line, which
    replaces that of the same number. Without sessions nothing is written.
    """
    if not sessions:
        return
    parent = folder / "judge"
    parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for place, session in enumerate(sessions):
        strip = f"{kind}-{iteration:06d}-{place}.png"
        draw_tiles([torch.nan_to_num(picture) for picture in session.pictures]).save(parent / strip)
        rows.append(_row(session) | {"strip": strip})
    put_line(parent / f"{kind}.jsonl", {"iteration": iteration, "judge": judge, "sessions": rows})
    numbers = {path: int(path.stem.split("-")[1]) for path in parent.glob(f"{kind}-[0-9]*-*.png")}
    newest = sorted({*numbers.values()} - {iteration})[1 - NUM_KEPT :]
    mine = {row["strip"] for row in rows}
    for path, number in numbers.items():
        if number not in (*newest, iteration) or (number == iteration and path.name not in mine):
            path.unlink()


def cut_seen(folder: Path, done: int) -> None:
    """Cut what was kept back to what a run knew after `done` iterations, from which it goes on."""
    for kind, first in (("training", done), ("evaluation", done + 1)):
        truncate(folder / "judge" / f"{kind}.jsonl", first)
        for path in (folder / "judge").glob(f"{kind}-[0-9]*-*.png"):
            if int(path.stem.split("-")[1]) >= first:
                path.unlink()


def _row(session: Seen) -> dict[str, Any]:
    """Describe a session as JSON has it: texts of bounded length, None for a number that is not there."""
    return {
        "task": session.task,
        "member": session.member,
        "reasons": session.reasons,
        "instructions": [_shorten(text, MAX_INSTRUCTION) for text in session.instructions],
        "rewards": {name: [_number(value) for value in values] for name, values in session.rewards.items()},
        "truth": [_number(value) for value in session.truth] if session.truth else None,
        "fault": session.fault,
        "words": _shorten(session.words, MAX_WORDS),
    }


def _number(value: float) -> float | None:
    return round(value, 4) + 0.0 if math.isfinite(value) else None


def _shorten(text: str, length: int) -> str:
    """Leave out the middle of a long text: a judge that thinks begins with reasons and ends with scores. Halves of a
    character, which a server may send, become question marks.
    """
    text = text.encode(errors="replace").decode()
    return text if len(text) <= length else f"{text[: length // 2]} ... {text[length // 2 - length + 5 :]}"


def choose_changed(before: Tensor, after: Tensor, num: int) -> dict[int, str]:
    """Choose at most `num` sessions by their scores (n,) before and after training, NaN where there is none: the worst
    after it, those that gained most and those that lost most, in turn; by place, with the reason.
    """
    change = (after - before).double()
    wanted = {
        "worst after training": [n for n in after.argsort(stable=True).tolist() if after[n].isfinite()],
        "gained most": [n for n in change.argsort(descending=True, stable=True).tolist() if change[n] > 0],
        "lost most": [n for n in change.argsort(stable=True).tolist() if change[n] < 0],
    }
    chosen: dict[int, str] = {}
    for place in range(len(after)):
        for reason, ordered in wanted.items():
            left = [n for n in ordered if n not in chosen]
            if place < len(ordered) and left and len(chosen) < num:
                chosen[left[0]] = reason
    return chosen


def save_compared(folder: Path, judge: str, chosen: Mapping[int, str], before: list[Seen], after: list[Seen]) -> None:
    """Write the chosen sessions, by the task's place among the held-out ones, as they were before and after training.
    Those of a run that went on are replaced.
    """
    parent = folder / "judge"
    parent.mkdir(parents=True, exist_ok=True)
    sessions = []
    by_task = [{session.task: session for session in part} for part in (before, after)]
    for place, (task, reason) in enumerate(chosen.items()):
        session: dict[str, Any] = {"reason": reason}
        for name, part in zip(("before", "after"), by_task, strict=True):
            if task in part:
                strip = f"compared-{place}-{name}.png"
                draw_tiles([torch.nan_to_num(picture) for picture in part[task].pictures]).save(parent / strip)
                session[name] = _row(part[task]) | {"strip": strip}
        sessions.append(session)
    write_json(parent / COMPARED, {"judge": judge, "sessions": sessions})


def read_compared(folder: Path) -> list[dict[str, Any]]:
    """Read what a page shows of the compared sessions: reason, and each as it was before and after training."""
    found = read_json(folder / "judge" / COMPARED).get("sessions", [])
    names = ("before", "after")
    return [it | {name: _session(folder, it[name]) for name in names if name in it} for it in found]


def read_seen(folder: Path, best: int | None = None) -> list[dict[str, Any]]:
    """Read what a page shows of the newest lines, evaluations last, or of that of the best average where it is known:
    title, judge, and sessions, with their pictures and a cell for each turn. Empty where nothing was kept.
    """
    shown = []
    for kind, num in NUM_SHOWN.items():
        path = folder / "judge" / f"{kind}.jsonl"
        lines = read_lines(path) if path.is_file() else []
        of_best = [line for line in lines if kind == "evaluation" and line["iteration"] == best]
        for line in of_best or lines[-num:]:
            number = line["iteration"]
            title = f"Iteration {number + 1}" if kind == "training" else f"Evaluation after iteration {number}"
            sessions = [_session(folder, row) for row in line["sessions"]]
            shown.append({"title": title if number or kind == "training" else "Evaluation before training",
                          "judge": line["judge"], "sessions": sessions})  # fmt: skip
    return shown


def _session(folder: Path, row: dict[str, Any]) -> dict[str, Any]:
    path = folder / "judge" / row["strip"]
    (_, judge), *others = row["rewards"].items()
    truth = row["truth"] or [None] * len(judge)
    turns = [
        {
            "instruction": instruction,
            "judge": _verdict(judge[turn]),
            "truth": _verdict(truth[turn]) if row["truth"] else None,
            "others": {name.replace("_", " "): values[turn] for name, values in others},
        }
        for turn, instruction in enumerate(row["instructions"])
    ]
    picture = data_uri(path.read_bytes()) if path.is_file() else ""
    return row | {"turns": turns, "picture": picture, "title": "; ".join(row["reasons"])}


def table_rows(sessions: Sequence[Seen]) -> list[dict[str, Any]]:
    """Describe sessions as rows of a table on a board, with their pictures; scores from 0 to 1, turn by turn."""
    rows = []
    for session in sessions:
        scores = {name: ", ".join(f"{value:z.2f}" for value in values) for name, values in session.rewards.items()}
        rows.append({
            "task": session.task, "trajectory": session.member, "why": "; ".join(session.reasons),
            "instructions": " / ".join(session.instructions), **scores, "fault": session.fault,
            "words": _shorten(session.words, MAX_WORDS),
            "pictures": draw_tiles([torch.nan_to_num(picture) for picture in session.pictures]),
        })  # fmt: skip
    return rows


def _verdict(score: float | None) -> dict[str, str]:
    """Write a score with the mark of success or failure, and how it is coloured."""
    if score is None:
        return {"text": "no score", "css": "bad"}
    return {"text": f"✓ {score:.2f}", "css": "good"} if score >= SUCCESS else {"text": f"✗ {score:.2f}", "css": "bad"}
