"""A checkpoint is whole or not there, whatever happens while it is written."""

import dataclasses
import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mteditflow.config import Config, ModelConfig, ObjectiveConfig, OptimizerConfig, RolloutConfig, RunConfig
from mteditflow.record import checkpoint
from mteditflow.record.checkpoint import MANIFEST, load_latest, lock, save

CONFIG = Config(objective=ObjectiveConfig(name="grpo"), run=RunConfig(num_iterations=40))


def state_of(iteration: int, size: int = 64) -> dict[str, dict[str, Tensor]]:
    """Tensors that tell the iteration, in every type that a trainer keeps."""
    generator = torch.Generator().manual_seed(iteration)
    weight = torch.randn(size, 4, generator=generator)
    return {
        "current": {"a.lora_A": weight, "a.lora_B": weight.T},
        "ema": {"a.lora_A": weight.double(), "shared": weight},
        "optimizer": {
            "0.step": torch.tensor(float(iteration)),
            "0.exp_avg": weight.bfloat16(),
            "count": torch.arange(3),
        },
    }


def save_one(folder: Path, iteration: int, keep: int = 2, config: Config = CONFIG) -> Path:
    return save(folder, iteration=iteration, config=config, state=state_of(iteration), keep=keep)


def assert_is(loaded: checkpoint.Checkpoint | None, iteration: int, size: int = 64) -> None:
    assert loaded is not None and loaded.iteration == iteration
    expected = state_of(iteration, size)
    assert loaded.state.keys() == expected.keys()
    for group, tensors in expected.items():
        assert loaded.state[group].keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert loaded.state[group][name].dtype == tensor.dtype
            assert torch.equal(loaded.state[group][name], tensor)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def refuse(_: str) -> None:
    raise AssertionError("a whole checkpoint was called damaged")


def replace(config: Config, section: str, **values: Any) -> Config:
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})


def test_round_trip_is_bit_equal(tmp_path: Path) -> None:
    assert load_latest(tmp_path, CONFIG, refuse) is None
    path = save_one(tmp_path, 7)
    assert path == tmp_path / "checkpoints" / "iteration-000007"
    loaded = load_latest(tmp_path, CONFIG, refuse)
    assert_is(loaded, 7)
    assert loaded is not None
    loaded.state["current"]["a.lora_A"].zero_()  # its own memory, to be written


def test_newest_are_kept_and_leftovers_removed(tmp_path: Path) -> None:
    for iteration in (1, 2):
        save_one(tmp_path, iteration)
    (tmp_path / "checkpoints" / ".saving-iteration-000003-1").mkdir()
    (tmp_path / "checkpoints" / ".deleting-iteration-000000").mkdir()
    save_one(tmp_path, 3)
    assert names(tmp_path) == ["iteration-000002", "iteration-000003"]
    save_one(tmp_path, 3)  # as SIGTERM does right after a save
    assert names(tmp_path) == ["iteration-000002", "iteration-000003"]
    save_one(tmp_path, 1_000_000, keep=1)
    assert names(tmp_path) == ["iteration-1000000"]
    assert_is(load_latest(tmp_path, CONFIG, refuse), 1_000_000)


@pytest.mark.parametrize("file", ["current.safetensors", "optimizer.safetensors", MANIFEST])
@pytest.mark.parametrize("damage", ["flip", "missing", "cut"])
def test_damaged_newest_falls_back_and_says_so(tmp_path: Path, file: str, damage: str) -> None:
    save_one(tmp_path, 1)
    path = save_one(tmp_path, 2) / file
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        place = content.index(b'"rank": 32') + 9 if file == MANIFEST else len(content) - 5
        content[place] ^= 1  # in the manifest: another digit, still JSON
        path.write_bytes(content)
    said: list[str] = []
    assert_is(load_latest(tmp_path, CONFIG, said.append), 1)
    assert len(said) == 1 and "iteration-000002 is damaged" in said[0] and file in said[0]
    save_one(tmp_path, 2)
    assert_is(load_latest(tmp_path, CONFIG, refuse), 2)
    assert names(tmp_path) == ["iteration-000001", "iteration-000002"]


def test_nothing_but_damage_is_an_error(tmp_path: Path) -> None:
    (save_one(tmp_path, 1) / MANIFEST).unlink()
    with pytest.raises(ValueError, match="every checkpoint"):
        load_latest(tmp_path, CONFIG, lambda _: None)


def test_killed_between_the_renames_of_a_second_save(tmp_path: Path) -> None:
    path = save_one(tmp_path, 4, keep=1)
    path.rename(path.with_name(f"{path.name}.replaced"))
    assert_is(load_latest(tmp_path, CONFIG, refuse), 4)
    save_one(tmp_path, 4, keep=1)
    assert names(tmp_path) == ["iteration-000004"]


def test_other_version_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = save_one(tmp_path, 1) / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 99}))
    before = path.read_bytes()
    with pytest.raises(ValueError, match="version 99, this program reads 1") as error:
        load_latest(tmp_path, CONFIG, refuse)
    assert "\n" not in str(error.value)
    assert path.read_bytes() == before and names(tmp_path) == ["iteration-000001"]


