"""Time left, bars and lines, and what a duration was measured beside."""

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mteditflow.config import Config, DataConfig, EvaluationConfig, RolloutConfig, RunConfig
from mteditflow.record.metrics import Reporter
from mteditflow.watch import pace, progress
from mteditflow.watch.pace import CORE_WAIT, CoreWait, num_sessions_left, seconds_left, session_seconds

CONFIG = Config(
    data=DataConfig(num_turns=3), rollout=RolloutConfig(num_tasks=2, group_size=4, num_steps=4),
    evaluation=EvaluationConfig(num_sessions=40, num_sessions_short=10, num_steps=8, every=5),
    run=RunConfig(num_iterations=20, num_judged=3, save_every=4),
)  # fmt: skip
STEP = {"time/denoise_s": 4.0, "time/decode_s": 1.0, "time/forward_backward_s": 2.5, "time/score_s": 0.5}


def line(iteration: int, factor: float = 1.0, **others: float) -> dict[str, Any]:
    more = {f"time/{name}_s": value for name, value in others.items()}
    return {"iteration": iteration, **{name: factor * value for name, value in STEP.items()}, **more}


def test_time_left_is_right_from_the_second_iteration_on() -> None:
    """The first compiles for a minute. Iterations of 8 s, checkpoints of 2 s every fourth, 0.5 s a session."""
    lines = [line(0, 9.0), line(1, save=2.0)]
    checkpoints = (18 // 4 + 2) * 2.0
    assert num_sessions_left(2, CONFIG) == 3 * 10 + 40 + 2 * 3
    assert seconds_left(lines, 20, CONFIG, 0.5) == pytest.approx(18 * 8.0 + checkpoints + 76 * 0.5)
    assert seconds_left(lines[:1], 20, CONFIG, 0.5) == pytest.approx(19 * 72.0 + 76 * 0.5)
    assert seconds_left(lines, 20) == 18 * 8.0  # nothing known of evaluations
    assert seconds_left([], 20, CONFIG) is None and seconds_left([{"iteration": 3}], 20, CONFIG) is None
    assert seconds_left([line(0), line(19)], 20, CONFIG, 0.5) == pytest.approx(46 * 0.5)  # those after training


def test_sessions_take_what_they_took() -> None:
    """A short evaluation of 10 sessions in 6 s; before there is one: of 8 trajectories (4 x 8/4 + 1 + 0.5) s."""
    assert session_seconds([line(3), line(4, evaluate=6.0), line(5)], CONFIG) == 0.6
    assert session_seconds([line(0)], CONFIG) == pytest.approx((4.0 * 2 + 1.0 + 0.5) / 8)
    longer = replace(CONFIG, evaluation=replace(CONFIG.evaluation, num_turns=6))
    assert session_seconds([line(0)], longer) == pytest.approx(2 * (4.0 * 2 + 1.0 + 0.5) / 8)


def test_evaluations_to_come() -> None:
    """After 5, 10, 15 of 20 iterations, and after all of them where the last average may be the best."""
    short = [(num_sessions_left(done, CONFIG) - 46) // 10 for done in (0, 4, 5, 14, 15, 19, 20)]
    assert short == [3, 3, 2, 1, 0, 0, 0]
    patient = replace(CONFIG, run=replace(CONFIG.run, patience=2))
    assert [(num_sessions_left(done, patient) - 46) // 10 for done in (0, 15, 20)] == [4, 1, 0]
    never = replace(CONFIG, evaluation=replace(CONFIG.evaluation, every=0))
    assert num_sessions_left(0, never) == 46


def test_a_run_says_it(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation before training, of which a tenth was there, tells what a session takes: 36 sessions in 18 s."""
    now = [0.0]
    monkeypatch.setattr("mteditflow.record.metrics.time.monotonic", lambda: now[0])
    reporter = Reporter(tmp_path, iteration=0, num_iterations=20, config=CONFIG)
    with reporter.show_sessions(40) as show:
        for done in range(4, 41, 4):
            show(done)
            now[0] += 2.0 if done < 40 else 0.0
    for n, values in enumerate((line(0, 9.0), line(1, **{"save": 2.0}), line(2) | {CORE_WAIT: 0.375})):
        reporter.write(n, {name: value for name, value in values.items() if name != "iteration"})
    reporter.close()
    first, second, third = capsys.readouterr().err.splitlines()
    assert first.endswith("23 min left") and second.endswith("3 min left")  # 1406 s, then 194 s
    assert third.endswith("left  (beside other work: waited for a core 38% of the time)")
    reporter = Reporter(tmp_path, iteration=2, num_iterations=20, config=CONFIG)  # goes on: the pace is known
    reporter.write(2, {name: value for name, value in line(2, 5.0).items() if name != "iteration"})
    reporter.close()
    assert re.search(r"(\d) min left", capsys.readouterr().err)


def test_waiting_for_a_core_is_read_from_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, now = tmp_path / "schedstat", [100.0]
    monkeypatch.setattr(pace, "_SCHEDSTAT", file)
    monkeypatch.setattr("mteditflow.watch.pace.time.monotonic", lambda: now[0])
    file.write_text("5000000000 1000000000 77\n")
    wait = CoreWait()
    now[0], _ = 110.0, file.write_text("9000000000 3500000000 99\n")
    assert wait.read() == {CORE_WAIT: 0.25}
    now[0], _ = 120.0, file.write_text("19000000000 3500000000 99\n")
    assert wait.read() == {CORE_WAIT: 0.0}
    assert pace.say_sharing(0.05) == "" and "25%" in pace.say_sharing(0.25)
    file.unlink()
    assert wait.read() == {} and CoreWait().read() == {}  # a system that does not say


def test_a_terminal_has_a_bar_for_all_that_takes_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "140")
    assert list(progress.track(range(5), "trained", "batches", first=2)) == [2, 3, 4]
    assert "0/5" in (shown := capsys.readouterr().err) and "batches" in shown  # what is done is taken away
    with progress.working("loading an editor"):
        pass
    assert "loading an editor" in capsys.readouterr().err


def test_a_pipe_has_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Items of 10 s: a line after 30 and 60 s, none at the end; what took 4 s is not said, what took 80 s is."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    for _ in progress.track(range(8), "trained", "batches"):
        now[0] += 10
    assert capsys.readouterr().err == "trained 3 of 8 batches, 50 s left\ntrained 6 of 8 batches, 20 s left\n"
    for seconds, said in ((4.0, ""), (80.0, "loading: 80 s\n")):
        with progress.working("loading"):
            now[0] += seconds
        assert capsys.readouterr().err == said
