"""The evaluation of an editor before training, kept between runs: other training settings do not change it.

An entry is kept under the hash of all that it depends on (`dependencies`), the editor's files and this program's code
among them, so that a change of anything is another entry. An evaluation is not kept where it is no function of what
this machine can see: judged by a server, or of an editor whose files cannot be told.

Entries are a JSON and the verdicts, in `evaluations` of $MTEDITFLOW_CACHE, else of $XDG_CACHE_HOME/mteditflow, else of
~/.cache/mteditflow; the newest NUM_KEPT stay. MTEDITFLOW_CACHE= (empty) keeps nothing, and the folder may be deleted.
"""

import dataclasses
import hashlib
import json
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mteditflow_kernels
import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor

from mteditflow.config import EMBEDDED, Config
from mteditflow.config.resume import OPERATIONAL, SESSIONS
from mteditflow.config.rubric import read_rubric
from mteditflow.data.sessions import MAX_BAD_SHARE
from mteditflow.distributed import Ranks
from mteditflow.evaluate.edival import Evaluation
from mteditflow.evaluate.held_out import (
    has_truth,
    held_out_fields,
    list_settings,
    load_evaluation,
    load_verdicts,
    save_verdicts,
)
from mteditflow.policy import Policy, model_path
from mteditflow.record import checkpoint
from mteditflow.record.checkpoint import Checkpoint
from mteditflow.record.files import read_json, write_json
from mteditflow.types import EditTask

CONTENTS = "contents.json"  # in a run's folder: what was behind its names
END_BYTES = 2**16
NUM_KEPT = 32  # a few MiB each at 64 px, up to about 100 at 512
PACKAGES = ("torch", "diffusers", "transformers")


def kept_evaluation(
    policy: Policy,
    tasks: list[EditTask],
    config: Config,
    ranks: Ranks,
    make: Callable[[], Evaluation],
    say: Callable[[str], None],
) -> Evaluation:
    """Find the evaluation of the editor without its adapter, or `make` it, on all ranks, and keep it; `say` is told
    which. The main rank looks, and keeps.
    """
    what, folder = f"the base on {len(tasks)} held-out sessions", cache_folder() if ranks.is_main else None
    wanted = dependencies(policy, tasks, config) if folder else None
    entry, found = None, None
    if folder is not None and wanted is not None:
        entry = folder / f"{_hash(json.dumps(wanted, sort_keys=True).encode())}.json"
        found = _load(entry, wanted, say)
    found = ranks.from_main(found)
    if found:
        say(f"evaluated {what} before, by the same settings: taken from {entry}")
        return found
    say(f"evaluating {what}")
    evaluation = make()
    if entry is not None and wanted is not None:
        try:
            _save(entry, wanted, evaluation)
        except OSError as error:  # a home without room, or without the right to write there, must not cost a run
            say(f"the evaluation of the base could not be kept in {folder} ({error.strerror}); see MTEDITFLOW_CACHE")
    return evaluation


def cache_folder() -> Path | None:
    """Return the folder of what is kept; None where nothing is to be."""
    chosen = os.environ.get("MTEDITFLOW_CACHE")
    if chosen is None:
        chosen = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mteditflow"
    return Path(chosen).expanduser() / "evaluations" if chosen else None


def dependencies(policy: Policy, tasks: list[EditTask], config: Config) -> dict[str, Any] | None:
    """List all that the bits of a base's evaluation depend on, as JSON; None where they depend on more."""
    config = dataclasses.replace(config, model=policy.config)  # what a run made of 'auto', by the length of it too
    contents = {"editor": content_of(model_path(config.model))}
    fields = {key: value for key, value in held_out_fields(config).items() if key not in ("model.path", "data.path")}
    if not has_truth(tasks):
        reward, measure = config.reward, config.reward.consistency_measure
        if reward.url:
            return None
        contents["judge"] = content_of(reward.vlm_path)
        if measure != "none":
            contents["consistency"] = content_of(measure)
        if reward.rubric:
            contents["rubric"] = _hash(read_rubric(reward.rubric).encode())
        others = {key: value for key, value in asdict(reward).items() if key not in ("also", "vlm", "rubric")}
        fields |= {f"reward.{key}": value for key, value in others.items()}
    if None in contents.values():
        return None
    program = {
        "code": _hash_files(Path(__file__).parent.parent, "*.py")
        + _hash_files(Path(mteditflow_kernels.__file__).parent, "*.py"),
        "packages": {name: version(name) for name in PACKAGES},
        "device": _device(policy.device),
        "attention": str(policy.attention),
        "threads": torch.get_num_threads(),
        "float32_products": torch.get_float32_matmul_precision(),
    }
    tasks_hash = hashlib.sha256()
    for task in tasks:
        _add(tasks_hash, task)
    return json.loads(json.dumps(program | {"contents": contents, "tasks": tasks_hash.hexdigest(), "fields": fields}))


