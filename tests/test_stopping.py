"""Two ranks under torchrun: who speaks when one fails, that all end, and that the rest goes on as if undisturbed."""

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import forked_ranks
import psutil
import pytest
import safetensors.torch
import torch
from conftest import TINY_MAX_TEXT_TOKENS
from timed import is_timed
from torch._C._distributed_c10d import HashStore

from mteditflow import distributed
from mteditflow.config import Config
from mteditflow.config.command import train
from mteditflow.record import checkpoint, ending
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
            "evaluation.num_sessions_short": 2, "evaluation.num_strips": 1, "evaluation.num_steps": 2,
            "evaluation.every": 0, "run.num_iterations": NUM_ITERATIONS, "run.save_every": 100, "run.folder": folder,
        } | {name.replace("__", "."): value for name, value in overrides.items()}  # fmt: skip
        return [word for name, value in values.items() for word in (f"--{name}", str(value))]

    return make


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path) -> Iterator[None]:
    """What a test that fails leaves behind is killed."""
    yield
    numbers = [process.pid for process in forked_ranks.Fork.started if process.poll() is None]
    for number in numbers + (ranks_of(tmp_path) if (tmp_path / "pids").exists() else []):
        with suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)


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
    assert (folder / "comparison.json").read_bytes() == (whole / "comparison.json").read_bytes()
    found, expected = (  # metadata of a file come in any order
        safetensors.torch.load_file(run / "lora/pytorch_lora_weights.safetensors") for run in (folder, whole)
    )
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)


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
        ("--model.height=128@all", "model.height is 128: must be 64", 2),
        ("--lora.rank=0@1", "rank 1: lora.rank is 0", 2),
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
    above = text[: text.index("FAILED")]
    assert above.count("KeyError: 'trouble'\n") == (2 if "raise" in act else 0)  # traceback and line
    assert "Connection closed" not in above and "SIGKILL" not in text
    if "=4" in act:
        assert "lora.rank is 4, not 2; give all ranks the same program, config and command line" in found
    assert_gone(ranks_of(tmp_path))


def test_a_killed_rank_is_named_and_the_run_restarts_by_itself(
    arguments: Arguments, whole: Path, tmp_path: Path
) -> None:
    """From the last finished iteration, though run.save_every is never reached."""
    process = forked_ranks.start(tmp_path / "log", arguments(tmp_path / "run"), num_restarts=1, act="kill@1")
    assert process.wait() == 0, (tmp_path / "log").read_text()
    text = (tmp_path / "log").read_text()
    (found,) = said(text)
    assert found == (
        f"rank 1 (process {ranks_of(tmp_path)[1]}) ended without a word: killed, perhaps for want of memory, or "
        f"crashed; the same command goes on after iteration 1"
    )
    assert "going on after iteration 1" in text and "Connection closed" not in text
    assert_same_run(tmp_path / "run", whole)


def test_a_killed_first_rank_is_named_by_another(arguments: Arguments, tmp_path: Path) -> None:
    process = forked_ranks.start(tmp_path / "log", arguments(tmp_path / "run"), act="kill@0")
    assert process.wait() == 1
    text = (tmp_path / "log").read_text()
    (found,) = said(text)
    assert found.startswith(f"rank 0 (process {ranks_of(tmp_path)[0]}) ended without a word")
    assert "exitcode  : -9 " in text[text.index("Root Cause") :]
    assert_gone(ranks_of(tmp_path))


@pytest.mark.parametrize("shard", ["none", "full"])
def test_a_random_rank_may_be_killed_at_a_random_moment(arguments: Arguments, tmp_path: Path, shard: str) -> None:
    """torchrun starts again, and the metrics are bit-equal. MTEDITFLOW_NUM_KILLS: how often, once if unset."""

    def words(name: str) -> list[str]:
        return arguments(tmp_path / name / "run", distributed__shard=shard, run__save_every=2, evaluation__every=2)

    (tmp_path / "whole").mkdir()
    begin = time.monotonic()
    assert forked_ranks.start(tmp_path / "whole" / "log", words("whole")).wait() == 0
    seconds, chance = time.monotonic() - begin, random.SystemRandom()
    for number in range(int(os.environ.get("MTEDITFLOW_NUM_KILLS", "1"))):
        folder, rank, delay = tmp_path / str(number), chance.randrange(2), chance.uniform(0, seconds)
        folder.mkdir()
        process = forked_ranks.start(folder / "log", words(str(number)), num_restarts=1)
        end = time.monotonic() + forked_ranks.PATIENCE
        while not (folder / "pids").exists() or len(ranks_of(folder)) < 2:
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.01)
        time.sleep(delay)
        print(f"kill {number}: rank {rank}, {delay:.2f} s after the start, of {seconds:.2f} s")
        with suppress(ProcessLookupError):  # it has come to its end
            os.kill(ranks_of(folder)[rank], signal.SIGKILL)
        assert process.wait() == 0, (folder / "log").read_text()
        assert_same_run(folder / "run", tmp_path / "whole" / "run")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
