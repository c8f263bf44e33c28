"""The model card: what it says, and that its code runs."""

import json
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import yaml
from export_parts import (
    FULL,
    LORA,
    SIZE,
    config_of,
    loaded,
    write_run,
)
from PIL import Image

from mteditflow.config import Config, LoraConfig, ModelConfig, cli, command
from mteditflow.export import card

ROOT = Path(__file__).parent.parent


def front_matter(text: str) -> dict[str, Any]:
    return yaml.safe_load(text.split("---\n")[1])


def with_results(run: Path) -> None:
    def figures(suffix: str, shift: float) -> dict[str, Any]:
        turns = [
            {"turn": turn} | {f"{name}{suffix}": 10.0 * turn + shift for name in card.METRICS}
            | {f"{name}{suffix}_interval": [10.0 * turn + shift - 1, 10.0 * turn + shift + 1] for name in card.METRICS}
            for turn in (1, 2)
        ]  # fmt: skip
        return {"num_sessions": 32, "turns": turns}

    for name, suffix, shift in (("evaluation_before", "", 0), ("evaluation_after", "", 5), ("comparison", "_gain", -5)):
        (run / f"{name}.json").write_text(json.dumps(figures(suffix, shift)))
    (run / "strips").mkdir()
    for n in (0, 20, 3):
        Image.new("RGB", (n + 1, 4)).save(run / "strips" / f"iteration-{n:06d}.png")


def test_card(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    config, run, out = config_of(tiny_pipeline_folder), tmp_path / "run", tmp_path / "out"
    write_run(run, config, iteration=7)
    with_results(run)
    command.export([str(run), "--out", str(out)])
    text = (out / "README.md").read_text()
    matter = front_matter(text)
    assert matter["library_name"] == "diffusers" and matter["pipeline_tag"] == "image-to-image"
    assert {"lora", "image-to-image"} <= set(matter["tags"])
    assert "base_model" not in matter  # a folder has no name on the hub
    assert "| IF | 2 | 20.0 [19.0, 21.0] | 25.0 [24.0, 26.0] | +15.0 [+14.0, +16.0] |" in text
    assert "32 held-out sessions" in text and "iteration 7 of 7" in text and "not finished" not in text
    assert Image.open(out / "strips.png").size == (21, 4) and "](strips.png)" in text
    recipe = text.split("```yaml\n")[1].split("```")[0]
    (tmp_path / "recipe.yaml").write_text(recipe)
    again = cli.from_yaml(tmp_path / "recipe.yaml")
    assert replace(again, run=config.run) == config and again.run.folder == "runs/run"
    write_run(tmp_path / "young", config)
    command.export(
        [str(tmp_path / "young"), "--out", str(out), "--adapter", "current"]
    )  # an earlier export is replaced
    text = (out / "README.md").read_text()
    assert not (out / "strips.png").exists() and "strips.png" not in text
    assert "has not been evaluated" in text and "not averaged" in text and "iteration 3 of 7" in text


@pytest.mark.parametrize("form", ["diffusers", "merged"])
@pytest.mark.parametrize("lora", [LORA, FULL], ids=["lora", "full"])
def test_the_code_of_the_card_runs(
    tiny_pipeline_folder: Path, tmp_path: Path, lora: LoraConfig, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It edits a picture with the exported weights, at the trained size."""
    config = config_of(tiny_pipeline_folder, lora, condition_height=32, condition_width=48)
    write_run(tmp_path / "run", config)
    command.export([str(tmp_path / "run"), "--format", form, "--out", str(tmp_path / "out")])
    code = (tmp_path / "out" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (100, 80), "red").save("photo.png")
    seen: dict[str, Any] = {}
    exec(code, seen)
    assert Image.open("edit.png").size == (SIZE, SIZE)
    assert seen["image"].size == (48, 32) and "_auto_resize=False" in code
    transformer = seen["pipe"].transformer
    if form == "diffusers" and not lora.is_full:
        assert len(transformer.peft_config) == 1
    else:
        base = dict(loaded(tiny_pipeline_folder).transformer.named_parameters())
        own = dict(transformer.named_parameters())
        assert any(not torch.equal(own[key], base[key]) for key in base)


@pytest.mark.parametrize(
    "name",
    [
        "FluxKontextPipeline",
        "Flux2Pipeline",
        "Flux2KleinPipeline",
        "QwenImageEditPipeline",
        "QwenImageEditPlusPipeline",
    ],
)
def test_the_card_s_arguments_are_the_pipeline_s(name: str) -> None:
    config = Config(model=ModelConfig(cfg_scale=4.0, guidance_scale=3.0))
    given = card.arguments(name, config)
    assert given.keys() <= signature(getattr(diffusers, name).__call__).parameters.keys()
    assert {"image", "prompt", "height", "width", "num_inference_steps"} <= given.keys()
    expected = {"Flux2KleinPipeline": "4.0", "FluxKontextPipeline": "3.0", "Flux2Pipeline": "3.0"}
    assert given.get("guidance_scale") == expected.get(name)
    assert given.get("true_cfg_scale") == (None if name in expected else "4.0")


def test_base_model_is_a_hub_name() -> None:
    config = Config(model=ModelConfig(path="black-forest-labs/FLUX.1-Kontext-dev"))
    own = card.Card(
        config=config, iteration=1, adapter="ema", form="merged", dtype="float32", pipeline="FluxKontextPipeline",
        file="", source="out",
    )  # fmt: skip
    matter = card.front_matter(own)
    assert matter["base_model"] == config.model.path and matter["base_model_relation"] == "merge"
    assert card.front_matter(replace(own, form="diffusers"))["base_model_relation"] == "adapter"
    full = replace(own, config=replace(config, lora=FULL))
    assert (
        card.front_matter(full)["base_model_relation"] == "finetune" and "lora" not in card.front_matter(full)["tags"]
    )