def content_of(path: str) -> str | None:
    """Hash the files of a model's folder, or return the commit of a hub name's; None where it cannot be told."""
    if Path(path).is_dir():
        return _hash_files(Path(path), "*")
    for name in ("model_index.json", "config.json"):
        found = try_to_load_from_cache(path, name)  # snapshots/COMMIT/NAME
        if isinstance(found, str):
            return Path(found).parent.name
    return None


def name_contents(config: Config) -> dict[str, Any]:
    """Say what is behind the names in a config, as JSON: hashes of models, the sessions of a user's training data."""
    reward, found = config.reward, dict[str, Any]()
    if config.lora.init_from:
        found["lora.init_from"] = _hash_quickly(config.lora.init_from)
    found["model.path"] = _hash_quickly(model_path(config.model))
    if reward.judge == "vlm" and not reward.url:
        found["reward.vlm"] = _hash_quickly(reward.vlm_path)
    if config.data.path != EMBEDDED:
        from mteditflow.data.userdata import training_source

        found["data.path"] = sorted(session.key[:16] for session in training_source(config.data).sessions)
    return {name: content for name, content in found.items() if content is not None}


def compare_contents(before: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """Say of each name that both know how what is behind it differs; '' where it does not, a few sessions aside that
    are gone.
    """
    differences = {}
    for name in before.keys() & now.keys():
        was, found = before[name], now[name]
        if isinstance(was, list) and isinstance(found, list):
            new, gone = set(found) - set(was), set(was) - set(found)
            if new:
                differences[name] = f"{len(new)} of its sessions were not trained on before"
            elif len(gone) > MAX_BAD_SHARE * len(was):
                differences[name] = f"{len(gone)} of {len(was)} sessions are gone, more than {MAX_BAD_SHARE:.0%}"
            else:
                differences[name] = ""
        else:
            differences[name] = "" if was == found else "another content is behind the name than before"
    return differences


def read_contents(folder: Path) -> dict[str, Any]:
    """Read what was behind the names of a run; empty where that is not known."""
    try:
        return read_json(folder / CONTENTS)
    except ValueError:
        return {}


def find_saved(config: Config, ranks: Ranks, resume_from: int | None) -> tuple[Checkpoint | None, dict[str, Any]]:
    """Find the checkpoint that a run goes on from, on all ranks, and what is behind the names of its config.

    resume_from: the iteration to go back to, once; what came after it is set aside. ValueError: the config sets another
    problem, or there is no such checkpoint.
    """

    def say(line: str) -> None:
        if ranks.is_main:
            print(line, file=sys.stderr)

    folder, contents = Path(config.run.folder), name_contents(config)
    known: dict[str, Any] = ranks.from_main(read_contents(folder) if ranks.is_main else None)
    if resume_from is not None and (before := ranks.from_main(checkpoint.went_back(folder, resume_from))):
        again = f"what came after it then is in {before}, move that away to go back once more"
        say(f"--resume_from {resume_from}: went back there before, and goes on; {again}")
        resume_from = None
    differences = compare_contents(known, contents)
    saved = checkpoint.load_latest(folder, config, say, ranks=ranks, contents=differences, only=resume_from)
    if resume_from is not None and ranks.is_main and (aside := checkpoint.go_back(folder, resume_from)):
        say(f"--resume_from {resume_from}: going back; what came after it is in {aside}")
    gone = {*known.get("data.path", ())} - {*contents.get("data.path", ())}
    if saved and "data.path" in contents and gone:
        say(f"data.path: {len(gone)} sessions are gone, the others go on in a new order")
    return saved, contents


def load_before(folder: Path, problem: str, say: Callable[[str], None]) -> Evaluation | None:
    """Read a run's evaluation before training; None, with a line, where it is damaged or of another problem."""
    try:
        return load_evaluation(folder, "before", problem)
    except ValueError as error:
        say(f"the base is evaluated again: {error}")
        return None


def problem_of(tasks: list[EditTask], config: Config, contents: dict[str, Any]) -> str:
    """Hash what an evaluation before training is of: editor, LoRA that training starts from, sessions, settings, judge,
    but not how it is carried out.
    """
    is_by_truth, tasks_hash = has_truth(tasks), hashlib.sha256()
    settings = list_settings(config, is_by_truth=is_by_truth)
    left_out = {*OPERATIONAL, *SESSIONS, "data.fit", "reward.also", *contents}
    fields = {key: value for key, value in settings.items() if key not in left_out}
    names = {name: content for name, content in contents.items() if not (is_by_truth and name.startswith("reward."))}
    rubric = read_rubric(config.reward.rubric) if config.reward.rubric and not is_by_truth else ""
    for task in tasks:
        _add(tasks_hash, task)
    names.pop("data.path", None)  # what is trained on
    if config.lora.init_from:
        names.setdefault("lora.init_from", config.lora.init_from)  # of a hub name nothing else is known
    if fields["model.text_encoder"] == "offload":  # of the same bits
        fields["model.text_encoder"] = "resident"
    wanted = {"fields": fields, "contents": names, "rubric": rubric, "tasks": tasks_hash.hexdigest()}
    return _hash(json.dumps(wanted, sort_keys=True).encode())


def _hash_quickly(path: str) -> str | None:
    """Hash names, sizes, beginnings and ends of a model's files, which tells any two apart without reading gigabytes;
    else as `content_of`.
    """
    folder, total = Path(path), hashlib.sha256()
    if not folder.exists():
        return content_of(path)
    for file in sorted(file for file in (folder, *folder.rglob("*")) if file.is_file()):
        name, size = file.relative_to(folder), file.stat().st_size
        if not any(part.startswith(".") for part in name.parts):
            with file.open("rb") as content:
                first = content.read(END_BYTES)
                content.seek(max(0, size - END_BYTES))
                total.update(f"{name.as_posix()} {size} ".encode() + first + content.read())
    return total.hexdigest()


def _device(device: torch.device) -> str:
    """Name the GPU; of a CPU the processor and the instructions that torch takes, by which sums differ."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return f"{name or platform.processor()} {torch.backends.cpu.get_cpu_capability()}"


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _hash_files(folder: Path, pattern: str) -> str:
    """Hash names and contents of a folder's files, hidden ones aside."""
    total = hashlib.sha256()
    for path in sorted(path for path in folder.rglob(pattern) if path.is_file()):
        name = path.relative_to(folder)
        if not any(part.startswith(".") for part in name.parts):
            with path.open("rb") as file:
                total.update(f"{name.as_posix()} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def _add(total: Any, value: Any) -> None:
    """Feed a hash with a value and, where it is a dataclass, with all of its fields."""
    if isinstance(value, Tensor):
        total.update(f"{value.dtype} {tuple(value.shape)}".encode())
        total.update(value.detach().cpu().contiguous().numpy().tobytes())
    elif isinstance(value, tuple) and any(isinstance(part, Tensor) for part in value):
        for part in value:
            _add(total, part)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            total.update(field.name.encode())
            _add(total, getattr(value, field.name))
    else:
        total.update(f"{value!r};".encode())


def _load(entry: Path, wanted: dict[str, Any], say: Callable[[str], None]) -> Evaluation | None:
    """Read an entry; None where there is none. A damaged one is passed over, and `say` is told."""
    if not entry.is_file():
        return None
    try:
        about = read_json(entry)
        verdicts = _verdicts(entry, str(about.get("sha256")))
        if about.get("depends_on") == wanted and about.get("sha256") == _hash(verdicts.read_bytes()):
            return load_verdicts(verdicts)
    except (OSError, ValueError):
        pass
    say(f"the kept evaluation {entry} is damaged: made again")
    return None


def _save(entry: Path, wanted: dict[str, Any], evaluation: Evaluation) -> None:
    """Write the verdicts, then the JSON that makes them an entry; both whole or not at all, also where processes write
    the same entry at once: verdicts are named after their content, and the last JSON names whole ones.
    """
    entry.parent.mkdir(parents=True, exist_ok=True)
    mine = entry.with_name(f".{entry.stem}-{os.getpid()}")
    save_verdicts(mine, evaluation)
    sha256 = _hash(mine.read_bytes())
    mine.replace(_verdicts(entry, sha256))
    write_json(mine, {"sha256": sha256, "depends_on": wanted})
    mine.replace(entry)
    newest = sorted(entry.parent.glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    for old in newest[NUM_KEPT:]:
        for path in (old, *old.parent.glob(f"{old.stem}-*")):
            path.unlink(missing_ok=True)


def _verdicts(entry: Path, sha256: str) -> Path:
    return entry.with_name(f"{entry.stem}-{sha256[:16]}.safetensors")
