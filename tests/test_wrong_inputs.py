"""Nothing that a user can get wrong is a traceback, two lines, or taken for right: each is one line that says what is
wrong, with the field or path, and what helps. The inputs, by kind, are in wrong_inputs.py.
"""

import builtins
import errno
import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from PIL import Image
from wrong_inputs import (
    BYTES,
    FIGURE_SHAPES,
    FIGURES,
    SHAPES,
    YAML,
    Case,
    meaningless,
    numbers_of_commands,
    out_of_range,
    wrong_types,
    wrong_words,
)

from mteditflow import train
from mteditflow.config import Config, LoraConfig, command
from mteditflow.config.cli import LORA_FILE, to_yaml
from mteditflow.record import checkpoint

MIN_CASES = 400
REMEDY = re.compile(
    r"\b(must|give|did you mean|known are|leave|set|use|choose|take|write|add|see|lower|keep|name|expected|needs?|"
    r"--help|is missing|is no argument|is not valid YAML|make|delete|save|cannot|there are|says how many|rename)\b"
)
MODULE = "transformer_blocks.0.attn.to_q"


class AcceptedError(Exception):
    """Raised where a training would begin: its input was taken for right."""


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what wrong words speak of: files, a run, a LoRA."""
    folder = tmp_path_factory.mktemp("here")
    (folder / "file").write_text("")
    (folder / "folder").mkdir()
    Image.new("RGB", (64, 64), "red").save(folder / "a.png")
    (folder / "empty.jsonl").write_text("")
    (folder / "one.jsonl").write_text('{"image": "a.png", "instructions": ["Remove the ball"]}\n')
    (folder / "coco.json").write_text('{"images": [], "annotations": [], "categories": []}')
    cells = {"a": {}, "b": {"data.num_turns": 1}}
    comparison = {"x1": {"question": "Which?", "cells": cells}}
    study = {"base": {"evaluation.num_turns": 3}, "seeds": [0], "comparisons": comparison}
    (folder / "study.yaml").write_text(yaml.safe_dump(study))
    return folder


def make_run(folder: Path) -> Path:
    """The folder of a run of one iteration, as training leaves it."""
    config = Config(lora=LoraConfig(rank=2, alpha=2, targets=(MODULE,)))
    halves = {f"{MODULE}.lora_A.weight": torch.ones(2, 128), f"{MODULE}.lora_B.weight": torch.ones(128, 2)}
    checkpoint.save(folder, iteration=1, config=config, state={"current": halves, "ema": halves, "optimizer": {}})
    (folder / "config.yaml").write_text(to_yaml(config))
    (folder / "metrics.jsonl").write_text('{"iteration": 0, "reward/mean": 0.5}\n')
    return folder


@pytest.fixture
def refuse(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a command that has to be refused in one line; a training that would begin is one that took its input."""

    def begin(*_: Any) -> None:
        raise AcceptedError

    monkeypatch.setattr(train, "train", begin)
    monkeypatch.chdir(here)

    def run(words: list[str], expected: str) -> str:
        words, expected = [word.replace("{here}", str(here)) for word in words], expected.replace("{here}", str(here))
        try:
            code: Any = command.main(words)
        except SystemExit as stopped:
            code = stopped.code
        except AcceptedError:
            return f"{words}: was taken for right"
        except Exception as error:
            return f"{words}: {type(error).__name__}: {error}"
        said = capsys.readouterr().err
        is_one_line = said.startswith("mteditflow: ") and said.count("\n") == 1 and said.endswith("\n")
        if code != 2 or not is_one_line or expected not in said or not REMEDY.search(said):
            return f"{words}: code {code}, expected {expected!r}, said {said[:400]!r}"
        return ""

    return run


def assert_refused(refuse: Any, cases: Iterator[Case] | list[Case]) -> None:
    wrong = [problem for words, expected in cases if (problem := refuse(words, expected))]
    assert not wrong, "\n".join([f"{len(wrong)} inputs:", *wrong])


def test_words(refuse: Any) -> None:
    assert_refused(refuse, wrong_words())


def test_types(refuse: Any) -> None:
    assert_refused(refuse, wrong_types())


def test_ranges(refuse: Any) -> None:
    assert_refused(refuse, out_of_range())
    assert_refused(refuse, numbers_of_commands())


def test_combinations(refuse: Any) -> None:
    assert_refused(refuse, meaningless())


def test_forms_of_yaml(refuse: Any, here: Path) -> None:
    path = here / "config.yaml"
    for content, expected in (YAML | BYTES).items():
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        assert_refused(refuse, [(["train", "--config", str(path)], expected.replace("{path}", str(path)))])


