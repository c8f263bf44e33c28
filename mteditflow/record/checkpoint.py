"""Everything that a resume needs, on disk: saved whole or not at all.

A checkpoint is a folder `checkpoints/iteration-000012/` with one safetensors file per group of tensors and a
`checkpoint.json` that names the iteration, the config and the sha256 of every file. It is written beside
its final name, synced, and renamed: a name without the leading dot is a finished checkpoint. Old ones go only after the
new one is durable. No pickle: a checkpoint cannot run code. Tensors pass through memory as bytes, so that what is
hashed is what is written and what is read; an adapter with its optimizer is small.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from mteditflow.config import Config
from mteditflow.record.files import is_disk_full, read_json, replace_file, write_json

VERSION = 1
MANIFEST = "checkpoint.json"
NUM_KEPT = 2  # newest checkpoints: one to fall back on where the last is damaged
MAY_CHANGE = {
    "run.num_iterations", "run.save_every", "run.folder", "run.max_ratio_error", "run.num_judged", "rollout.cuda_graph",
    "reward.rubric",
}  # fmt: skip
"""Fields that a resumed run may change, with all of the sections below; the others change the numbers that follow. A
rubric's text is compared, by `keep_rubric`, instead of its path."""
SECTIONS_MAY_CHANGE = ("evaluation.", "distributed.")
RUBRIC = "rubric.txt"

_REPLACED, _TEMPORARY, _DOOMED = ".replaced", ".saving-", ".deleting-"
_NAME = re.compile(rf"iteration-(\d{{6,}})({re.escape(_REPLACED)})?")