def test_another_problem_is_refused_with_its_fields(tmp_path: Path) -> None:
    save_one(tmp_path, 1)
    other = Config(objective=ObjectiveConfig(name="nft"), rollout=RolloutConfig(group_size=4, microbatch_size=64))
    with pytest.raises(ValueError) as error:
        load_latest(tmp_path, other, refuse)
    message = str(error.value)
    assert "objective.name: was 'grpo', is 'nft'" in message
    assert "rollout.group_size: was 16, is 4" in message
    assert "rollout.microbatch_size: was 32, is 64" in message
    assert "\n" not in message and "learning_rate" not in message
    with pytest.raises(ValueError, match=r"optimizer\.microbatch_size: was 32, is 16"):
        load_latest(tmp_path, Config(optimizer=OptimizerConfig(microbatch_size=16)), refuse)
    with pytest.raises(ValueError, match=r"lora\.targets: was \[.*\], is \['to_q'\]"):
        load_latest(tmp_path, replace(CONFIG, "lora", targets=("to_q",)), refuse)


@pytest.mark.parametrize(("was", "now"), permutations(("embedded", "drifting", "/models/editor"), 2))
def test_a_folder_of_another_world_is_refused(tmp_path: Path, was: str, now: str) -> None:
    """Either miniature's run, or one of any other editor, resumed with another: one line, which names both."""
    before, after = (dataclasses.replace(CONFIG, model=ModelConfig(path=path)) for path in (was, now))
    save_one(tmp_path, 3, config=before)
    with pytest.raises(ValueError, match=f"model.path: was '{was}', is '{now}'") as caught:
        load_latest(tmp_path, after)
    assert "\n" not in str(caught.value) and "use another run.folder" in str(caught.value)
    assert_is(load_latest(tmp_path, before), 3)


def test_what_does_not_change_the_problem_may_change(tmp_path: Path) -> None:
    constant = replace(CONFIG, "optimizer", schedule="constant")
    save_one(tmp_path, 1, config=constant)
    config = replace(constant, "evaluation", every=0, num_sessions=512, num_steps=4)
    run = RunConfig(num_iterations=99, save_every=5, folder="else", max_ratio_error=0.1)
    assert_is(load_latest(tmp_path, dataclasses.replace(config, run=run), refuse), 1)
    with pytest.raises(ValueError, match=r"run\.seed: was 0, is 1"):
        load_latest(tmp_path, replace(constant, "run", seed=1), refuse)


@pytest.mark.parametrize("moves", [("rollout", "window_placement", "progressive"), ("optimizer", "schedule", "linear")])
def test_what_moves_over_the_run_fixes_the_number_of_iterations(tmp_path: Path, moves: tuple[str, str, str]) -> None:
    section, field, value = moves
    config = replace(CONFIG, section, **{field: value})
    save_one(tmp_path, 1, config=config)
    assert_is(load_latest(tmp_path, config, refuse), 1)
    with pytest.raises(ValueError, match=r"run\.num_iterations: was 40, is 41"):
        load_latest(tmp_path, replace(config, "run", num_iterations=41), refuse)


@pytest.mark.parametrize("call", [0, 2, 3, 5])  # syncs of the folder, of files, of the manifest, of the parent
def test_full_disk_keeps_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    save_one(tmp_path, 1, keep=1)
    calls = 0
    sync = os.fsync

    def fail(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == call + 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ValueError, match=r"no room .*iteration-000002: previous checkpoint kept") as error:
        save_one(tmp_path, 2, keep=1)
    assert "\n" not in str(error.value)
    monkeypatch.undo()
    assert names(tmp_path) == ["iteration-000001"]
    assert_is(load_latest(tmp_path, CONFIG, refuse), 1)


def test_other_errors_of_the_disk_are_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output"):
        save_one(tmp_path, 1)
    assert names(tmp_path) == []


SAVER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from test_checkpoint import CONFIG, state_of
from mteditflow.record.checkpoint import lock, save
folder = Path(sys.argv[1])
with lock(folder):
    for iteration in range(int(sys.argv[2]), 10**6):
        save(folder, iteration=iteration, config=CONFIG, state=state_of(iteration, 20_000), keep=2)
        print(iteration, flush=True)
"""


def start_saver(folder: Path, first: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SAVER, str(folder), str(first), str(Path(__file__).parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def test_sigkill_at_any_moment_loses_one_save(tmp_path: Path) -> None:
    """Three killed processes, each at a moment of its own; a second run is kept out while one is at work."""
    moments = random.Random(0)
    first = 0
    for _ in range(3):
        process = start_saver(tmp_path, first)
        assert process.stdout is not None
        assert int(process.stdout.readline()) == first
        with (
            pytest.raises(ValueError, match=rf"another run is at work there \(process {process.pid}\)"),
            lock(tmp_path),
        ):
            pass
        time.sleep(moments.uniform(0.05, 0.4))
        process.send_signal(signal.SIGKILL)
        reported = [first, *map(int, process.stdout.read().split())]
        process.wait()
        process.stdout.close()
        loaded = load_latest(tmp_path, CONFIG, refuse)
        assert loaded is not None and loaded.iteration - reported[-1] in (0, 1)  # 1: durable, killed before it was told
        assert_is(loaded, loaded.iteration, 20_000)
        first = loaded.iteration + 1
    with lock(tmp_path):  # the kernel let go
        save_one(tmp_path, first)
    assert len(names(tmp_path)) == 2 and all(not name.startswith(".") for name in names(tmp_path))


def test_lock_is_released_and_names_a_bad_folder(tmp_path: Path) -> None:
    for _ in range(2):
        with lock(tmp_path / "run"):
            assert (tmp_path / "run" / "lock").read_text() == f"{os.getpid()}\n"
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"run\.folder is .*cannot be made"), lock(tmp_path / "file"):
        pass