def file_cases(folder: Path) -> Iterator[tuple[list[str], str, Path, bytes]]:
    """Words, what the line names, and the content of a file of another shape for them."""
    run, lora = make_run(folder / "run"), folder / "lora"
    lora.mkdir()
    for what, content in (SHAPES | FIGURE_SHAPES).items():
        for name in FIGURES if what != "nothing" else ():
            yield ["report", str(run)], str(run / name), run / name, content
    for path, content in {
        "judge/training.jsonl": b'{"iteration": 0}\n', "judge/evaluation.jsonl": b'{"iteration": 0, "sessions": [1]}\n',
        "strips/iteration-x.png": b"",
    }.items():  # fmt: skip
        yield ["report", str(run)], str(run / path.partition("/")[0]), run / path, content
    for content in SHAPES.values():
        profile = folder / "profile.json"
        plan = ["train", "--dry_run", "--gpu=h100", f"--calibration={profile}"]
        yield plan, f"--calibration {profile} is no profile", profile, content
        index = folder / "editor" / "model_index.json"
        yield ["train", f"--model.path={index.parent}"], f"model.path '{index.parent}'", index, content
        coco, out = folder / "coco.json", folder / "out.jsonl"
        generate = ["data", "generate", str(coco), f"--images={folder}", f"--out={out}"]
        yield generate, f"'{coco}'", coco, content
        yield ["evaluate", str(lora)], str(lora / LORA_FILE), lora / LORA_FILE, content
        manifest = run / "checkpoints" / "iteration-000001" / "checkpoint.json"
        yield ["export", str(run)], f"every checkpoint in {manifest.parent.parent} is damaged", manifest, content
    for content in [SHAPES[what] for what in ("nothing", "bytes", "a list", "half of it", "other keys")]:
        study = folder / "study.yaml"
        yield ["study", str(study)], f"study {study}", study, content
        rubric = folder / "rubric.txt"
        words = ["train", "--reward.judge=vlm", f"--reward.rubric={rubric}"]
        yield words, f"reward.rubric is '{rubric}'", rubric, content
        settings = run / "config.yaml"
        yield ["export", str(run)], str(run), settings, content
        yield ["evaluate", str(run)], str(settings), settings, content


def test_files_of_another_shape(refuse: Any, tmp_path: Path) -> None:
    wrong = []
    for words, expected, path, content in file_cases(tmp_path):
        path.parent.mkdir(parents=True, exist_ok=True)
        before = path.read_bytes() if path.exists() else None
        path.write_bytes(content)
        problem = refuse(words, expected)
        wrong += [f"{content[:40]!r}: {problem}"] if problem else []
        path.write_bytes(before) if before is not None else path.unlink()
    assert not wrong, "\n".join([f"{len(wrong)} inputs:", *wrong])


LORAS: dict[str, tuple[dict[str, torch.Tensor], dict[str, str]]] = {
    "holds no LoRA of a transformer": ({}, {"format": "pt"}),
    "has 'a'": ({"a": torch.ones(2, 2)}, {}),
    "do not go together": ({f"transformer.{MODULE}.lora_A.weight": torch.ones(2, 128)}, {}),
    "its lora_adapter_metadata is not peft's settings": ({}, {"lora_adapter_metadata": "{"}),
    "lora_adapter_metadata is not peft's settings as JSON": ({}, {"lora_adapter_metadata": "[1]"}),
}


def test_loras_of_another_shape(refuse: Any, tmp_path: Path) -> None:
    for expected, (tensors, metadata) in LORAS.items():
        safetensors.torch.save_file(tensors, tmp_path / LORA_FILE, metadata)
        assert_refused(refuse, [(["evaluate", str(tmp_path)], expected)])


