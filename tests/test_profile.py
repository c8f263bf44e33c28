"""The FLOP model against published figures and torch's own count; a profile of the embedded editor, whole."""

import gzip
import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mteditflow.config import Config, ModelConfig
from mteditflow.config.command import profile as main
from mteditflow.plan.flops import forward_flops
from mteditflow.policy import FAMILIES, Family
from mteditflow.policy.flux_kontext import FAMILY
from mteditflow.policy.published import FLUX_KONTEXT
from mteditflow.profile.random_kontext import num_pipeline_bytes
from mteditflow.record.clock import STEP

TINY = ["--rollout.num_tasks=1", "--rollout.group_size=2", "--data.num_turns=2", "--rollout.num_steps=2"]
TINY += ["--rollout.window_size=1"]


@pytest.mark.parametrize(
    ("image_tokens", "tflop"),
    [(4096, 74.4), (2 * 1024, 37.6), (2 * 4096, 165.4)],  # 1024 px without a condition; Kontext at 512 and 1024 px
)
def test_published_figures(image_tokens: int, tflop: float) -> None:
    assert (
        round(forward_flops(FAMILY, FLUX_KONTEXT, text_tokens=512, image_tokens=image_tokens).blocks / 1e12, 1) == tflop
    )


TEXT, IMAGE = 5, 18  # tokens
SMALL = {"num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 4, "joint_attention_dim": 24}
SINGLE = {"num_single_layers": 3}
POOLED = {"pooled_projection_dim": 20}


@pytest.mark.parametrize("has_guidance", [True, False])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.transformer)
def test_all_that_torch_counts(family: Family, has_guidance: bool) -> None:
    """Every matrix product of a forward pass, exactly."""
    guidance = torch.empty(1, device="meta") if has_guidance else None
    ids = {"txt_ids": torch.empty(TEXT, 3, device="meta"), "img_ids": torch.empty(IMAGE, 3, device="meta")}
    config: dict[str, Any] = {**SMALL, "axes_dims_rope": (4, 6, 6), "in_channels": 64}
    match family.transformer:
        case "FluxTransformer2DModel":
            config |= {**SINGLE, **POOLED, "patch_size": 1, "guidance_embeds": has_guidance}
            own: dict[str, Any] = {**ids, "guidance": guidance, "pooled_projections": torch.empty(1, 20, device="meta")}
        case "Flux2Transformer2DModel":
            config |= {**SINGLE, "patch_size": 1, "guidance_embeds": has_guidance, "axes_dims_rope": (4, 4, 4, 4)}
            own = {name: torch.empty(len(value), 4, device="meta") for name, value in ids.items()} | {
                "guidance": guidance
            }
        case _:
            config |= {"patch_size": 2, "out_channels": 16}
            own = {"img_shapes": [[(1, 3, 3), (1, 3, 3)]]}
    with torch.device("meta"):
        transformer = getattr(diffusers, family.transformer)(**config).requires_grad_(False)
        inputs = {
            "hidden_states": torch.empty(1, IMAGE, 64),
            "timestep": torch.empty(1),
            "encoder_hidden_states": torch.empty(1, TEXT, 24),
        }
        with FlopCounterMode(display=False) as counter:
            transformer(**inputs, **own)
    expected = forward_flops(family, transformer.config, text_tokens=TEXT, image_tokens=IMAGE)
    assert counter.get_total_flops() == expected.total


def test_weights_of_the_true_shape() -> None:
    """11.90 B of the transformer, 4.76 B of T5, 0.12 B of CLIP, 0.08 B of the autoencoder, as published."""
    assert round(num_pipeline_bytes(ModelConfig(base="bfloat16")) / 2e9, 2) == 16.87


def test_a_shape_that_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    memory = type("Memory", (), {"available": 10 * 2**30})
    monkeypatch.setattr("mteditflow.plan.dry_run.psutil.virtual_memory", lambda: memory)
    arguments = ["--model.path=random", "--model.base=bfloat16", f"--run.folder={tmp_path}"]
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert "weights take 31.4 GiB as bfloat16, but only 10.0 GiB are free" in line


@pytest.mark.parametrize("name", ["nft", "grpo"])
def test_a_profile(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([*TINY, f"--objective.name={name}", f"--run.folder={tmp_path}"])
    figures = json.loads((tmp_path / "profile.json").read_text())
    assert list(figures["seconds"]) == list(STEP)
    assert 0 < sum(figures["seconds"].values()) <= figures["total_s"]
    assert figures["turn_images"] == 4 and figures["turn_images_per_second"] > 0
    row = forward_flops(
        FAMILY, json.loads((MINIATURES["embedded"] / "transformer" / "config.json").read_text()),
        text_tokens=Config().model.max_text_tokens, image_tokens=32,
    )  # fmt: skip
    # 2 turns x 2 trajectories: x 2 steps rolled out; 1 step trained
    assert figures["tflop"]["denoise"] == pytest.approx(8 * row.total / 1e12)
    assert figures["tflop"]["forward, backward"] == pytest.approx(4 * (row.total + row.backward) / 1e12)
    for phase, rate in figures["tflop_per_second"].items():
        assert rate == pytest.approx(figures["tflop"][phase] / figures["seconds"][phase])
    assert figures["launches"] is None and figures["host_reads"]["denoise"] == 0
    assert figures["host_reads"]["all"] >= figures["host_reads"]["optimizer"] > 0
    trace = json.loads(gzip.decompress((tmp_path / "trace.json.gz").read_bytes()))
    names = {event.get("name") for event in trace["traceEvents"]}
    assert set(STEP) <= names and "aten::addmm" in names
    printed = capsys.readouterr().out
    assert "no GPU" in printed and "turn-images per second" in printed
