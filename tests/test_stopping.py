"""Two ranks under torchrun: who speaks when one fails, that all end, and that the rest goes on as if undisturbed."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked_ranks
import psutil
import pytest
from conftest import TINY_MAX_TEXT_TOKENS
from timed import is_timed

from mteditflow.record.metrics import read_lines

NUM_ITERATIONS = 3
Arguments = Callable[..., list[str]]


@pytest.fixture(scope="module")
def arguments(tiny_pipeline_folder: Path) -> Arguments:
    def make(folder: Path, **overrides: Any) -> list[str]:
        values = {
            "model.path": tiny_pipeline_folder, "model.max_text_tokens": TINY_MAX_TEXT_TOKENS, "lora.rank": 2,
            "data.num_turns": 2, "rollout.num_tasks": 2, "rollout.group_size": 2, "rollout.num_steps": 3,
            "rollout.microbatch_size": 2, "optimizer.microbatch_size": 2, "evaluation.num_sessions": 2,
            "evaluation.num_strips": 1, "evaluation.num_steps": 2, "evaluation.every": 0,
            "run.num_iterations": NUM_ITERATIONS, "run.save_every": 100, "run.folder": folder,
        } | {name.replace("__", "."): value for name, value in overrides.items()}  # fmt: skip
        return [word for name, value in values.items() for word in (f"--{name}", str(value))]

    return make


@pytest.fixture(autouse=True)
def shared_evaluation(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The evaluation before training is made once for all of these runs."""
    monkeypatch.setenv("MTEDITFLOW_CACHE", str(tmp_path_factory.getbasetemp() / "stopping"))


@pytest.fixture(scope="module")
def whole(arguments: Arguments, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    process = forked_ranks.start(folder / "log", arguments(folder / "run"))
    assert process.wait() == 0, (folder / "log").read_text()
    return folder / "run"


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = read_lines(folder / "metrics.jsonl")
    return [{key: value for key, value in line.items() if not is_timed(key)} for line in lines]


def assert_same_run(folder: Path, whole: Path) -> None:
    """The same metrics and weights, bit for bit."""
    assert len(metrics(whole)) == NUM_ITERATIONS and metrics(folder) == metrics(whole)
    for name in ("lora/pytorch_lora_weights.safetensors", "comparison.json"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()


def said(text: str) -> list[str]:
    """The lines of the program in what torchrun and its ranks wrote, above torchrun's own block."""
    block = text.index("FAILED") if "FAILED" in text else len(text)
    lines = text[:block].splitlines()
    return [line.removeprefix("mteditflow: ") for line in lines if line.startswith("mteditflow: ")]


def ranks_of(folder: Path) -> list[int]:
    return [int(line) for line in (folder / "pids").read_text().split()]


def assert_gone(numbers: list[int]) -> None:
    """All of the processes have ended, or do soon."""
    end = time.monotonic() + forked_ranks.PATIENCE
    for number in numbers:
        while psutil.pid_exists(number) and psutil.Process(number).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < end
            time.sleep(0.05)


@pytest.mark.parametrize(
    ("act", "line", "code"),
    [
        ("raise@1", "rank 1: KeyError: 'trouble'", 1),
        ("raise@0", "rank 0: KeyError: 'trouble'", 1),
        ("lose the judge@1", "rank 1: reward.url 'http://judge' gave no answer in 600 s", 2),
        ("lose the judge@all", "rank 0: reward.url 'http://judge' gave no answer in 600 s", 2),
        ("fill memory@1", "rank 1: out of memory (", 2),
        ("--lora.rank=4@1", "rank 0: rank 1 (on ", 2),
        ("--model.height=128@1", "rank 1: model.height is 128", 2),
        ("--model.height=128@all", "model.height is 128", 2),
        ("--rollout.num_tasks=1 --rollout.group_size=3@all", "rollout.num_tasks is 1: num_tasks x group_size = 3", 2),
    ],
)
def test_one_line_says_why_all_end(arguments: Arguments, tmp_path: Path, act: str, line: str, code: int) -> None:
    process = forked_ranks.start(tmp_path / "log", arguments(tmp_path / "run"), act=act)
    assert process.wait() == 1
    text = (tmp_path / "log").read_text()
    (found,) = said(text)
    assert found.startswith(line) and found in text[text.index("Root Cause") :]
    assert f"exitcode  : {code} " in text[text.index("Root Cause") :]
    assert text.count("KeyError: 'trouble'\n") == (2 if "raise" in act else 0)  # traceback and line
    assert "Connection closed" not in text.split("FAILED")[0] and "SIGKILL" not in text
    if "lora" in act:
        assert "lora.rank is 4, not 2; give all ranks the same program, config and command line" in found
    assert_gone(ranks_of(tmp_path))
