"""Everything that a resume needs, on disk: saved whole or not at all.

A checkpoint is a folder `checkpoints/iteration-000012/` with one safetensors file per group of tensors and a
`checkpoint.json` that names the iteration, the config and the sha256 of every file. It is written beside
its final name, synced, and renamed: a name without the leading dot is a finished checkpoint. Old ones go only after the
new one is durable. No pickle: a checkpoint cannot run code. Tensors pass through memory as bytes, so that what is
hashed is what is written and what is read; an adapter with its optimizer is small.

What every rank holds whole is written by the main one. Groups that are cut over ranks lie in `shards/`, a file from
each (shards.py), and are read by any number of ranks, cut or whole. All ranks go on from the same checkpoint: the
newest that every one of them finds whole.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from mteditflow.config import Config
from mteditflow.config.ranges import require
from mteditflow.config.resume import check_resume
from mteditflow.distributed import Ranks, alone
from mteditflow.record.files import ASIDE, is_disk_full, read_json, replace_file, set_aside, write_json
from mteditflow.record.shards import is_cut, read_shards, sha256, write_shards

VERSION = 1
MANIFEST = "checkpoint.json"
SHARDS = "shards"
SECONDS_TO_SEE = 10  # what another node has made
RUBRIC = "rubric.txt"
COPIED = ("metrics.jsonl", "judge", "config.yaml")  # of what a run goes on with
RESULTS = (
    "comparison.json", "evaluation_after.json", "evaluation_after.safetensors", "evaluating_after", "report.html",
    "lora", "weights",
)  # fmt: skip

_REPLACED, _TEMPORARY, _DOOMED = ".replaced", ".saving-", ".deleting-"
_NAME = re.compile(rf"iteration-(\d{{6,}})({re.escape(_REPLACED)})?")

State = dict[str, dict[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What was saved: groups (current, ema, old, optimizer, ...) of named tensors."""

    iteration: int
    path: Path
    held: State  # groups that were saved whole, on the CPU
    cut: tuple[str, ...] = ()  # names of groups that were saved in parts, and are read when they are asked for

    @property
    def state(self) -> State:
        """All groups whole, on the CPU."""
        return {group: self.read(group) for group in (*self.held, *self.cut)}

    def read(self, group: str, like: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """A group; of what was saved in parts, a tensor that has its like is cut as that is, and on its device."""
        return read_shards(self.path / SHARDS, group, like or {}) if group in self.cut else self.held[group]


class _Damaged(Exception):
    """A checkpoint that cannot be read whole."""


def save(
    folder: Path, *, iteration: int, config: Config, state: State, keep: int | None = None, ranks: Ranks | None = None
) -> Path:
    """Write the checkpoint of an iteration into `folder/checkpoints` and delete all but the newest `keep`, left out:
    run.num_checkpoints. Of several ranks all call it; where each writes a part, none returns before all are there.

    Raises ValueError, on every rank, when the disk is full or a rank sees another folder; the checkpoints before it are
    then as they were.
    """
    keep = config.run.num_checkpoints if keep is None else keep
    ranks, saving = ranks or alone(), _Saving(folder, iteration)
    cut = {group: tensors for group, tensors in state.items() if is_cut(tensors)}
    held = {group: tensors for group, tensors in state.items() if group not in cut}
    if not (cut or ranks.is_main):
        return saving.final
    in_step = ranks if cut else alone()
    try:
        _in_step(in_step, partial(saving.begin, has_shards=bool(cut)) if ranks.is_main else None)
        files: dict[str, str] = {}
        if cut:
            shards = saving.temporary / SHARDS
            _check_seen(shards, ranks)
            for written in _in_step(ranks, lambda: write_shards(shards, cut, ranks)):
                files |= {f"{SHARDS}/{name}": digest for name, digest in written.items()}

        def finish() -> None:
            _write(saving.temporary, iteration, config, held, files, tuple(cut))
            saving.finish(keep)

        _in_step(in_step, finish if ranks.is_main else None)
    except BaseException as error:
        if ranks.is_main:
            shutil.rmtree(saving.temporary, ignore_errors=True)
        if not is_disk_full(error):
            raise
        remedy = "previous checkpoint kept; free some space and run again"
        raise ValueError(f"no room on the disk to save {saving.final}: {remedy}") from error
    return saving.final


def _in_step(ranks: Ranks, work: Callable[[], Any] | None) -> list[Any]:
    """Do a rank's part, if it has one, and wait for the others: the results of all. Where one fails, all raise: what it
    was on that rank, an error that names it on the others, so that none goes on alone.
    """
    result, error = None, None
    try:
        result = work() if work else None
    except Exception as caught:
        error = caught
    said = (getattr(error, "errno", None), f"rank {ranks.rank}: {error}") if error else None
    gathered = ranks.gather_objects((result, said))
    if error:
        raise error
    for _, other in gathered:
        if other:
            raise OSError(*other) if other[0] else RuntimeError(other[1])
    return [result for result, _ in gathered]


def _check_seen(path: Path, ranks: Ranks) -> None:
    """ValueError, on every rank, where not all ranks see a folder; one over a network may come a little later."""
    for _ in range(SECONDS_TO_SEE):
        if path.is_dir():
            break
        time.sleep(1)
    blind = [str(rank) for rank, is_seen in enumerate(ranks.gather_objects(path.is_dir())) if not is_seen]
    if blind:
        raise ValueError(
            f"ranks {', '.join(blind)} do not see {path}, which the main rank does: run.folder must be on a file "
            f"system that all nodes share"
        )


class _Saving:
    """The places of a checkpoint that is being written; used by the main rank."""

    def __init__(self, folder: Path, iteration: int) -> None:
        self.folder, self.parent = folder, folder / "checkpoints"
        self.final = self.parent / f"iteration-{iteration:06d}"
        self.temporary = self.parent / f"{_TEMPORARY}{self.final.name}"

    def begin(self, *, has_shards: bool) -> None:
        """Make the folder to write to."""
        self.parent.mkdir(parents=True, exist_ok=True)
        _sync(self.folder)
        for path in self.parent.iterdir():  # what killed saves left; by the run's lock nobody is writing them
            if path.name.startswith((_TEMPORARY, _DOOMED)):
                shutil.rmtree(path, ignore_errors=True)
        (self.temporary / SHARDS if has_shards else self.temporary).mkdir(parents=True)

    def finish(self, keep: int) -> None:
        """Give a checkpoint that is written its name, and delete those beyond the newest."""
        replaced = self.parent / f"{self.final.name}{_REPLACED}"
        if self.final.exists():  # as after a fall back past a damaged one; killed here, the replaced one is read
            _delete(replaced)
            os.rename(self.final, replaced)
        os.rename(self.temporary, self.final)
        _sync(self.parent)
        _delete(replaced)
        for old in _list_finished(self.parent)[keep:]:
            if old != self.final:  # damaged ones that were passed over may be newer: never the one just written
                _delete(old)


def load_latest(
    folder: Path,
    config: Config | None,
    warn: Callable[[str], None] = print,
    groups: Collection[str] | None = None,
    ranks: Ranks | None = None,
    contents: Mapping[str, str] | None = None,
    only: int | None = None,
) -> Checkpoint | None:
    """Find the newest checkpoint of `folder` that is whole; None where there is none yet. config: of the run that goes
    on from it; None where none does. With `groups`, no others are read. Of several ranks all call it, and all get the
    same one. contents: as for `check_resume`. only: the iteration of the one that is wanted.

    A damaged one is passed over, and `warn` is told. Raises ValueError for a checkpoint of another version, for a
    config that changes the problem, and when every checkpoint is damaged: starting anew would bury them.
    """
    ranks, parent = ranks or alone(), folder / "checkpoints"
    finished = [parent / name for name in ranks.from_main([path.name for path in _list_finished(parent)])]
    finished, faults = finished if only is None else _pick(finished, only, parent), dict[Path, str]()
    for path in finished:
        _check_seen(path, ranks)
        found, damage = None, ""
        try:
            manifest = _read_manifest(path)
            if config is not None:
                check_resume(manifest["config"], config_dict(config), path, contents)
            found = _read(path, manifest, groups, ranks)
        except _Damaged as error:
            damage = str(error)
        damages = [said for said in ranks.gather_objects(damage) if said]
        if found and not damages:
            for newer, fault in faults.items() if ranks.is_main else ():
                warn(f"checkpoint {newer} is damaged ({fault}): falling back to the one before")
            return found
        faults[path] = damages[0]
    for fault in faults.values():
        raise ValueError(f"every checkpoint in {parent} is damaged ({fault}): restore one, or use another run.folder")
    return None


def _pick(finished: list[Path], iteration: int, parent: Path) -> list[Path]:
    """Pick the checkpoints of an iteration. ValueError: there is none."""
    there = f"{parent} has {', '.join(str(_number(path)) for path in reversed(finished)) or 'none'}"
    found = [path for path in finished if _number(path) == iteration]
    require(bool(found), "--resume_from", iteration, f"{there}; run.num_checkpoints says how many are kept")
    return found


def went_back(folder: Path, iteration: int) -> Path | None:
    """Find what a run that went back to an iteration had done after it; None where it did not go back there yet."""
    return next(iter(sorted((folder / ASIDE).glob(_aside("*", iteration)))), None)


def go_back(folder: Path, iteration: int) -> Path | None:
    """Set aside what a run did after an iteration, and return where it is: later checkpoints and what their weights
    made are moved, the metrics and what the judge saw copied, since they go on from there. None: there is nothing.
    """
    strips = [path for path in (folder / "strips").glob("iteration-*.png") if int(path.stem[-6:]) > iteration]
    later = [path for path in _list_finished(folder / "checkpoints") if _number(path) > iteration]
    begun = [path.name[1:] for path in (folder / ASIDE).glob(f".{_aside('*', iteration)}")]  # and killed
    if not (later or begun):
        return None
    name = begun[0] if begun else _aside(f"{_number(later[0]):06d}", iteration)
    moved = [*results(folder), *strips, *later]
    return set_aside(folder, name, copied=[folder / kept for kept in COPIED], moved=moved)


def results(folder: Path) -> list[Path]:
    """List what a run makes of its weights at its end, first what says that it is finished; all may be missing."""
    return [*(folder / name for name in RESULTS), *sorted((folder / "judge").glob("compared*"))]


def _aside(newest: str, iteration: int) -> str:
    """Name of the folder of what came after an iteration."""
    return f"iteration-{newest}-to-{iteration:06d}"


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
        file = (folder / "lock").open("a+")
    except OSError as error:
        raise ValueError(f"run.folder is '{folder}': cannot be made ({error.strerror}); choose another") from None
    with file:
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


def _write(
    folder: Path, iteration: int, config: Config, held: State, shards: dict[str, str], cut: tuple[str, ...]
) -> None:
    """Files and manifest, every one synced before its folder. shards: hashes of the files that are there by now."""
    files: dict[str, str] = {}
    for group, tensors in held.items():
        # copies: safetensors refuses tensors that share their memory
        copies = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
        content = safetensors.torch.save(copies)
        replace_file(folder / f"{group}.safetensors", content, is_durable=True)
        files[f"{group}.safetensors"] = hashlib.sha256(content).hexdigest()
    manifest = {"version": VERSION, "iteration": iteration, "files": files, "config": config_dict(config)}
    if cut:
        manifest |= {"shards": shards, "cut": cut}
        _sync(folder / SHARDS)
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


def _read(path: Path, manifest: dict[str, Any], groups: Collection[str] | None, ranks: Ranks) -> Checkpoint:
    """Read what was saved whole, and check a share of the parts; the others check the rest."""

    def is_wanted(group: str) -> bool:
        return groups is None or group in groups

    held: State = {}
    for name, expected in manifest["files"].items():
        group = name.removesuffix(".safetensors")
        if is_wanted(group):
            content = (path / name).read_bytes() if (path / name).is_file() else b""
            if hashlib.sha256(content).hexdigest() != expected:
                raise _Damaged(f"{name} is missing or not what was written: its sha256 differs")
            held[group] = safetensors.torch.load(content)
    for name, expected in sorted(manifest.get("shards", {}).items())[ranks.rank :: ranks.world_size]:
        if sha256(path / name) != expected:
            raise _Damaged(f"{name} is missing or not what was written: its sha256 differs")
    cut = tuple(group for group in manifest.get("cut", ()) if is_wanted(group))
    return Checkpoint(iteration=manifest["iteration"], path=path, held=held, cut=cut)


def _list_finished(parent: Path) -> list[Path]:
    """Finished checkpoints, newest first; of one iteration, the replaced one last."""
    paths = parent.iterdir() if parent.is_dir() else ()
    found = [(int(match[1]), not match[2], path) for path in paths if (match := _NAME.fullmatch(path.name))]
    return [path for *_, path in sorted(found, reverse=True)]


def _number(path: Path) -> int:
    """Iteration of a finished checkpoint."""
    match = _NAME.fullmatch(path.name)
    assert match is not None, path
    return int(match[1])


def _delete(path: Path) -> None:
    """Delete a checkpoint that may be there; renamed first, since half of one must not look like a finished one."""
    if path.exists():
        doomed = path.with_name(f"{_DOOMED}{path.name}")
        os.rename(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _sync(path: Path) -> None:
    """fsync of a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
