"""The command that makes the drifting editor, and the drift that it is given."""

import json
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux_kontext import FluxKontextPipeline
from torch import Tensor

from mteditflow.config import command
from mteditflow.config.model import MINIATURES
from mteditflow.world import autoencoder, pretrain
from mteditflow.world.autoencoder import kept, save_state
from mteditflow.world.drift import AXES, blurred, drifted
from mteditflow.world.pretrain import DRIFTING, KICKS, MOST_DRIFT, VISIBLE, Collection, make_pairs, next_drift
from mteditflow.world.scenes import BACKGROUNDS

ARGUMENTS = [
    "--vae_batches",
    "2",
    "--decoder_batches",
    "1",
    "--num_pairs",
    "16",
    "--num_flawed",
    "16",
    "--batch_size",
    "4",
]
ARGUMENTS += ["--save_every", "1", "--num_sessions", "4", "--edit_batches", "2", "--flawed_batches", "3"]


def along(axis: str, size: float, num: int) -> Tensor:
    """A drift along one axis, (num, 4)."""
    drift = torch.zeros(num, len(AXES))
    drift[:, AXES.index(axis)] = size
    return drift


def test_drift_in_closed_form() -> None:
    pictures = 0.5 * (2 * torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) - 1)
    luma = 0.299 * pictures[:, :1] + 0.587 * pictures[:, 1:2] + 0.114 * pictures[:, 2:]
    wanted = {
        "cast": pictures + torch.tensor([0.2, 0.05, -0.2])[:, None, None],
        "fade": 0.8 * pictures,
        "saturation": 0.8 * pictures + 0.2 * luma,
        "blur": 0.8 * pictures + 0.2 * blurred(pictures),
    }
    for axis, picture in wanted.items():
        torch.testing.assert_close(drifted(pictures, along(axis, 0.2, 2)), picture, rtol=0, atol=2**-22)
    torch.testing.assert_close(drifted(pictures, torch.zeros(2, 4)), pictures, rtol=0, atol=2**-22)
    assert drifted(pictures, along("cast", 5.0, 2)).abs().max() == 1


def test_a_blur_moves_no_weight() -> None:
    """The filter's weights add up to 1, so that an even picture stays and a dot spreads by its variance, 2 pixels."""
    assert torch.equal(blurred(torch.full((1, 3, 9, 9), 0.5)), torch.full((1, 3, 9, 9), 0.5))
    dot = torch.zeros(1, 3, 17, 17)
    dot[:, :, 8, 8] = 1
    at = torch.arange(17.0) - 8
    spread = (blurred(dot)[0, 0] * at.square()).sum()
    assert blurred(dot)[0, 0].sum() == 1 and spread == 2


def test_a_drift_grows_by_its_gain_and_one_step() -> None:
    collection, random = Collection(chain=4, last_weight=2.0, gain=1.5, step=0.4), Random(0)
    drift = [0.1, -0.2, 0.0, 0.0]
    axes = set[tuple[int, bool]]()
    for _ in range(100):
        grown = next_drift(drift, collection, random)
        added = [new - 1.5 * old for new, old in zip(grown, drift, strict=True)]
        (axis,) = [i for i, value in enumerate(added) if abs(value) > 1e-12] or [0]
        assert abs(added[axis]) <= 0.4 + 1e-12
        axes.add((axis, added[axis] > 0))
    assert axes == {(AXES.index(axis), sign > 0) for axis, sign in KICKS}
    assert next_drift([9.0, -9.0, 0.0, 0.0], collection, random)[:2] == [MOST_DRIFT, -MOST_DRIFT]


def test_pairs_are_cut_from_chains() -> None:
    vae = FluxKontextPipeline.from_pretrained(MINIATURES["drifting"]).vae
    clean, flawed = (make_pairs(vae, 200, replace(DRIFTING, step=step), "test") for step in (0.0, DRIFTING.step))
    for pairs in (clean, flawed):
        is_last = torch.arange(1, 200) % 4 == 0
        assert torch.equal(pairs.target[:-1][~is_last], pairs.source[1:][~is_last])
        assert len(pairs.instructions) == 200 and len(pairs.latents) == 200 + 200 // 4
    first = clean.source[::4]
    assert torch.equal(clean.latents[first], flawed.latents[first])  # the first picture of a chain has no drift
    moved = [(flawed.latents - clean.latents)[flawed.target[turn::4]].square().mean() for turn in (0, 3)]
    assert moved[1] > 4 * moved[0] > 0  # drifts grow


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_autoencoder_keeps_drift(background: str) -> None:
    """A pass keeps at least seven tenths of every drift that the editor has, most of them nearly whole."""
    vae = FluxKontextPipeline.from_pretrained(MINIATURES["drifting"]).vae
    for axis, sign in KICKS:
        size = 0.5 * sign * VISIBLE[AXES.index(axis)]
        assert 0.7 <= kept(vae, background, along(axis, float(size), 1)[0], num=16) <= 1.1, (axis, sign)


def test_an_autoencoder_of_clean_pictures_takes_a_cast_off() -> None:
    """That of the embedded editor has seen no other; docs/log.md has what one that has seen casts keeps."""
    vae = FluxKontextPipeline.from_pretrained(MINIATURES["embedded"]).vae
    assert kept(vae, "beach", along("cast", 0.2, 1)[0], num=8) < 0.6
    assert kept(vae, "city", along("cast", 0.2, 1)[0], num=8) > 0.6


class Killed(BaseException):
    """What no handler of the command takes."""


def test_killed_after_every_state_it_makes_the_same_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def kill(*arguments: Any) -> None:
        save_state(*arguments)
        raise Killed

    def make(folder: str) -> int:
        return command.pretrain(["--output", str(tmp_path / folder), *ARGUMENTS])

    monkeypatch.setattr(autoencoder, "SAVE_EVERY", 1)
    assert make("whole") == 0
    monkeypatch.setattr(autoencoder, "save_state", kill)
    monkeypatch.setattr(pretrain, "save_state", kill)
    for _ in range(2 + 1 + 2 * 2 + 3):  # states of the autoencoder, the decoder, two cycles, the drifting editor
        with pytest.raises(Killed):
            make("stopped")
    assert make("stopped") == 0  # nothing is left to save
    files = {path.relative_to(tmp_path / "whole"): path for path in (tmp_path / "whole").rglob("*/*.*")}
    assert len(files) > 8 and {name.parts[0] for name in files} == {"drifting"}
    for name, path in files.items():
        assert path.read_bytes() == (tmp_path / "stopped" / name).read_bytes(), name
    told = json.loads((tmp_path / "whole" / "drifting" / "pretraining.json").read_text())
    stages = [(line["stage"], line["batch"]) for line in told["curve"]]
    cycles = [("edits", 1), ("edits", 2), ("edits2", 1), ("edits2", 2)]
    assert stages == [*cycles, *(("drifting", batch) for batch in (1, 2, 3))] and told["arguments"]["seed"] == 0