def folder_cases(folder: Path) -> Iterator[Case]:
    """Folders that cannot be made, or are none."""
    (folder / "file").write_text("")
    (folder / "full").mkdir()
    (folder / "full" / "notes.txt").write_text("mine")
    run = make_run(folder / "run")
    for path in (f"{folder}/file", f"{folder}/file/below", "/dev/null/run", "/proc/self/run", f"{folder}/{300 * 'a'}"):
        yield ["train", f"--run.folder={path}"], f"run.folder is '{path}'"
        yield ["evaluate", "base", f"--out={path}"], f"--out is '{path}'"
        yield ["export", str(run), f"--out={path}"], path
        yield ["study", "{here}/study.yaml", f"--folder={path}"], f"--folder is '{path}'"
        yield ["report", path], path
        yield ["export", path], path
        yield ["evaluate", path], path
        yield ["study", path], f"study {path}"
        yield ["train", "--config", path], f"config file {path}"
        yield ["data", "check", path], path
        yield ["data", "generate", "{here}/coco.json", f"--images={path}", f"--out={folder}/a.jsonl"], path
        yield ["data", "generate", "{here}/coco.json", "--images={here}", f"--out={path}/a.jsonl"], path
        yield ["data", "generate", path, "--images={here}", f"--out={folder}/a.jsonl"], path
        yield ["train", f"--model.path={path}"], f"model.path '{path}'"
        yield ["train", "--reward.judge=vlm", f"--reward.rubric={path}"], f"reward.rubric is '{path}'"
        yield ["train", "--reward.judge=vlm", f"--data.path={path}"], f"data.path is '{path}'"
        yield ["pretrain", f"--output={path}"], path
        yield ["pretrain-judge", f"--output={path}"], path
    yield ["export", str(run), f"--out={folder}/full"], "full holds something else than an export"
    yield ["report", f"{folder}/full"], "is not the folder of a run"
    yield ["export", f"{folder}/full"], "full is no run, give the folder to write"
    yield ["evaluate", f"{folder}/full"], "has neither a run's config.yaml nor"
    yield ["data", "generate", "{here}/coco.json", "--images={here}", "--out={here}/one.jsonl"], "is there already"
    yield ["data", "generate", "{here}/coco.json", "--images={here}", "--out={here}/one.txt"], "must end in .jsonl"


def test_folders(refuse: Any, tmp_path: Path) -> None:
    assert_refused(refuse, list(folder_cases(tmp_path)))


def permission_cases(folder: Path) -> Iterator[Case]:
    """Commands whose file or folder lies in `shut`, which may be neither read nor written to."""
    shut, run = folder / "shut", make_run(folder / "shut" / "run")
    for name in ("a.yaml", "a.json", "a.jsonl", "a.csv", "a.txt", "a.png", "model_index.json"):
        (shut / name).write_text("{}")
    for words in (["report", str(run)], ["export", str(run)], ["evaluate", str(run)]):
        yield words, str(run)
    yield ["train", "--config", f"{shut}/a.yaml"], f"config file {shut}/a.yaml cannot be read (Permission denied)"
    yield ["study", f"{shut}/a.yaml"], f"study {shut}/a.yaml cannot be read (Permission denied)"
    yield ["train", f"--run.folder={shut}/new"], f"run.folder is '{shut}/new'"
    yield ["evaluate", "base", f"--out={shut}/new"], f"--out is '{shut}/new'"
    yield ["study", "{here}/study.yaml", f"--folder={shut}/new"], f"--folder is '{shut}/new'"
    yield ["train", "--dry_run", "--gpu=h100", f"--calibration={shut}/a.json"], f"--calibration {shut}/a.json"
    yield ["train", "--reward.judge=vlm", f"--reward.rubric={shut}/a.txt"], f"reward.rubric is '{shut}/a.txt'"
    yield ["train", "--reward.judge=vlm", f"--data.path={shut}/a.jsonl"], f"data.path is '{shut}/a.jsonl'"
    yield ["train", f"--model.path={shut}"], f"model.path '{shut}'"
    for name in ("a.jsonl", "a.csv"):
        yield ["data", "check", f"{shut}/{name}"], f"'{shut}/{name}': cannot be read"
    yield ["data", "generate", f"{shut}/a.json", "--images={here}", f"--out={folder}/b.jsonl"], f"'{shut}/a.json'"
    yield ["pretrain", f"--output={shut}/new"], f"{shut}/new"
    yield ["pretrain-judge", f"--output={shut}/new"], f"{shut}/new"


def test_permissions(refuse: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's own refusal is feigned: root, whom a container has for a user, may do everything."""
    cases, shut = list(permission_cases(tmp_path)), str(tmp_path / "shut")

    def forbid(module: Any, name: str) -> None:
        allowed = getattr(module, name)

        def ask(path: Any, *args: Any, **named: Any) -> Any:
            if isinstance(path, str | Path) and str(path).startswith(shut):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return allowed(path, *args, **named)

        monkeypatch.setattr(module, name, ask)

    for module, name in ((builtins, "open"), (io, "open"), (os, "mkdir")):
        forbid(module, name)
    is_allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, *args: not str(path).startswith(shut) and is_allowed(path, *args))
    assert_refused(refuse, cases)


def test_there_are_as_many_as_promised(tmp_path: Path) -> None:
    cases = [
        *wrong_words(),
        *wrong_types(),
        *out_of_range(),
        *numbers_of_commands(),
        *meaningless(),
        *YAML,
        *BYTES,
        *LORAS,
    ]
    for name, make in (("files", file_cases), ("folders", folder_cases), ("shut", permission_cases)):
        (tmp_path / name).mkdir()
        cases += make(tmp_path / name)
    assert len({json.dumps([str(part) for part in case]) for case in cases}) >= MIN_CASES
