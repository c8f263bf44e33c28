"""Studies with a tiny editor: what is run and what is not, kills, failures, bad input, and the page.

Runs are forks of this process but for one test: a fork is spared the six seconds that a new process imports for.
"""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, ClassVar
from xml.etree import ElementTree

import pytest
import yaml
from conftest import TINY_MAX_TEXT_TOKENS
from rich.console import Console
from timed import is_timed
from torch.utils.tensorboard import SummaryWriter

from mteditflow import run, update
from mteditflow.config import command
from mteditflow.record import ending
from mteditflow.record.checkpoint import lock
from mteditflow.record.figures import METRICS
from mteditflow.record.metrics import read_lines
from mteditflow.study import runner as study
from mteditflow.study.cells import read_study, runs_of, select
from mteditflow.world.render import atlas

PRELOADED = (run, update, SummaryWriter, atlas())  # else every fork imports and draws for itself
ROOT = Path(__file__).parent.parent
FORK = multiprocessing.get_context("fork")
PATIENCE = 120  # seconds for another process
COMPARISON = {"question": "Better?", "cells": {"two": {}, "one": {"data.num_turns": 1}}, "paper": ["two", "one"]}


class Forked:
    """What study.py needs of Popen, as a fork that runs the command train."""

    started: ClassVar[list[str]] = []

    def __init__(
        self, command: list[str], env: dict[str, str], stdin: int, stdout: BinaryIO, stderr: BinaryIO,
        start_new_session: bool,
    ) -> None:  # fmt: skip
        assert command[:3] == [sys.executable, "-m", "mteditflow.train"] and start_new_session
        assert env["OMP_NUM_THREADS"] == "1" and stdin == subprocess.DEVNULL and stdout is stderr
        self.started.append(next(word for word in command if word.startswith("--run.folder")))
        self._process = FORK.Process(target=self._run, args=(command[3:], stdout))
        self._process.start()
        self.pid = self._process.pid

    def _run(self, arguments: list[str], log: BinaryIO) -> None:
        os.setsid()
        sys.stdout = sys.stderr = os.fdopen(log.fileno(), "w", buffering=1)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        command.train(arguments)

    def poll(self) -> int | None:
        return self._process.exitcode

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def terminate(self) -> None:
        self._process.terminate()


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs are forks; the run folders of those started."""
    popen = subprocess.Popen
    monkeypatch.setattr(study.subprocess, "Popen", lambda c, **a: Forked(c, **a) if "env" in a else popen(c, **a))
    monkeypatch.setattr(study, "POLL_S", 0.02)
    monkeypatch.setattr(Forked, "started", [])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return Forked.started


@pytest.fixture
def base(tiny_pipeline_folder: Path) -> dict[str, Any]:
    return {
        "model.path": str(tiny_pipeline_folder), "model.max_text_tokens": TINY_MAX_TEXT_TOKENS, "lora.rank": 2,
        "lora.alpha": 4, "data.num_turns": 2, "rollout.num_tasks": 1, "rollout.group_size": 2, "rollout.num_steps": 3,
        "evaluation.num_turns": 2, "evaluation.num_sessions": 4, "evaluation.num_sessions_short": 1,
        "evaluation.num_strips": 1, "evaluation.num_steps": 2, "evaluation.every": 0, "run.num_iterations": 2,
    }  # fmt: skip


Write = Callable[..., Path]


@pytest.fixture
def write(base: dict[str, Any], tmp_path: Path) -> Write:
    """Writes a study of one comparison; keywords go into the comparison, `base` over the base."""

    def write(base: dict[str, Any] = base, seeds: Any = (0, 1), **changes: Any) -> Path:
        tree = {"base": base, "seeds": list(seeds), "comparisons": {"turns": COMPARISON | changes}}
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(tree, sort_keys=False))
        return path

    return write


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if not is_timed(k)} for line in read_lines(folder / "metrics.jsonl")]


def last_turn(folder: Path) -> dict[str, float]:
    return json.loads((folder / "evaluation_after.json").read_text())["turns"][-1]


def rest_of(folder: Path) -> dict[str, Any]:
    """study.json without the command."""
    return {key: value for key, value in json.loads((folder / "study.json").read_text()).items() if key != "command"}


def test_study_is_run_once(write: Write, forked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTEDITFLOW_CACHE", str(tmp_path / "cache"))
    path, folder = write(), tmp_path / "study"
    assert command.study([str(path), "--folder", str(folder), "--jobs", "2"]) == 0
    runs = runs_of(read_study(path), folder)
    assert len(runs) == 4 and sorted(forked) == sorted(f"--run.folder={run.folder}" for run in runs)
    assert all(study.is_finished(run) and len(metrics(run.folder)) == 2 for run in runs)
    assert len({(run.folder / "evaluation_before.json").read_bytes() for run in runs}) == 1
    logs = [(run.folder / "log.txt").read_text() for run in runs]
    assert sum("evaluating the base" in log for log in logs) <= 2  # the first two
    assert sum("evaluated the base on 4 held-out sessions before" in log for log in logs) >= 2
    assert metrics(runs[0].folder) != metrics(runs[2].folder)  # another seed

    found = rest_of(folder)
    (turns,) = found["comparisons"]
    two, one = turns["rows"]
    assert (found["turn"], found["num_sessions"], found["num_finished"], found["num_runs"]) == (2, 4, 4, 4)
    assert two["seeds"] == one["seeds"] == [0, 1] and two["difference"] is None
    assert (two["turn_images"], one["turn_images"]) == (2 * 2 * 2, 2 * 2)
    for row in (two, one):
        after = [last_turn(run.folder) for run in runs if run.cell.key == row["key"]]
        assert len(after) == 2 and after[0]["CC"] > 0
        for name in METRICS:
            assert row["after"][name] == pytest.approx(
                (after[0][name] + after[1][name]) / 2, abs=0.0101
            )  # two decimals
    assert two["gain"]["value"] == pytest.approx(two["after"]["O"] - found["editors"][0]["before"]["O"], abs=0.02)
    assert one["difference"]["value"] == pytest.approx(one["after"]["O"] - two["after"]["O"], abs=0.02)
    page = (folder / "study.md").read_text()
    assert turns["verdict"] in page and "| two | 0, 1 |" in page and "4 of 4 runs are finished" in page
    assert turns["verdict"] == "not decided: fewer than 10 sessions"
    assert not re.search(r"[-+\N{MINUS SIGN}]\d+\.\d \[", page)
    assert "![Better?](turns.svg)" in page and "None" not in page and "Undefined" not in page
    assert len(ElementTree.parse(folder / "turns.svg").findall(".//{*}circle")) == 2 * (1 + 2)

    forked.clear()
    assert command.study([str(path), "--folder", str(folder)]) == 0  # all is finished: nothing is started
    assert forked == [] and rest_of(folder) == found
    changed = write(cells={"two": {}, "one": {"data.num_turns": 1, "lora.alpha": 8}})
    assert [study.is_finished(run) for run in runs_of(read_study(changed), folder)] == [True, False] * 2


def test_stopped_study_goes_on(
    write: Write, forked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked to stop after its first iteration, a run says so, and the same command makes what a whole study does."""
    path, folder, calls = write(seeds=[0]), tmp_path / "study", []
    runs = runs_of(read_study(path), folder)
    pause, record = time.sleep, run.Run.record

    def sleep(seconds: float) -> None:
        if not calls and all((run.folder / "checkpoints" / "iteration-000001").exists() for run in runs):
            calls.append(os.kill(os.getpid(), signal.SIGTERM))
        pause(seconds)

    def record_and_wait(*args: Any) -> None:
        record(*args)
        while ending._current is not None and not ending._current.asked:
            pause(0.01)

    with monkeypatch.context() as patch:
        patch.setattr(study.time, "sleep", sleep)
        patch.setattr(run.Run, "record", record_and_wait)
        assert command.study([str(path), "--folder", str(folder), "--jobs", "2"]) == 128 + signal.SIGTERM
    for one in runs:
        assert "stopped by SIGTERM; the same command goes on after iteration 1" in (one.folder / "log.txt").read_text()
        assert not study.is_finished(one) and len(metrics(one.folder)) == 1
    assert command.study([str(path), "--folder", str(folder), "--jobs", "2"]) == 0
    assert "going on after iteration" in (runs[0].folder / "log.txt").read_text()
    assert command.study([str(path), "--folder", str(tmp_path / "whole"), "--jobs", "2"]) == 0
    assert metrics(runs[0].folder) == metrics(tmp_path / "whole" / runs[0].folder.relative_to(folder))
    assert rest_of(folder) == rest_of(tmp_path / "whole")


