"""Exports of runs: what stock diffusers, and ComfyUI's published mapping, make of the files that we write."""

import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModel
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux_kontext import FluxKontextPipeline
from export_parts import (
    FULL,
    ORDER_TOLERANCE,
    config_of,
    flux_map,
    loaded,
    ours,
    qwen_map,
    refused,
    stock,
    write_run,
)
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from lora_parts import draw_originals, kohya, save
from torch import Tensor, nn

from mteditflow.config import command
from mteditflow.export import weights as export
from mteditflow.export.comfyui import comfyui_keys, unknown_modules
from mteditflow.record import checkpoint

ROOT = Path(__file__).parent.parent


# The LoRA for diffusers


@pytest.mark.parametrize("adapter", ["ema", "current"])
def test_diffusers_float32_is_the_trainer_bit_for_bit(
    tiny_pipeline_folder: Path, tmp_path: Path, adapter: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(tiny_pipeline_folder)
    state = write_run(tmp_path / "run", config)[adapter]
    command.export([str(tmp_path / "run"), "--adapter", adapter])
    out = tmp_path / "run" / "export" / f"diffusers-float32-{adapter}"
    assert f"exported {adapter} of iteration 3: {out}" in capsys.readouterr().out
    pipeline = loaded(tiny_pipeline_folder)
    base = stock(pipeline)
    pipeline.load_lora_weights(out)
    assert torch.equal(stock(pipeline), ours(config, state))
    assert (stock(pipeline) - base).abs().max() > 1e-2


def test_diffusers_bfloat16_is_the_rounded_adapter(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    """Each weight within bfloat16's half unit, 2^-8 of it, and the edit that of the rounded weights, to the bit."""
    config = config_of(tiny_pipeline_folder)
    state = write_run(tmp_path / "run", config)["ema"]
    command.export([str(tmp_path / "run"), "--dtype", "bfloat16", "--out", str(tmp_path / "out")])
    file = safetensors.torch.load_file(tmp_path / "out" / export.LORA_FILE)
    assert file.keys() == {f"transformer.{key}" for key in state}
    for key, weight in state.items():
        own = file[f"transformer.{key}"]
        assert own.dtype == torch.bfloat16
        torch.testing.assert_close(own.float(), weight, rtol=2**-8, atol=0)
    pipeline = loaded(tiny_pipeline_folder)
    pipeline.load_lora_weights(tmp_path / "out")
    pipeline.transformer.to(torch.float32)  # an adapter that is loaded in bfloat16 computes in it
    rounded = {key: weight.bfloat16().float() for key, weight in state.items()}
    assert torch.equal(stock(pipeline), ours(config, rounded))


def test_the_final_lora_is_a_source_too(
    tiny_pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = config_of(tiny_pipeline_folder), tmp_path / "run"
    write_run(run, config)
    command.export([str(run), "--out", str(run / "lora")])
    shutil.rmtree(run / "checkpoints")
    command.export([str(run), "--out", str(tmp_path / "out")])
    own, expected = (safetensors.torch.load_file(out / export.LORA_FILE) for out in (tmp_path / "out", run / "lora"))
    assert own.keys() == expected.keys() and all(torch.equal(own[key], expected[key]) for key in own)
    assert "take --adapter ema" in refused(capsys, run, "--adapter", "current")


# ComfyUI


def linears(transformer: nn.Module) -> dict[str, tuple[int, int]]:
    return {
        name: (module.out_features, module.in_features)
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear)
    }


def comfyui_change(file: dict[str, Tensor], prefix: str) -> Tensor:
    """What ComfyUI adds to a weight at strength 1 (comfy/weight_adapter/lora.py): alpha / r B A, alpha beside them."""
    up, down = file[f"{prefix}.lora_B.weight"], file[f"{prefix}.lora_A.weight"]
    return file[f"{prefix}.alpha"].item() / down.shape[0] * (up.float() @ down.float())


def test_comfyui_round_trip(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    config = config_of(tiny_pipeline_folder)
    state = write_run(tmp_path / "my-run", config)["ema"]
    command.export([str(tmp_path / "my-run"), "--format", "comfyui", "--out", str(tmp_path / "out")])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", "my-run.safetensors"]
    file = safetensors.torch.load_file(tmp_path / "out" / "my-run.safetensors")
    modules = {key.rsplit(".lora_", 1)[0] for key in state}
    known = {f"transformer.{module}": place for module, place in flux_map(1, 1, 32).items()}
    endings = r"\.(lora_A\.weight|lora_B\.weight|alpha)$"
    prefixes = {re.sub(endings, "", key) for key in file}
    assert prefixes == {f"transformer.{module}" for module in modules} and prefixes <= known.keys()
    assert len(file) == 3 * len(modules) == 3 * 16
    shapes = linears(loaded(tiny_pipeline_folder).transformer)
    for module in modules:
        _, _, num_rows = known[f"transformer.{module}"]
        change = comfyui_change(file, f"transformer.{module}")
        assert tuple(change.shape) == shapes[module] and num_rows in (0, change.shape[0])
        expected = 4.0 * (state[f"{module}.lora_B.weight"] @ state[f"{module}.lora_A.weight"])  # 8 / 2
        assert torch.equal(change, expected)
    assert "my-run.safetensors" in (tmp_path / "out" / "README.md").read_text()


def test_comfyui_knows_each_family(tiny_pipeline_folder: Path) -> None:
    """Our list of what ComfyUI has keys for is its map, over all linears of each family's transformer."""
    kontext = linears(loaded(tiny_pipeline_folder).transformer)
    assert unknown_modules("FluxKontextPipeline", kontext) == []
    assert kontext.keys() <= flux_map(1, 1, 32).keys()
    with torch.device("meta"):
        flux2 = linears(Flux2Transformer2DModel(num_layers=2, num_single_layers=2))
        qwen = linears(QwenImageTransformer2DModel(num_layers=2))
    without = unknown_modules("Flux2KleinPipeline", flux2)
    assert set(without) == flux2.keys() - flux_map(2, 2, 6144).keys()
    assert {name.split(".")[0] for name in without} == {
        *("time_guidance_embed", "double_stream_modulation_img", "double_stream_modulation_txt"),
        "single_stream_modulation",
    }
    assert unknown_modules("QwenImageEditPlusPipeline", qwen) == [] and qwen.keys() == qwen_map(2)
    state = {f"single_stream_modulation.linear.lora_{n}.weight": torch.zeros(1) for n in "AB"}
    with pytest.raises(ValueError, match=r"no keys for 1 of the adapted modules.*single_stream_modulation\.linear"):
        comfyui_keys("Flux2Pipeline", state, alpha=1)
    with pytest.raises(ValueError, match="a SanaPipeline are not known"):
        comfyui_keys("SanaPipeline", state, alpha=1)


# Merged and full weights


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_is_a_whole_pipeline(tiny_pipeline_folder: Path, tmp_path: Path, dtype: Any) -> None:
    config, out = config_of(tiny_pipeline_folder), tmp_path / "out"
    state = write_run(tmp_path / "run", config)["ema"]
    command.export([str(tmp_path / "run"), "--format", "merged", "--dtype", dtype, "--out", str(out)])
    own = FluxKontextPipeline.from_pretrained(out)  # float32, whatever the file is in
    base = dict(loaded(tiny_pipeline_folder).transformer.named_parameters())
    num_changed = 0
    for key, weight in own.transformer.named_parameters():
        exact, module = base[key].double(), key.removesuffix(".weight")
        slack = torch.zeros_like(exact)
        if f"{module}.lora_A.weight" in state:
            down, up = (state[f"{module}.lora_{n}.weight"].double() for n in "AB")
            exact, num_changed = exact + 4 * up @ down, num_changed + 1
            # r products and sums, a scaling, a sum: each a float32 rounding of at most the sum of magnitudes
            slack = 5 * 2**-24 * (base[key].double().abs() + 4 * up.abs() @ down.abs())
        slack = slack + (2**-8 * exact.abs() if dtype == "bfloat16" else 0)
        assert ((weight.double() - exact).abs() <= slack).all()
    assert num_changed == 16
    for part in ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"):
        for path in (tiny_pipeline_folder / part).iterdir():
            assert (out / part / path.name).read_bytes() == path.read_bytes()
    if dtype == "float32":
        torch.testing.assert_close(stock(own), ours(config, state), rtol=0, atol=ORDER_TOLERANCE)
        assert (stock(own) - stock(loaded(tiny_pipeline_folder))).abs().max() > 1e-2
    else:
        stored = safetensors.torch.load_file(out / "transformer" / "diffusion_pytorch_model.safetensors")
        assert {weight.dtype for weight in stored.values()} == {torch.bfloat16}


@pytest.mark.parametrize("form", ["diffusers", "merged"])
def test_full_weights_are_the_trainer_bit_for_bit(tiny_pipeline_folder: Path, tmp_path: Path, form: str) -> None:
    config, out = config_of(tiny_pipeline_folder, FULL), tmp_path / "out"
    state = write_run(tmp_path / "run", config)["ema"]
    command.export([str(tmp_path / "run"), "--format", form, "--out", str(out)])
    pipeline = loaded(out if form == "merged" else tiny_pipeline_folder)
    if form == "diffusers":
        assert sorted(path.name for path in out.iterdir()) == ["README.md", "transformer"]
        pipeline.transformer = type(pipeline.transformer).from_pretrained(out, subfolder="transformer")
    expected = ours(config, state)
    torch.testing.assert_close(stock(pipeline), expected, rtol=0, atol=ORDER_TOLERANCE)
    for weight in pipeline.transformer.parameters():
        # weights mapped from a file lie where a CPU's matrix product takes another path than for the trainer's own
        weight.data = weight.data.clone()
    assert torch.equal(stock(pipeline), expected)


def test_another_base_is_refused(
    tiny_pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(tiny_pipeline_folder)
    state = {
        key.replace("transformer_blocks.0", "transformer_blocks.1"): weight
        for key, weight in write_run(tmp_path / "run", config)["ema"].items()
    }
    checkpoint.save(tmp_path / "run", iteration=4, config=config, state={"ema": state}, keep=1)
    line = refused(capsys, tmp_path / "run", "--format", "merged")
    assert "does not fit the base" in line and "transformer_blocks.1" in line


# The hub


class FakeHub:
    """Stands in for HfApi; raises `error` at the upload."""

    calls: list[tuple[Any, ...]]
    error: Exception | None

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        FakeHub.calls.append(("create", repo_id, private, exist_ok))

    def upload_folder(self, *, repo_id: str, folder_path: Path) -> None:
        if FakeHub.error:
            raise FakeHub.error
        FakeHub.calls.append(("upload", repo_id, sorted(path.name for path in Path(folder_path).iterdir())))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[FakeHub]:
    FakeHub.calls, FakeHub.error = [], None
    monkeypatch.setattr(export, "HfApi", FakeHub)
    monkeypatch.setattr(export, "get_token", lambda: "a token")
    return FakeHub


def test_push(tiny_pipeline_folder: Path, tmp_path: Path, hub: type[FakeHub]) -> None:
    write_run(tmp_path / "run", config_of(tiny_pipeline_folder))
    command.export([str(tmp_path / "run")])
    assert hub.calls == []  # only when asked for
    command.export([str(tmp_path / "run"), "--push_to", "somebody/an-editor"])
    files = ["README.md", "pytorch_lora_weights.safetensors"]
    assert hub.calls == [("create", "somebody/an-editor", True, True), ("upload", "somebody/an-editor", files)]
    card_text = (tmp_path / "run/export/diffusers-float32-ema/README.md").read_text()
    assert 'load_lora_weights("somebody/an-editor")' in card_text


def http_error(text: str) -> HfHubHTTPError:
    error = HfHubHTTPError.__new__(HfHubHTTPError)
    Exception.__init__(error, text)
    return error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE is set; unset it"),
        (http_error("\n403 Forbidden: you cannot.\nMore"), r"refused (403 Forbidden: you cannot); the token must be"),
        (ConnectionError("no route"), "cannot be reached (no route); try again"),
    ],
)
def test_a_failed_push_is_one_line(
    tiny_pipeline_folder: Path,
    tmp_path: Path,
    hub: type[FakeHub],
    error: Exception,
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_run(tmp_path / "run", config_of(tiny_pipeline_folder))
    hub.error = error
    line = refused(capsys, tmp_path / "run", "--push_to", "somebody/an-editor")
    assert words in line and "is ready" in line
    assert (tmp_path / "run/export/diffusers-float32-ema" / export.LORA_FILE).is_file()


def test_bad_input_is_one_line(
    tiny_pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert "is no run folder" in refused(capsys, run)
    write_run(run, config_of(tiny_pipeline_folder))
    for name in ("nobody", "a/b/c", "a b/c", "somebody/an--editor"):
        assert "--push_to must be a name on the hub" in refused(capsys, run, "--push_to", name)
    monkeypatch.setattr(export, "get_token", lambda: None)
    assert "there is no token; run `hf auth login`" in refused(capsys, run, "--push_to", "somebody/an-editor")
    assert not (run / "export").exists()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.png").touch()
    assert "holds something else than an export" in refused(capsys, run, "--out", tmp_path / "photos")
    assert "is a file" in refused(capsys, run, "--out", tmp_path / "photos" / "one.png")
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("  height:", "  hoehe:"))
    line = refused(capsys, run)
    assert "is of another version" in line and "model.hoehe is no field" in line
    (run / "config.yaml").write_text(text)
    manifest = run / "checkpoints" / "iteration-000003" / checkpoint.MANIFEST
    manifest.write_text(manifest.read_text().replace('"version": 1', '"version": 0'))
    assert "has version 0, this program reads 1" in refused(capsys, run)
    shutil.rmtree(run / "checkpoints")
    assert "has no checkpoint yet, and no lora/" in refused(capsys, run)
    write_run(tmp_path / "full", config_of(tiny_pipeline_folder, FULL))
    assert "take --format merged" in refused(capsys, tmp_path / "full", "--format", "comfyui")


def test_a_base_that_cannot_be_had(
    tiny_pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(tiny_pipeline_folder)
    write_run(tmp_path / "run", config)
    text = (tmp_path / "run" / "config.yaml").read_text().replace(str(tiny_pipeline_folder), "nobody/no-such-editor")
    moved = tmp_path / "moved"
    moved.mkdir()
    (moved / "config.yaml").write_text(text)
    gone = replace(config, model=replace(config.model, path="nobody/no-such-editor"))
    checkpoint.save(moved, iteration=1, config=gone, state={"ema": {}}, keep=1)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "no hub name that can be reached" in refused(capsys, moved)
    with pytest.raises(ValueError, match="the base 'nobody/no-such-editor' cannot be had"):
        export.base_folder(gone)


def test_docs(tiny_pipeline_folder: Path, tmp_path: Path, hub: type[FakeHub], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command of docs/export.md runs as it stands there."""
    text = (ROOT / "docs" / "export.md").read_text()
    lines = re.findall(r"^python -m mteditflow\.export (.+)$", text, flags=re.MULTILINE)
    assert len(lines) >= 6
    monkeypatch.chdir(tmp_path)
    save(kohya(draw_originals("kontext")), tmp_path / "somebody.safetensors")
    write_run(Path("runs/mini"), config_of(tiny_pipeline_folder))
    for line in lines:
        command.export(line.replace("black-forest-labs/FLUX.1-Kontext-dev", str(tiny_pipeline_folder)).split())
    assert (tmp_path / "theirs" / "somebody.safetensors").is_file()
    assert hub.calls and os.listdir("runs/mini/export")
