"""Training from a LoRA of others; evaluation and export of one; the same export to the byte."""

import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from export_parts import config_of, loaded, ours, stock, write_run
from export_parts import refused as export_refused
from lora_parts import Drawn, comfyui, draw_originals, kohya, save
from torch import Tensor
from train_runs import Arguments, lora, metrics, refused

from mteditflow.config import LoraConfig, cli
from mteditflow.config.cli import LORA_FILE
from mteditflow.config.command import evaluate, export
from mteditflow.config.command import train as main
from mteditflow.data import held_out_tasks
from mteditflow.evaluate.held_out import load_evaluation
from mteditflow.evaluate.lora_files import read_subject
from mteditflow.policy import build_policy, read_lora, with_start
from mteditflow.record.files import read_json
from mteditflow.report.seen import read_compared
from mteditflow.rollout import Sampler
from mteditflow.study.cells import read_study
from mteditflow.types import Rollout


def small(*originals: str) -> dict[str, Drawn]:
    """A LoRA of rank 3 and alpha 6 that changes the tiny FLUX.1-Kontext visibly, and no more."""
    drawn = draw_originals("kontext").items()
    return {
        name: Drawn(down=0.2 * it.down, up=0.2 * it.up, alpha=it.alpha)
        for name, it in drawn
        if not originals or name in originals
    }


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of kohya's form, on two of FLUX.1's original linears: six of diffusers'."""
    drawn = small("double_blocks.0.img_attn.qkv", "single_blocks.0.linear1", "double_blocks.0.txt_attn.proj")
    return save(kohya(drawn), tmp_path_factory.mktemp("theirs") / "somebody.safetensors")


