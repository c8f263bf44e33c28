"""When a run stops early and which average it keeps: by hand, and in runs that are killed, resumed and exported."""

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from finished_runs import Page
from torch import Tensor
from train_runs import Arguments, lora, metrics, refused

from mteditflow import run as run_module
from mteditflow.config.command import export
from mteditflow.config.command import train as main
from mteditflow.evaluate.best import Standing, first_standing, load_standing
from mteditflow.evaluate.edival import Evaluation
from mteditflow.evaluate.held_out import load_evaluation
from mteditflow.record.metrics import read_lines
from mteditflow.report.run_report import write_report

NUM_SESSIONS = 64


def evaluation(num_done: int, num: int = NUM_SESSIONS, consistency: float = 1.0) -> Evaluation:
    """The first `num_done` of the sessions succeed at both turns."""
    verdict = (torch.arange(num) < num_done)[:, None].expand(num, 2)
    return Evaluation(
        verdict=verdict.clone(), consistency=torch.full((num, 2), consistency), valid=torch.ones(num, dtype=torch.bool),
        edit_types=[("subject_add", "color_alter")] * num, images=torch.zeros(2, 1, 3, 4, 4), num_steps=3,
    )  # fmt: skip


def stand(*counts: int) -> list[Standing]:
    """The standings after evaluations of which so many sessions succeed; the first is the base's."""
    standings = [first_standing(evaluation(counts[0], 2 * NUM_SESSIONS), NUM_SESSIONS)]
    for done, count in enumerate(counts[1:], start=1):
        standings.append(standings[-1].after(evaluation(count), done))
    return standings


def test_small_gains_add_up_to_progress() -> None:
    """Two sessions more of 64, none fewer: a bootstrap sample has none of them with (62/64)^64 = 13 %, so the interval
    holds 0. Four: 1.6 %, below 2.5 %, so it is clear of 0, and the mark moves there.
    """
    standings = stand(20, 22, 24, 26, 28)
    assert [standing.num_stalled for standing in standings] == [0, 1, 0, 1, 0]
    assert [standing.best for standing in standings] == [0, 1, 2, 3, 4]
    assert int(standings[-1].mark.verdict[:, 0].sum()) == 28
    assert standings[-1].best_score == pytest.approx(100 * (28 / 64) ** 0.5)


def test_the_best_is_the_highest_and_of_equals_the_first() -> None:
    standings = stand(20, 30, 29, 30, 31, 10)
    assert [standing.best for standing in standings] == [0, 1, 1, 1, 4, 4]
    assert [standing.num_stalled for standing in standings] == [0, 0, 1, 2, 3, 4]


def test_without_consistency_all_instructions_decide() -> None:
    """O is defined nowhere; sessions that could not be scored have no part."""
    base, better = (evaluation(count, consistency=torch.nan) for count in (10, 40))
    standing = first_standing(base, NUM_SESSIONS).after(better, 1)
    assert (standing.num_stalled, standing.best, standing.best_score) == (0, 1, 62.5)
    unscored = replace(better, valid=torch.zeros(NUM_SESSIONS, dtype=torch.bool))
    standing = standing.after(unscored, 2)
    assert (standing.num_stalled, standing.best) == (1, 1)


def test_it_survives_a_checkpoint() -> None:
    before = stand(20, 22)[-1]
    state = safetensors.torch.load(safetensors.torch.save(before.state()))
    after = load_standing(state)
    assert (after.num_stalled, after.best, after.best_score) == (1, 1, before.best_score)
    assert after.after(evaluation(24), 2).num_stalled == before.after(evaluation(24), 2).num_stalled == 0
    assert after.is_of(evaluation(3)) and not after.is_of(evaluation(3, 63))


SHORT = {"evaluation__num_sessions": 11, "evaluation__num_sessions_short": 10, "evaluation__every": 1}
SIZE: dict[str, Any] = SHORT | {
    "run__patience": 3, "run__num_iterations": 9, "optimizer__schedule": "constant", "optimizer__num_updates": 1,
}  # fmt: skip
SUCCESSES = (0, 6, 8, 4, 3, 10)  # of 10 sessions after so many iterations: best after 2, stops after 4


def by_script(patch: pytest.MonkeyPatch) -> None:
    """Give the short evaluations the successes above, and the last of all what it has."""
    original = run_module.evaluate_editor

    def evaluate(policy: Any, tasks: Any, config: Any, *others: Any, **named: Any) -> Evaluation:
        found, file = original(policy, tasks, config, *others, **named), Path(config.run.folder) / "metrics.jsonl"
        if len(tasks) != 10:
            return replace(found, verdict=torch.zeros_like(found.verdict))
        done = file.read_bytes().count(b"\n") + 1
        verdict = (torch.arange(10) < SUCCESSES[done])[:, None].expand_as(found.verdict)
        return replace(found, verdict=verdict.clone(), consistency=torch.ones_like(found.consistency))

    patch.setattr(run_module, "evaluate_editor", evaluate)


