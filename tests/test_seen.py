"""What the judge saw: which sessions are kept, once each whatever kills a run, small, and readable on the page."""

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from finished_runs import Page
from PIL import Image
from rollouts import rollout_of
from torch import Tensor

from mteditflow.distributed import Ranks
from mteditflow.record.metrics import put_line, read_lines
from mteditflow.report import seen
from mteditflow.report.run_report import write_report
from mteditflow.report.seen import (
    HIGHEST,
    LOWEST,
    MAX_WORDS,
    NUM_KEPT,
    TRUTH,
    UNSCORED,
    Kind,
    Seen,
    choose,
    choose_of_all,
    cut_seen,
    read_seen,
    save_seen,
    seen_sessions,
)
from mteditflow.types import FAULTS, EditTask, Rollout, Scores

NAN = math.nan
OTHER = "judge and taste differ"


def rollout(num_rows: int, num_tasks: int = 2) -> Rollout:
    """Two turns; every picture has a level of its own, the source of task t has -1 + t / 10."""
    texts, kinds = ("a", "b", "unused"), ("", "", "")
    tasks = [
        EditTask(id=10 + t, source=torch.full((3, 4, 4), -1 + t / 10), instructions=texts, edit_types=kinds)
        for t in range(num_tasks)
    ]
    levels = torch.arange(2 * num_rows).reshape(2, num_rows, 1, 1, 1) / (2 * num_rows)
    return rollout_of(tasks, levels.expand(2, num_rows, 3, 4, 4))


def scores(instruction: list[list[float]], *, truth: Tensor | None = None, taste: Tensor | None = None) -> Scores:
    values = torch.tensor(instruction)
    rewards = {"instruction": values} | ({} if taste is None else {"taste": taste})
    valid = ~values.isnan().any(1)
    return Scores(rewards=rewards, weights={}, valid=valid, truth=truth)


def why(sessions: list[Seen]) -> dict[tuple[int, int], tuple[str, ...]]:
    return {(session.task, session.member): session.reasons for session in sessions}


JUDGE = [
    [0.5, 0.5],
    [0.0, 0.25],
    [1.0, 1.0],
    [NAN, NAN],
    [0.5, 0.75],
    [0.25, 0.5],
]  # rows 0 to 2 of task 10, 3 to 5 of 11


def test_each_reason_chooses_its_session() -> None:
    """Row 1 is the lowest, 2 the highest, 3 has no score, 4 is the farthest from the truth: (1 + 0.75) / 2 = 0.875;
    row 0 has the judge's mean and the best taste by far. Row 3, whose truth is farther yet, has nothing to compare.
    """
    truth = torch.tensor(JUDGE)
    truth[3], truth[4] = 1.0, torch.tensor([-0.5, 0.0])
    taste = torch.tensor([900.0, 1, 500, NAN, 1, 1])[:, None].expand(6, 2)
    sessions = seen_sessions(rollout(6), scores(JUDGE, truth=truth, taste=taste))
    chosen = {(10, 1): (LOWEST,), (10, 2): (HIGHEST,), (11, 1): (TRUTH,), (11, 0): (UNSCORED,), (10, 0): (OTHER,)}
    assert why(choose(sessions, 5)) == chosen and list(why(choose(sessions, 5))) == list(chosen)
    assert why(choose(sessions, 3)) == dict(list(chosen.items())[:3])
    assert choose(sessions, 0) == []
    assert why(choose(sessions, 6)) == chosen | {(11, 2): (LOWEST,)}  # the second lowest
    picked = choose(sessions, 5)[4]
    assert picked.instructions == ("a", "b") and picked.rewards == {"instruction": [0.5, 0.5], "taste": [900.0, 900.0]}
    assert [float(picture[0, 0, 0]) for picture in picked.pictures] == pytest.approx([-1.0, 0.0, 0.5])


def test_what_agrees_is_in_no_dispute() -> None:
    """By the exact verifier judge and truth are one, and a reward that is a multiple of the judge's agrees with it."""
    values = [[0.25, 0.25], [0.5, 0.5], [0.5, 1.0]]
    agreeing = scores(values, truth=torch.tensor(values), taste=7 * torch.tensor(values).double() + 3)
    reasons = {reason for found in why(choose(seen_sessions(rollout(3, 1), agreeing), 9)).values() for reason in found}
    assert reasons == {LOWEST, HIGHEST}
    alike = scores([[0.3, 0.3]] * 3, taste=torch.full((3, 2), 0.1))
    assert why(choose(seen_sessions(rollout(3, 1), alike), 2)) == {(10, 0): (LOWEST, HIGHEST)}


