"""The model card: what it says, and that its code runs."""

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

from mteditflow.config import Config, DataConfig, LoraConfig, ModelConfig, RewardConfig, cli, command
from mteditflow.export import card
from mteditflow.record.figures import METRICS, figure, turns_of
from mteditflow.record.files import read_json

ROOT = Path(__file__).parent.parent


def front_matter(text: str) -> dict[str, Any]:
    return yaml.safe_load(text.split("---\n")[1])


@pytest.mark.parametrize("name", ["lora_run", "weights_run", "klein_run"])
def test_card_of_a_run(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Its figures are those of the run's files; its recipe is the run's config."""
    run: Path = request.getfixturevalue(name)
    out = run / ("weights" if name == "weights_run" else "lora")
    config, text = cli.from_yaml(run / "config.yaml"), (out / "README.md").read_text()
    matter = front_matter(text)
    assert matter["library_name"] == "diffusers" and matter["pipeline_tag"] == "image-to-image"
    assert ("lora" in matter["tags"]) == (name != "weights_run") and "image-to-image" in matter["tags"]
    assert "base_model" not in matter  # a folder has no name on the hub
    before, after, gain = (
        read_json(run / f"{file}.json") for file in ("evaluation_before", "evaluation_after", "comparison")
    )
    for metric in METRICS:
        for old, new, change in zip(*map(turns_of, (before, after, gain)), strict=True):
            cells = figure(old, metric), figure(new, metric), figure(change, f"{metric}_gain")
            assert f"| {metric} | {old['turn']} | {' | '.join(map(str, cells))} |" in text
    assert f"{before['num_sessions']} held-out sessions" in text and "iteration 2 of 2" in text
    assert ("could not be scored" in text) == (name == "klein_run") and "not finished" not in text
    assert (out / "strips.png").read_bytes() == (run / "strips" / "iteration-000002.png").read_bytes()
    assert "](strips.png)" in text
    (tmp_path / "recipe.yaml").write_text(text.split("```yaml\n")[1].split("```")[0])
    again = cli.from_yaml(tmp_path / "recipe.yaml")
    assert replace(again, run=config.run) == replace(card.public_config(config), run=config.run)
    assert again.run.folder == f"runs/{run.name}"
    assert str(run) not in text and config.model.path not in text


def test_what_a_card_keeps_to_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths by their last names, no server's address; hub names and words stay."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "flux").mkdir(parents=True)
    also = ("model:/models/my-head=0.1", "model:owner/head", "mine:sharpness=0.2", "mine:Head:/models/x=0.5")
    reward = RewardConfig(
        judge="vlm", vlm="./judges/qwen", url="http://10.0.0.7:8000/v1", consistency="~/dino", also=also
    )
    config = Config(model=ModelConfig(path="models/flux"), reward=reward, data=DataConfig(path="/home/me/edits.jsonl"))
    public = card.public_config(config)
    assert (public.model.path, public.data.path, public.reward.vlm) == ("flux", "edits.jsonl", "qwen")
    assert (public.reward.url, public.reward.consistency) == ("", "dino")
    assert public.reward.also == ("model:my-head=0.1", *also[1:3], "mine:Head:x=0.5")
    text = replace(config, reward=replace(reward, also=also[-1]))
    assert card.public_config(text).reward.also == ("mine:Head:x=0.5",)
    assert public == replace(config, model=public.model, data=public.data, reward=public.reward)
    hub = replace(config, reward=RewardConfig(judge="vlm"), model=ModelConfig(), data=DataConfig())
    assert card.public_config(hub) == hub


def test_card_of_a_run_that_is_not_evaluated(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    """It takes the place of an earlier export's card and strips."""
    out = tmp_path / "out"
    write_run(tmp_path / "young", config_of(tiny_pipeline_folder))
    command.export([str(tmp_path / "young"), "--out", str(out)])
    (out / "strips.png").touch()
    command.export([str(tmp_path / "young"), "--out", str(out), "--adapter", "current"])
    text = (out / "README.md").read_text()
    assert not (out / "strips.png").exists() and "strips.png" not in text
    assert "has not been evaluated" in text and "not averaged" in text and "iteration 3 of 7" in text


def run_code(out: Path, base: str, folder: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run the Python of a card on a photograph, where its folders are; returns its names."""
    patch.chdir(folder)
    Image.new("RGB", (100, 80), "red").save("photo.png")
    names: dict[str, Any] = {}
    exec(card.read_usage(out, base), names)
    assert Image.open("edit.png").size == (SIZE, SIZE)
    return names


def test_the_code_of_the_card_of_another_family_runs(
    klein_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = cli.from_yaml(klein_run / "config.yaml").model.path
    names = run_code(klein_run / "lora", base, tmp_path, monkeypatch)
    assert len(names["pipe"].transformer.peft_config) == 1


@pytest.mark.parametrize("form", ["diffusers", "merged"])
@pytest.mark.parametrize("lora", [LORA, FULL], ids=["lora", "full"])
def test_the_code_of_the_card_runs(
    tiny_pipeline_folder: Path, tmp_path: Path, lora: LoraConfig, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It edits a picture with the exported weights, at the trained size."""
    config = config_of(tiny_pipeline_folder, lora, condition_height=32, condition_width=48)
    write_run(tmp_path / "run", config)
    command.export([str(tmp_path / "run"), "--format", form, "--out", str(tmp_path / "out")])
    text = (tmp_path / "out" / "README.md").read_text()
    names = run_code(tmp_path / "out", config.model.path, tmp_path, monkeypatch)
    assert names["image"].size == (48, 32) and "_auto_resize=False" in text
    transformer = names["pipe"].transformer
    if form == "diffusers" and not lora.is_full:
        assert len(transformer.peft_config) == 1
    else:
        base = dict(loaded(tiny_pipeline_folder).transformer.named_parameters())
        weights = dict(transformer.named_parameters())
        assert any(not torch.equal(weights[key], base[key]) for key in base)


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
    merged = card.Card(
        config=config, iteration=1, adapter="ema", form="merged", dtype="float32", pipeline="FluxKontextPipeline",
        file="", source="out",
    )  # fmt: skip
    matter = card.front_matter(merged)
    assert matter["base_model"] == config.model.path and matter["base_model_relation"] == "merge"
    assert card.front_matter(replace(merged, form="diffusers"))["base_model_relation"] == "adapter"
    full = replace(merged, config=replace(config, lora=FULL))
    assert (
        card.front_matter(full)["base_model_relation"] == "finetune" and "lora" not in card.front_matter(full)["tags"]
    )