@pytest.fixture(scope="module")
def stopped(arguments: Arguments, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that stops after 4 of 9 iterations; the average after 2 is the best."""
    folder = tmp_path_factory.mktemp("best") / "stopped"
    with pytest.MonkeyPatch.context() as patch:
        by_script(patch)
        main(arguments(folder, **SIZE))
    return folder


def group(folder: Path, iteration: int, name: str) -> dict[str, Tensor]:
    return safetensors.torch.load_file(folder / "checkpoints" / f"iteration-{iteration:06d}" / f"{name}.safetensors")


def is_same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[key.removeprefix("transformer.")], value) for key, value in two.items())


def test_a_run_stops_and_gives_back_its_best(
    arguments: Arguments, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = metrics(stopped)
    assert [line["heldout/num_stalled"] for line in lines] == [0, 1, 2, 3]
    assert [line["heldout/best_iteration"] for line in lines] == [1, 2, 2, 2]
    assert is_same(group(stopped, 4, "best"), lora(stopped)) and not is_same(group(stopped, 4, "ema"), lora(stopped))
    main(arguments(tmp_path, **SIZE | {"run__patience": 0, "run__num_iterations": 2, "evaluation__every": 0}))
    assert is_same(group(tmp_path, 2, "ema"), lora(stopped))  # the average of that iteration, evaluated and exported
    capsys.readouterr()
    assert export([str(stopped), "--out", str(tmp_path / "out")]) == 0
    assert "exported ema of iteration 2" in capsys.readouterr().out
    exported = (tmp_path / "out" / "pytorch_lora_weights.safetensors").read_bytes()
    assert exported == (stopped / "lora" / "pytorch_lora_weights.safetensors").read_bytes()
    card = (stopped / "lora" / "README.md").read_text()
    assert "iteration 2 of 9" in card and "not finished" not in card
    assert (stopped / "lora" / "strips.png").read_bytes() == (stopped / "strips" / "iteration-000002.png").read_bytes()
    assert load_evaluation(stopped, "after") is not None
    evaluated = read_lines(stopped / "judge" / "evaluation.jsonl")
    assert [line["iteration"] for line in evaluated] == [0, 1, 2, 3, 4]  # that after 2 once more, by all sessions
    assert all((stopped / "judge" / row["strip"]).is_file() for line in evaluated for row in line["sessions"])


def test_a_kill_changes_nothing(
    arguments: Arguments, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ended after 3 iterations, and begun again: the same numbers, weights and end; and once more at the end."""
    with pytest.MonkeyPatch.context() as patch:
        by_script(patch)
        main(arguments(tmp_path, **SIZE | {"run__num_iterations": 3}))
        for is_stopping in (True, False):
            main(arguments(tmp_path, **SIZE))
            assert ("training stops (run.patience)" in capsys.readouterr().err) == is_stopping
            assert metrics(tmp_path) == metrics(stopped)
            for name in ("current", "ema", "best", "standing", "optimizer"):
                path = f"checkpoints/iteration-000004/{name}.safetensors"
                assert (tmp_path / path).read_bytes() == (stopped / path).read_bytes(), name
            given, expected = lora(tmp_path), lora(stopped)
            assert given.keys() == expected.keys() and all(torch.equal(given[key], expected[key]) for key in given)
            for name in ("evaluation_after", "comparison"):
                assert (tmp_path / f"{name}.json").read_text() == (stopped / f"{name}.json").read_text()


def test_the_judge_is_held_against_what_is_evaluated(
    arguments: Arguments, stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the end the iterations that made the best average, not the last ones."""
    shutil.copytree(stopped, tmp_path / "run")
    held, original = list[int](), run_module.alarms.held_out_figures

    def spy(lines: Any, by_truth: Any) -> dict[str, float]:
        held.append(len(lines))
        return original(lines, by_truth)

    monkeypatch.setattr(run_module.alarms, "held_out_figures", spy)
    main(arguments(tmp_path / "run", **SIZE))
    assert held == [2] and len(metrics(tmp_path / "run")) == 4


def test_the_page_says_so(stopped: Path) -> None:
    text = Page(write_report(stopped)).text
    assert "stopped after 4 of 9 iterations" in text and "The run is not finished" not in text
    assert "the average after iteration 2 had the highest O" in text
    assert "After iteration 2" in text and "After iteration 4" not in text
    assert "Evaluation after iteration 2 judge" in text and "Evaluation after iteration 4 judge" not in text


def test_what_it_needs(arguments: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for overrides, line in (
        ({"evaluation__every": 0}, r"evaluation.every is 0: run.patience counts short evaluations: must be above 0"),
        ({"evaluation__num_sessions_short": 9}, r"evaluation.num_sessions_short is 9: .* must be at least 10"),
        ({"run__patience": -1}, r"run.patience is -1: must lie in \[0, 1000\]"),
    ):
        assert re.search(line, refused(capsys, arguments(tmp_path, **SIZE | overrides)))