def test_parts_choose_what_the_whole_chooses() -> None:
    """An evaluation goes through its sessions in parts: 40 trajectories at once, or in four parts of any order."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 5, (40, 2), generator=generator) / 4.0
    values[::7] = NAN
    truth, taste = (torch.randint(0, 5, (40, 2), generator=generator) / 4.0 for _ in range(2))
    sessions = seen_sessions(rollout(40, 8), scores(values.tolist(), truth=truth, taste=taste))
    for num in range(1, 9):
        parts = [session for start in (3, 1, 0, 2) for session in choose(sessions[start::4], num)]
        assert why(choose(parts, num)) == why(choose(sessions, num))
        assert len(choose(sessions, num)) <= num


def test_what_other_ranks_made_is_chosen_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks, of whom each knows the scores of all, its own rollout and its own judge's words: as one rank chooses,
    on the main one.
    """
    made, post = rollout(6), list[Seen]()
    words = tuple(f"answer {row}" for row in range(6))
    judged = replace(scores(JUDGE, truth=torch.rand(6, 2)), words=words, faults=torch.tensor([0, 0, 0, 4, 0, 0]))

    def to_main(self: Ranks, value: Seen | None, rank: int) -> Seen | None:
        if rank and not self.is_main and value:
            post.append(value)
        return post.pop(0) if rank and self.is_main else value

    monkeypatch.setattr(Ranks, "to_main", to_main)
    chosen = {}
    for rank in (1, 0):
        rows = slice(3 * rank, 3 * rank + 3)
        turns = [replace(turn, image=turn.image[rows]) for turn in made.turns]
        mine = replace(made, tasks=[made.tasks[rank]], turns=turns, group=torch.zeros(3).long(), member=torch.arange(3))
        ranks = Ranks(rank=rank, world_size=2, device=torch.device("cpu"))
        chosen[rank] = choose_of_all(mine, replace(judged, words=words[rows]), 4, ranks)
    expected = choose(seen_sessions(made, judged), 4)
    assert chosen[1] == [] and why(chosen[0]) == why(expected) and {task for task, _ in why(expected)} == {10, 11}
    for found, whole in zip(chosen[0], expected, strict=True):
        pairs = zip(found.pictures, whole.pictures, strict=True)
        assert all(torch.equal(*pair) for pair in pairs) and found.rewards["instruction"] == pytest.approx(
            whole.rewards["instruction"], nan_ok=True
        )
        assert (found.words, found.fault, found.truth) == (whole.words, whole.fault, whole.truth)


@pytest.mark.parametrize("first", [3, 5])
@pytest.mark.parametrize("tail", ["", '{"iteration": 5, "ju', "\x00\x00\n"])
def test_an_iteration_has_one_line(tmp_path: Path, tail: str, first: int) -> None:
    """Killed after line 4, or in the middle of the next; going on from an iteration before that, or from it."""
    path = tmp_path / "training.jsonl"
    for iteration in range(5):
        put_line(path, {"iteration": iteration, "judge": "killed"})
    with path.open("a") as file:
        file.write(tail)
    for iteration in range(first, 7):
        put_line(path, {"iteration": iteration, "judge": "new"})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    expected = [(iteration, "killed" if iteration < first else "new") for iteration in range(7)]
    assert [(line["iteration"], line["judge"]) for line in lines] == expected


@pytest.mark.parametrize("number", [0, 3, 13])
def test_a_line_that_is_repeated_takes_its_place_alone(tmp_path: Path, number: int) -> None:
    """As the evaluation of the best average, and that before training by other settings."""
    path = tmp_path / "evaluation.jsonl"
    for iteration in range(14):
        put_line(path, {"iteration": iteration, "judge": "once"})
    put_line(path, {"iteration": number, "judge": "again"})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["iteration"], line["judge"]) for line in lines] == [
        (iteration, "again" if iteration == number else "once") for iteration in range(14)
    ]


def save(
    folder: Path, iteration: int, words: str = "<Turn1Score>3</Turn1Score>", kind: Kind = "training", num: int = 4
) -> None:
    truth = torch.tensor([[0.5, 0.5], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0], [0.5, 0.75], [0.25, 0.5]])
    judge = replace(scores(JUDGE, truth=truth), words=(words,) * 6, faults=torch.tensor([0, 0, 0, 4, 0, 0]))
    save_seen(folder, kind, iteration, "vlm", choose(seen_sessions(rollout(6), judge), num))


def pictures(folder: Path, kind: Kind) -> dict[int, int]:
    """How many pictures there are, by the number of the line."""
    return Counter(int(path.name.split("-")[1]) for path in (folder / "judge").glob(f"{kind}-*.png"))


def test_pictures_are_those_of_lines_that_are_there(tmp_path: Path) -> None:
    """Of a line written again with fewer sessions, too; after a resume, of an evaluation after as many iterations."""
    for iteration in range(14):
        save(tmp_path, iteration, kind="evaluation")
        save(tmp_path, iteration)
    save(tmp_path, 3, "again", kind="evaluation", num=1)
    assert pictures(tmp_path, "evaluation") == {3: 1, **dict.fromkeys(range(5, 14), 3)}
    shown = read_seen(tmp_path, 3)[-1]
    assert shown["title"] == "Evaluation after iteration 3" and [it["words"] for it in shown["sessions"]] == ["again"]
    assert all(session["picture"] for session in shown["sessions"])
    assert read_seen(tmp_path)[-1]["title"] == "Evaluation after iteration 13"
    cut_seen(tmp_path, 6)
    lines = {kind: read_lines(tmp_path / "judge" / f"{kind}.jsonl") for kind in seen.NUM_SHOWN}
    assert [line["iteration"] for line in lines["training"]] == [*range(6)]
    assert [line["iteration"] for line in lines["evaluation"]] == [*range(7)]
    assert pictures(tmp_path, "training") == {4: 3, 5: 3} and pictures(tmp_path, "evaluation") == {3: 1, 5: 3, 6: 3}