def test_killed_study_goes_on(
    write: Write, forked: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run that it leaves behind is waited for, not run twice at a time."""
    path, folder = write(seeds=[0]), tmp_path / "study"
    arguments = [str(path), "--folder", str(folder), "--jobs", "2"]
    runs, deadline = runs_of(read_study(path), folder), time.monotonic() + PATIENCE
    first = FORK.Process(target=command.study, args=(arguments,))
    first.start()
    while not (runs[0].folder / "config.yaml").exists():
        assert first.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)
    first.kill()
    first.join()
    assert command.study(arguments) == 0 and all(map(study.is_finished, runs))
    assert (runs[0].folder / "log.txt").read_text().count("Traceback") == 0
    assert len(metrics(runs[0].folder)) == 2


def test_a_run_without_what_it_makes_last_is_started_again(
    write: Write, forked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed once its gains are written: before the export, and before the report."""
    path, folder = write(seeds=[0]), tmp_path / "study"
    arguments, runs = [str(path), "--folder", str(folder), "--jobs", "2"], runs_of(read_study(path), folder)
    for name in ("save_result", "write_report"):
        with monkeypatch.context() as patch:
            patch.setattr(run, name, lambda *_: os._exit(1))
            assert command.study(arguments) == 1
        for one in runs:
            assert (one.folder / "comparison.json").is_file() and not study.is_finished(one)
    forked.clear()
    assert command.study(arguments) == 0 and len(forked) == len(runs) == sum(map(study.is_finished, runs))
    for one in runs:
        assert (one.folder / "lora" / "README.md").is_file() and (one.folder / "report.html").is_file()


def test_run_that_another_process_took_meanwhile_is_no_failure(
    write: Write, forked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs_of(read_study(write()), tmp_path / "study")[0]
    runner = study.Runner([run], study.make_slots(2))
    with lock(run.folder):
        with monkeypatch.context() as patch:
            patch.setattr(study, "_is_held", lambda _: False)  # looked at just before it was taken
            assert len(runner.start()) == len(runner.jobs) == 1
        lines: list[str] = []
        while runner.jobs:
            lines += runner.reap()
        assert lines == [f"waiting for another process at work in {run.folder}"]
        assert runner.pending == [run] and runner.failed == {} and runner.start() != []
    assert "another run is at work there" in (run.folder / "log.txt").read_text() and len(forked) == 1


def test_failed_run_costs_itself(
    write: Write, forked: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One cell binds no module, the other is trained."""
    path, folder = write(cells={"two": {}, "none": {"lora.targets": ["nowhere"]}}, paper=[], seeds=[0]), tmp_path / "s"
    assert command.study([str(path), "--folder", str(folder), "--jobs", "2"]) == 1
    good, bad = runs_of(read_study(path), folder)
    assert study.is_finished(good) and not study.is_finished(bad)
    captured = capsys.readouterr()
    line = captured.err.strip().splitlines()[-1]
    assert line.startswith("mteditflow: turns: none, seed 0 failed: ") and "nowhere" in line and "log.txt" in line
    assert "finished turns: two, seed 0: O at turn 2" in captured.out and "Traceback" not in captured.err
    page = (folder / "study.md").read_text()
    assert "| none | not there yet |" in page and "nothing for the seeds" in page and "1 of 2 runs" in page
    assert "no order expected" in page


def test_run_in_a_process_of_its_own(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "kernels")]))
    run = runs_of(read_study(write()), tmp_path / "study")[1]
    runner = study.Runner([run], study.make_slots(2))
    runner.start()
    pid, cores = runner.jobs[0].process.pid, runner.slots[0]["cores"]
    assert os.getpriority(os.PRIO_PROCESS, pid) == os.getpriority(os.PRIO_PROCESS, 0) + study.NICE
    assert os.sched_getaffinity(pid) == set(cores)
    study.work(runner, lambda: None, Console())
    assert runner.num_done == 1 and runner.failed == {} and study.is_finished(run)
    assert len((run.folder / "commit").read_text().strip()) > 0


def test_dry_run_runs_nothing(
    write: Write, forked: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Seconds per turn-image are those of the runs with iterations done: 8 of 'two' took 4 s, 'one' makes 4."""
    path, folder = write(seeds=[0]), tmp_path / "study"
    assert command.study([str(path), "--folder", str(folder), "--dry_run"]) == 0
    assert "2 runs, 0 finished" in capsys.readouterr().out and not folder.exists() and forked == []
    two, one = runs_of(read_study(path), folder)
    assert study.expected_seconds(two, [two, one]) is None
    two.folder.mkdir(parents=True)
    line = {"reward/instruction": 0.5, "time/rollout_s": 1.5, "time/save_s": 0.5, "time/turn_images_per_second": 9.0}
    lines = [json.dumps({"iteration": n, **line}) + "\n" for n in range(2)]
    (two.folder / "metrics.jsonl").write_text(lines[0])
    assert study.expected_seconds(two, [two, one]) == 2.0  # the second iteration, like the first
    (two.folder / "metrics.jsonl").write_text("".join(lines))
    assert study.expected_seconds(one, [two, one]) == 2.0  # 4 turn-images at 0.5 s


CELLS = {"a": {}, "b": {"data.num_turns": 1}}
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "field": ({"cells": CELLS | {"c": {"rollout.group_sise": 4}}},
              "cell 'turns: c': rollout.group_sise is no field: did you mean rollout.group_size?"),
    "value": ({"cells": CELLS | {"c": {"rollout.group_size": 1}}},
              "cell 'turns: c': rollout.group_size is 1: must lie in"),
    "own": ({"cells": CELLS | {"c": {"run.seed": 1}}}, "cell 'turns: c' sets run.seed: leave it out"),
    "sessions": ({"cells": CELLS | {"c": {"evaluation.num_sessions": 5}}},
                 "cell 'turns: a' and cell 'turns: c' disagree on held-out data: evaluation.num_sessions is 4 and 5"),
    "hand-off": ({"cells": {"a": {}, "b": {"rollout.hand_off": "latents"}}},
                 "disagree on held-out data: rollout.hand_off is 'pixels' and 'latents'"),
    "editor": ({"cells": CELLS | {"c": {"model.path": "drifting"}}},
               "cell 'turns: a' and cell 'turns: c' disagree on the editor: model.path is "),
    "same": ({"cells": {"a": {}, "b": {"data.num_turns": 2}}}, "comparison turns has cells that are the same config"),
    "single": ({"cells": {"a": {}}}, "comparison turns has cells that are the same config, or a single one"),
    "no map": ({"cells": {"a": {}, "b": 3}}, "cell 'turns: b' is 3: must be a map of overrides"),
    "paper": ({"cells": CELLS, "paper": ["a", ["d"]]}, "comparison turns: paper names 'd', no cell"),
    "key": ({"cells": CELLS, "seed": [0]}, "comparison turns: seed is no key: did you mean seeds?"),
    "question": ({"question": 3}, "comparison turns: question is 3: must be a text"),
    "seeds": ({"seeds": [0, 0]}, "seeds is [0, 0]: must be a list of different whole numbers"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_study_is_one_line(name: str, write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes, message = WRONG[name]
    if "cells" in changes:
        changes = {"paper": []} | changes
    refused([str(write(**changes)), "--folder", str(tmp_path / "study")], message, capsys)
    assert not (tmp_path / "study").exists()


def test_turns_of_held_out_sessions_must_be_said(
    write: Write, base: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Left to the training's, K = 1 and K = 2 would be evaluated on different sessions."""
    path = write(base | {"evaluation.num_turns": 0})
    refused([str(path)], "disagree on held-out data: evaluation.num_turns is 2 and 1; set it in base", capsys)


def test_wrong_arguments_are_one_line(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write())
    (tmp_path / "file").write_text("")
    (tmp_path / "broken.yaml").write_text("base: [\n")
    for argv, message in {
        (path, "--only", "turn"): "--only turn is no comparison of the study: did you mean turns?",
        (path, "--jobs", "0"): "--jobs is 0: must be at least 1",
        (path, "--seeds", "-1"): "--seeds is [-1]: must be a list of different whole numbers",
        (path, "--folder", str(tmp_path / "file")): "no folder; choose another",
        ("nowhere.yaml",): "study nowhere.yaml cannot be read (No such file or directory)",
        (str(tmp_path / "broken.yaml"),): "broken.yaml is not valid YAML",
        (str(tmp_path / "file"),): "file is no map: it needs base, seeds, comparisons",
    }.items():
        refused(list(argv), message, capsys)


def refused(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command.study(argv)
    captured = capsys.readouterr()
    assert caught.value.code == 2 and captured.out == ""
    assert captured.err.startswith("mteditflow: ") and captured.err.count("\n") == 1 and message in captured.err


def test_every_slot_has_cores_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {4, 5, 6, 7, 8})
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert [slot["cores"] for slot in study.make_slots(2)] == [[4, 6, 8], [5, 7]]
    assert [slot["cores"] for slot in study.make_slots(None)] == [[4], [5], [6], [7], [8]]
    assert [slot["cores"] for slot in study.make_slots(6)][-1] == [4]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert [slot["env"] for slot in study.make_slots(None)] == [{"CUDA_VISIBLE_DEVICES": n} for n in ("3", "5")]


def test_the_papers_study() -> None:
    """The core at ten seeds, where failures are independent at five, everything else at three, the base once per seed,
    every K judged at five turns, and the questions on which worlds may differ asked on both.
    """
    comparisons = read_study(ROOT / "configs" / "study.yaml")
    num_seeds = dict.fromkeys(["training_turns", "credit", "fusion", "score_scale", "judge"], 10)
    num_seeds |= {"training_turns_independent": 5, "credit_independent": 5}
    assert all(c.seeds == tuple(range(num_seeds.get(c.name, 3))) for c in comparisons)
    assert set(num_seeds) < {c.name for c in comparisons}
    runs = runs_of(comparisons, Path("study"))
    assert len({run.folder for run in runs}) == len(runs)
    assert {run.config.num_held_out_turns for run in runs} == {5}
    assert len(runs_of(select(comparisons, ["credit", "fusion"], [5]), Path("study"))) == 6
    worlds = {c.name: c.model.path for c in comparisons}
    assert {name for name, world in worlds.items() if world == "embedded"} == {
        "training_turns_independent", "credit_independent"
    } and set(worlds.values()) == {"embedded", "drifting"}  # fmt: skip
    turns = comparisons[0]
    images = {name: cell.config.rollout.num_tasks * cell.config.data.num_turns for name, cell in turns.cells.items()}
    assert images == {"K=3": 12, "K=2": 8, "K=1": 4, "K=1, equal turn-images": 12, "K=5": 20}
    assert ("K=3", "K=1") in turns.claims and ("K=1", "K=1, equal turn-images") not in turns.claims