@pytest.fixture(scope="module")
def started(theirs: Path, arguments: Arguments, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run from that file, of two iterations, and its command line."""
    folder = tmp_path_factory.mktemp("runs") / "started"
    words = arguments(folder, lora__init_from=theirs, run__num_iterations=2, evaluation__every=0)
    main(words)
    return folder, words


def test_a_run_goes_on_from_a_lora(started: tuple[Path, list[str]], theirs: Path, tmp_path: Path) -> None:
    """Rank, alpha and modules are the file's; before training is the LoRA, not the base; the export has what became of
    it.
    """
    folder, _ = started
    config = cli.from_yaml(folder / "config.yaml")
    file = read_lora(str(theirs), config.model)
    assert (config.lora.rank, config.lora.alpha) == (3, 6) and config.lora.init_from == str(theirs)
    assert len(file) == 8 and build_policy(config.model, config.lora, 0, has_old=False).adapters.targets == [
        name for name in build_policy(config.model, LoraConfig(targets=()), 0, has_old=False).adapters.targets
        if name in file
    ]  # fmt: skip
    evaluate([str(theirs), "base", "--out", str(tmp_path), "--config", str(folder / "config.yaml")])
    reports = {path.parent.name: read_json(path) for path in tmp_path.glob("*/metrics.json")}
    before = read_json(folder / "evaluation_before.json")
    (given,) = (report for name, report in reports.items() if name != "base")
    assert {key: given[key] for key in before} == before
    assert load_evaluation(folder, "before") is not None
    with safetensors.safe_open(folder / "lora" / LORA_FILE, "pt") as opened:
        settings = json.loads(opened.metadata()["lora_adapter_metadata"])
    assert (settings["transformer.r"], settings["transformer.lora_alpha"]) == (3, 6)
    trained = lora(folder)
    moved = {
        name: (trained[f"transformer.{name}.lora_B.weight"] - it.up).abs().max().item() for name, it in file.items()
    }
    assert trained.keys() == {f"transformer.{name}.lora_{half}.weight" for name in file for half in "AB"}
    assert all(0 < change < 0.05 for change in moved.values()), moved  # of weights of about 0.2
    assert all(line["update/first_ratio_error"] == 0 for line in metrics(folder))
    assert f"from the LoRA {theirs.name} on" in (folder / "lora" / "README.md").read_text()


def test_what_is_compared_began_with_the_lora(started: tuple[Path, list[str]]) -> None:
    """Not with the base; `before` has the scores of the evaluation before training, `after` those of the one after, by
    other neighbours in a microbatch.
    """
    folder, _ = started
    places = {task.id: place for place, task in enumerate(held_out_tasks(cli.from_yaml(folder / "config.yaml")))}
    for name in ("before", "after"):
        evaluation = load_evaluation(folder, name)
        assert evaluation is not None
        for session in read_compared(folder):
            expected = evaluation.consistency[places[session[name]["task"]]].tolist()
            found = [value or math.nan for value in session[name]["rewards"]["consistency"]]
            assert found == pytest.approx(expected, abs=2e-4, nan_ok=True)  # four decimals are kept


def test_a_killed_one_has_the_same_bits(started: tuple[Path, list[str]], tmp_path: Path) -> None:
    """And evaluates the start again, where that was lost, though the adapter has moved on since."""
    folder, words = started
    again = tmp_path / "started"
    shutil.copytree(folder, again)
    shutil.rmtree(again / "checkpoints" / "iteration-000002")
    shutil.rmtree(again / "lora")
    for suffix in ("json", "safetensors"):
        (again / f"evaluation_before.{suffix}").unlink()
    main([str(again) if word == str(folder) else word for word in words])
    assert all(torch.equal(weight, lora(folder)[key]) for key, weight in lora(again).items())
    for name in ("evaluation_before", "evaluation_after", "comparison"):
        assert (again / f"{name}.json").read_bytes() == (folder / f"{name}.json").read_bytes()


class Killed(BaseException):
    """Nobody catches it."""


def test_parts_of_another_start_are_not_taken(
    theirs: Path, arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the evaluation before training, and begun again in the same folder from another LoRA."""
    other = save(
        kohya(small("double_blocks.0.img_attn.qkv", "single_blocks.0.linear1")), tmp_path / "other.safetensors"
    )
    original, left = Sampler.__call__, [0]

    def limited(self: Sampler, rows: Tensor) -> Rollout:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return original(self, rows)

    def begin(name: str, lora: Path, num_parts: int) -> Path:
        left[0] = num_parts
        folder = tmp_path / name
        words = arguments(folder, lora__init_from=lora, evaluation__num_sessions=6, evaluation__every=0)
        with pytest.raises(Killed):
            main(words)
        return folder

    monkeypatch.setattr(Sampler, "__call__", limited)
    folder = begin("run", theirs, 2)
    assert len([*(folder / "evaluating_before").glob("part-*")]) == 1
    verdicts = [
        safetensors.torch.load_file(begin(name, other, 3) / "evaluation_before.safetensors") for name in ("run", "new")
    ]
    assert verdicts[0].keys() == verdicts[1].keys()
    for key, value in verdicts[1].items():
        assert torch.equal(verdicts[0][key].nan_to_num(), value.nan_to_num()), key


def test_every_copy_starts_alike(theirs: Path, tiny_pipeline_folder: Path) -> None:
    """current, old and ema, of a rank that is the widest module's: the others are the file's and rows to be trained."""
    config = with_start(config_of(tiny_pipeline_folder, LoraConfig(init_from=str(theirs))))
    policy = build_policy(config.model, config.lora, 0, has_old=True)
    states = [policy.adapters.state(name) for name in ("current", "old", "ema")]
    for name, it in read_lora(str(theirs), config.model).items():
        for state in states:
            assert torch.equal(state[f"{name}.lora_A.weight"], it.down)
            assert torch.equal(state[f"{name}.lora_B.weight"], it.up)
    assert torch.equal(ours(config, states[0]), ours(config, states[2]))


def test_what_cannot_be_started_from_is_one_line(
    arguments: Arguments, theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dora = save(
        safetensors.torch.load_file(theirs) | {"lora_unet_x.dora_scale": torch.ones(1)}, tmp_path / "d.safetensors"
    )
    expected: dict[tuple[Any, bool], str] = {
        (tmp_path / "gone.safetensors", False): "lora.init_from: ",
        (dora, False): "of a DoRA: only a plain LoRA can be read",
        (theirs, True): f"lora.init_from is '{theirs}': lora.is_full trains the weights: must be empty",
    }
    for (word, is_full), line in expected.items():
        words = arguments(tmp_path / "run", lora__init_from=word, lora__is_full=str(is_full).lower())
        assert line in refused(capsys, words)
    assert not (tmp_path / "run").exists()


def test_cells_of_a_study_start_alike(theirs: Path, tmp_path: Path) -> None:
    """Their gains are over one evaluation before training."""
    study = {"base": {}, "seeds": [0], "comparisons": {"start": {
        "question": "From where?", "cells": {"new": {}, "theirs": {"lora.init_from": str(theirs)}}}}}  # fmt: skip
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(study))
    with pytest.raises(
        ValueError, match=r"lora\.init_from is '' and '.*somebody\.safetensors' in study .*: set it in base"
    ):
        read_study(path)


# Exports


@pytest.mark.parametrize("form", ["diffusers", "comfyui", "merged"])
def test_a_file_becomes_another_form(
    form: str, theirs: Path, tiny_pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The stock pipeline with the export edits as the trainer with the file; in float32 to the bit."""
    out = tmp_path / "out"
    export([str(theirs), "--base", str(tiny_pipeline_folder), "--format", form, "--out", str(out)])
    assert f"exported {theirs}: {out}" in capsys.readouterr().out
    config = with_start(config_of(tiny_pipeline_folder, LoraConfig(init_from=str(theirs))))
    expected = ours(config, build_policy(config.model, config.lora, 0, has_old=False).adapters.state("current"))
    text = (out / "README.md").read_text()
    assert "The LoRA somebody.safetensors" in text and "Rank 3, alpha 6" in text and str(tmp_path) not in text
    if form == "merged":
        torch.testing.assert_close(stock(loaded(out)), expected, rtol=0, atol=3e-4)  # as tests/test_export.py
        return
    if form == "comfyui":
        assert sorted(path.name for path in out.iterdir()) == ["README.md", "somebody.safetensors"]
        again = with_start(config_of(tiny_pipeline_folder, LoraConfig(init_from=str(out))))
        assert again.lora.targets == config.lora.targets
        state = build_policy(again.model, again.lora, 0, has_old=False).adapters.state("current")
        assert torch.equal(ours(again, state), expected)
        return
    pipeline = loaded(tiny_pipeline_folder)
    pipeline.load_lora_weights(out)
    assert torch.equal(stock(pipeline), expected)


def test_export_of_a_file_says_what_is_missing(
    theirs: Path, tiny_pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "run", config_of(tiny_pipeline_folder))
    (tmp_path / "empty").mkdir()
    assert "--base is missing" in export_refused(capsys, theirs, "--out", tmp_path / "out")
    assert "--out is missing" in export_refused(capsys, theirs, "--base", tiny_pipeline_folder)
    assert "a run knows its own" in export_refused(capsys, tmp_path / "run", "--base", tiny_pipeline_folder)
    assert "has no .safetensors file" in export_refused(capsys, tmp_path / "empty", "--out", tmp_path / "out")
    assert "no hub name that can be reached" in export_refused(
        capsys, theirs, "--base", "nobody/no-such-editor", "--out", tmp_path / "out"
    )
    assert not (tmp_path / "out").exists()


def test_files_are_subjects(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    """Every export of a run, and ComfyUI's form of others, is to the bit what it was made of."""
    config, run = config_of(tiny_pipeline_folder), tmp_path / "run"
    write_run(run, config)
    wanted = read_subject(str(run), config.model).fingerprint
    for form, name in (("diffusers", LORA_FILE), ("comfyui", "run.safetensors")):
        export([str(run), "--format", form, "--out", str(tmp_path / form)])
        for word in (tmp_path / form, tmp_path / form / name):
            assert read_subject(str(word), config.model).fingerprint == wanted
    drawn = small()
    for form, write in (("kohya", kohya), ("comfyui", comfyui)):
        save(write(drawn), tmp_path / f"{form}.safetensors")
    prints = {
        read_subject(str(tmp_path / f"{form}.safetensors"), config.model).fingerprint for form in ("kohya", "comfyui")
    }
    assert len(prints) == 1 and wanted not in prints


@pytest.mark.parametrize("form", ["diffusers", "comfyui", "merged"])
def test_an_export_is_the_same_to_the_byte(
    form: str, tiny_pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on another day. The order of metadata was that of a hash map, another one in each second file."""
    run = tmp_path / "run"
    write_run(run, config_of(tiny_pipeline_folder))
    out = run / "export" / f"{form}-float32-ema"
    found = set()
    for day in range(6 if form == "diffusers" else 2):
        monkeypatch.setattr(time, "time", lambda day=day: 1e9 + 86_400.0 * day)
        shutil.rmtree(out, ignore_errors=True)
        export([str(run), "--format", form])
        found.add(tuple((path.name, path.read_bytes()) for path in sorted(out.rglob("*")) if path.is_file()))
    assert len(found) == 1