def test_ranks_that_hang_stop_in_time_and_the_rest_goes_on(
    arguments: Arguments, whole: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """torchrun hands a signal on; where it is killed itself, the ranks see that it is gone."""
    process = forked_ranks.start(tmp_path / "log", arguments(tmp_path / "run"), act="hang@all")
    end = time.monotonic() + forked_ranks.PATIENCE
    while len([*tmp_path.glob("hangs-*")]) < 2:
        assert process.poll() is None and time.monotonic() < end, (tmp_path / "log").read_text()
        time.sleep(0.02)
    os.kill(process.pid, number)
    assert process.wait() == (-9 if number == signal.SIGKILL else 1)
    assert_gone(ranks_of(tmp_path))
    name = "SIGTERM" if number == signal.SIGKILL else number.name
    assert said((tmp_path / "log").read_text()) == [f"stopped by {name}; the same command goes on after iteration 1"]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["iteration-000001"]
    if number == signal.SIGTERM:
        assert forked_ranks.start(tmp_path / "log", arguments(tmp_path / "run")).wait() == 0
        assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK is 'one': must be a number from 0"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK is '-1': must be a number from 0"),
        ({"RANK": "0", "WORLD_SIZE": ""}, "WORLD_SIZE is '': must be a number from 0"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2 of WORLD_SIZE 2: must be less"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is '2' and RANK is not set"),
        ({"RANK": "0"}, "RANK is '0' and WORLD_SIZE is not set"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "WORLD_SIZE is 2 and MASTER_ADDR is not set"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, "WORLD_SIZE is 2 and MASTER_PORT is not set"),
        ({"LOCAL_RANK": "first"}, "LOCAL_RANK is 'first': must be a number from 0"),
    ],
)
def test_ranks_that_make_no_sense_are_one_line(
    arguments: Arguments,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    environment: dict[str, str],
    expected: str,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as caught:
        train(arguments(tmp_path / "run"))
    assert caught.value.code == 2 and not (tmp_path / "run").exists()
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"mteditflow: {expected}{line.removeprefix(f'mteditflow: {expected}')}" and "torchrun" in line


def test_local_rank_beyond_the_gpus_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match=r"^LOCAL_RANK is 2: this machine shows 2 GPUs; start at most that many .*$"):
        distributed.start(Config())


def test_a_rank_reads_nothing_that_a_dead_one_left() -> None:
    """The words of an earlier start are in the store when its ranks are started again, the first of them late."""
    store, num_ranks = HashStore(), 3
    for start in range(3):
        with ThreadPoolExecutor(num_ranks) as pool:
            others = [pool.submit(distributed._new_part, store, rank, num_ranks, 20) for rank in (1, 2)]
            first = pool.submit(distributed._new_part, store, 0, num_ranks, 20)
            parts = [future.result() for future in (first, *others)]
        assert not parts[1].check(["address"])
        parts[0].set("address", str(start))
        assert [part.get("address") for part in parts] == [str(start).encode()] * num_ranks
    with pytest.raises(ValueError, match="ranks 1, 2 have not come in 0 s"):
        distributed._new_part(store, 0, num_ranks, 0)


def test_a_signal_while_loading_ends_at_once(
    arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Even where no handler in Python can run."""
    monkeypatch.setattr("mteditflow.run.build_policy", lambda *_, **__: forked_ranks.hang(tmp_path, grace_s=100))
    process = forked_ranks.Fork(lambda: train(arguments(tmp_path / "run")))
    end = time.monotonic() + forked_ranks.PATIENCE
    while not (tmp_path / "hangs-0").exists():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGUSR1)
    assert process.wait() == 128 + signal.SIGUSR1
    line = "mteditflow: stopped by SIGUSR1; the same command goes on from there\n"
    assert capfd.readouterr().err.endswith(line) and not (tmp_path / "run" / "checkpoints").exists()
    with checkpoint.lock(tmp_path / "run"):
        pass


def test_waiting_for_a_judge_ends_by_a_signal(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught, ending.Ending() as run:
        run.begin(lambda: "goes on after iteration 7")
        os.kill(os.getpid(), signal.SIGINT)
        ending.result(Future())
    assert caught.value.code == 128 + signal.SIGINT
    assert capsys.readouterr().err == "mteditflow: stopped by SIGINT; the same command goes on after iteration 7\n"


def test_a_fork_is_not_the_run(tmp_path: Path) -> None:
    """A signal to a child, as when a pool of workers is ended, is none to the run."""
    with ending.Ending() as run:
        pid = os.fork()
        if pid == 0:
            (tmp_path / "ready").touch()
            time.sleep(forked_ranks.PATIENCE)
            os._exit(1)
        end = time.monotonic() + forked_ranks.PATIENCE
        while not (tmp_path / "ready").exists():
            assert time.monotonic() < end
            time.sleep(0.01)
        os.kill(pid, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM
        time.sleep(2 * ending.PERIOD_S)
        assert not run.asked