State = dict[str, dict[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What was saved. `state` maps group (current, ema, old, optimizer, ...) to named tensors, on the CPU."""

    iteration: int
    state: State


class _Damaged(Exception):
    """A checkpoint that cannot be read whole."""


def save(folder: Path, *, iteration: int, config: Config, state: State, keep: int = NUM_KEPT) -> Path:
    """Write the checkpoint of an iteration into `folder/checkpoints` and delete all but the newest `keep`.

    Raises ValueError when the disk is full; the checkpoints before it are then as they were.
    """
    assert keep >= 1 and iteration >= 0
    parent = folder / "checkpoints"
    final = parent / f"iteration-{iteration:06d}"
    replaced, temporary = parent / f"{final.name}{_REPLACED}", parent / f"{_TEMPORARY}{final.name}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _sync(folder)
        for path in parent.iterdir():  # what killed saves left; by the run's lock nobody is writing them
            if path.name.startswith((_TEMPORARY, _DOOMED)):
                shutil.rmtree(path, ignore_errors=True)
        temporary.mkdir()
        _write(temporary, iteration, config, state)
        if final.exists():  # as after a fall back past a damaged one; killed here, the replaced one is read
            _delete(replaced)
            os.rename(final, replaced)
        os.rename(temporary, final)
        _sync(parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if not is_disk_full(error):
            raise
        remedy = "previous checkpoint kept; free some space and run again"
        raise ValueError(f"no room on the disk to save {final}: {remedy}") from error
    _delete(replaced)
    for old in _list_finished(parent)[keep:]:
        if old != final:  # damaged ones that were passed over may be newer: never the one just written
            _delete(old)
    return final


def load_latest(
    folder: Path,
    config: Config | None,
    warn: Callable[[str], None] = print,
    groups: Collection[str] | None = None,
) -> Checkpoint | None:
    """Read the newest checkpoint of `folder` that is whole; None where there is none yet. config: of the run that goes
    on from it; None where none does. With `groups`, no others are read.

    A damaged one is passed over, and `warn` is told. Raises ValueError for a checkpoint of another version, for a
    config that changes the problem, and when every checkpoint is damaged: starting anew would bury them.
    """
    finished = _list_finished(folder / "checkpoints")
    for path in finished:
        try:
            manifest = _read_manifest(path)
            if config is not None:
                check_resume(manifest["config"], config, path)
            state = _read_state(path, manifest["files"], groups)
        except _Damaged as error:
            warn(f"checkpoint {path} is damaged ({error}): falling back to the one before")
            continue
        return Checkpoint(iteration=manifest["iteration"], state=state)
    if finished:
        raise ValueError(
            f"every checkpoint in {folder / 'checkpoints'} is damaged: restore one, or use another run.folder"
        )
    return None


def check_resume(saved: dict[str, Any], config: Config, path: Path) -> None:
    """Raise ValueError, naming the fields, where `config` changes the problem that the `saved` config set."""
    before, now = _flat(saved), _flat(config_dict(config))
    # Both move over the whole run, so its length matters.
    is_length_fixed = config.rollout.window_placement == "progressive" or config.optimizer.schedule == "linear"
    may_change = MAY_CHANGE - ({"run.num_iterations"} if is_length_fixed else set())
    changed = [
        f"{name}: was {before.get(name)!r}, is {now.get(name)!r}"
        for name in dict.fromkeys([*now, *before])
        if before.get(name) != now.get(name) and name not in may_change and not name.startswith(SECTIONS_MAY_CHANGE)
    ]
    if changed:
        raise ValueError(
            f"cannot resume {path} with another config ({'; '.join(changed)}): "
            "set these back, or use another run.folder"
        )


def keep_rubric(folder: Path, text: str, *, is_resumed: bool) -> None:
    """Keep the text of a run's rubric, '' where it is not the user's. ValueError, one line: the run that is resumed has
    been judged by another.
    """
    path = folder / RUBRIC
    before = path.read_text(encoding="utf-8") if path.is_file() else ""
    if is_resumed and before != text:
        was = f"was {path}" if before else "was none"
        raise ValueError(
            f"reward.rubric: the text {was}, is {'another' if text else 'none'} now: cannot resume by another rubric, "
            f"set it back or use another run.folder"
        )
    if text:
        replace_file(path, text.encode(), is_durable=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold the run folder; ValueError if another process does. The kernel lets go when the process dies."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise ValueError(f"run.folder is '{folder}': cannot be made ({error.strerror}); choose another") from None
    with (folder / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(
                f"run.folder is '{folder}': another run is at work there (process {file.read().strip() or 'unknown'}); "
                "wait for it, stop it, or use another folder"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def config_dict(config: Config) -> dict[str, Any]:
    """The config as JSON gives it back: tuples are lists."""
    return json.loads(json.dumps(asdict(config)))


def _write(folder: Path, iteration: int, config: Config, state: State) -> None:
    """Files and manifest, every one synced before its folder."""
    files: dict[str, str] = {}
    for group, tensors in state.items():
        # copies: safetensors refuses tensors that share their memory
        copies = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
        content = safetensors.torch.save(copies)
        replace_file(folder / f"{group}.safetensors", content, is_durable=True)
        files[f"{group}.safetensors"] = hashlib.sha256(content).hexdigest()
    manifest = {"version": VERSION, "iteration": iteration, "files": files, "config": config_dict(config)}
    write_json(folder / MANIFEST, {**manifest, "sha256": _digest(manifest)}, is_durable=True)
    _sync(folder)


def _digest(manifest: dict[str, Any]) -> str:
    """Hash of a manifest's values, its own hash aside."""
    values = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = read_json(path / MANIFEST)
    except ValueError:
        raise _Damaged(f"{MANIFEST} is no JSON object") from None
    if manifest.get("version", VERSION) != VERSION:
        raise ValueError(
            f"checkpoint {path} has version {manifest['version']!r}, this program reads {VERSION}: "
            "use the program that wrote it, or another run.folder"
        )
    if manifest.get("sha256") != _digest(manifest):
        raise _Damaged(f"{MANIFEST} is missing or not what was written: its sha256 differs")
    return manifest


def _read_state(path: Path, files: dict[str, str], groups: Collection[str] | None) -> State:
    state: State = {}
    for name, expected in files.items():
        group = name.removesuffix(".safetensors")
        if groups is None or group in groups:
            content = (path / name).read_bytes() if (path / name).is_file() else b""
            if hashlib.sha256(content).hexdigest() != expected:
                raise _Damaged(f"{name} is missing or not what was written: its sha256 differs")
            state[group] = safetensors.torch.load(content)
    return state


def _list_finished(parent: Path) -> list[Path]:
    """Finished checkpoints, newest first; of one iteration, the replaced one last."""
    paths = parent.iterdir() if parent.is_dir() else ()
    found = [(int(match[1]), not match[2], path) for path in paths if (match := _NAME.fullmatch(path.name))]
    return [path for *_, path in sorted(found, reverse=True)]


def _delete(path: Path) -> None:
    """Delete a checkpoint that may be there; renamed first, since half of one must not look like a finished one."""
    if path.exists():
        doomed = path.with_name(f"{_DOOMED}{path.name}")
        os.rename(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _flat(sections: dict[str, Any]) -> dict[str, Any]:
    return {f"{section}.{name}": value for section, fields in sections.items() for name, value in fields.items()}


def _sync(path: Path) -> None:
    """fsync of a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