def test_lines_are_small_and_old_strips_go(tmp_path: Path) -> None:
    words = "begin " + "\ud83d x" * 50_000 + " end"  # half of a character, as a server may send
    for iteration in range(NUM_KEPT + 3):
        save(tmp_path, iteration, words)
    lines = (tmp_path / "judge" / "training.jsonl").read_text().splitlines()
    assert len(lines) == NUM_KEPT + 3 and max(map(len, lines)) < 4 * (MAX_WORDS + 500)
    kept = json.loads(lines[0])["sessions"][0]["words"]
    assert len(kept) == MAX_WORDS and kept.startswith("begin ? x") and kept.endswith(" end")
    numbers = {int(path.name.split("-")[1]) for path in (tmp_path / "judge").glob("*.png")}
    assert numbers == {*range(3, NUM_KEPT + 3)}


def test_a_strip_shows_source_and_edits(tmp_path: Path) -> None:
    """Tiles of 4 pixels are drawn twice as large, 10 pixels apart: black, and the levels of row 1."""
    save(tmp_path, 0)
    (line,) = read_lines(tmp_path / "judge" / "training.jsonl")
    lowest = line["sessions"][0]
    assert (lowest["task"], lowest["member"], lowest["reasons"]) == (10, 1, [LOWEST, TRUTH])
    assert lowest["rewards"] == {"instruction": [0.0, 0.25]} and lowest["truth"] == [0.0, 1.0]
    with Image.open(tmp_path / "judge" / lowest["strip"]) as strip:
        assert strip.size == (10 + 3 * 18, 10 + 18)
        found = [strip.getpixel((14 + 18 * column, 14)) for column in range(3)]
    levels = [round(127.5 * (1 + level)) for level in (-1, 1 / 12, 7 / 12)]
    assert found == [(level, level, level) for level in levels]
    assert [row["fault"] for row in line["sessions"]] == ["", "", FAULTS[4]]
    assert line["sessions"][2]["rewards"]["instruction"] == [None, None]


def test_the_page_shows_it(tmp_path: Path) -> None:
    """Marks, truth, words as they are, and what is kept no more."""
    (tmp_path / "metrics.jsonl").write_text("")
    for iteration in range(3):
        save(tmp_path, iteration, f"<Thought>{iteration} & 'so'</Thought>")
    (tmp_path / "judge" / "training-000002-1.png").unlink()
    page = Page(write_report(tmp_path))
    text = page.text.split("What the judge saw")[1].split("Success by type")[0]
    assert "Iteration 2 judge: vlm" in text and "Iteration 3" in text and "Iteration 1 " not in text
    assert "lowest score; judge and truth differ task 10, trajectory 1" in text
    assert "source a ✗ 0.00 truth ✗ 0.00 b ✗ 0.25 truth ✓ 1.00 <Thought>1 & 'so'</Thought>" in text
    assert "no score: refused task 11, trajectory 0" in text and "a no score truth" in text
    assert text.count("the pictures, which are kept for the newest iterations") == 1
    assert len(page.references) == 5 and "None" not in text


def test_pages_of_runs_that_keep_none(lora_run: Path, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    assert "Not there yet: sessions that were judged." in Page(write_report(tmp_path)).text
    config = (lora_run / "config.yaml").read_text()
    assert "  num_judged: 4\n" in config
    (tmp_path / "config.yaml").write_text(config.replace("  num_judged: 4\n", "  num_judged: 0\n"))
    assert "Not kept: run.num_judged is 0." in Page(write_report(tmp_path)).text


def test_a_run_keeps_training_and_evaluations(lora_run: Path) -> None:
    """Two iterations, evaluated before, between and after: the lowest and highest means enclose the reward's."""
    training, evaluation = (read_lines(lora_run / "judge" / f"{kind}.jsonl") for kind in seen.NUM_SHOWN)
    metrics = read_lines(lora_run / "metrics.jsonl")
    assert [line["iteration"] for line in training] == [0, 1] and {line["judge"] for line in training} == {"exact"}
    assert [line["iteration"] for line in evaluation] == [0, 1, 2]
    for line, figures in zip(training, metrics, strict=True):
        means = {
            reason: sum(session["rewards"]["instruction"]) / 2
            for session in line["sessions"]
            for reason in session["reasons"]
        }
        assert means[LOWEST] - 1e-4 <= figures["reward/instruction"] <= means[HIGHEST] + 1e-4
        assert all((lora_run / "judge" / session["strip"]).is_file() for session in line["sessions"])
    assert all(len(session["instructions"]) == 2 for line in evaluation for session in line["sessions"])
