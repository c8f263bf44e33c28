"""What stops a run, or is said of it: no spread, too few scores, an adapter without effect, a full disk, bad input."""

import errno
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rollouts import GivenRewards
from torch import Tensor
from train_runs import Arguments, lora, metrics, refused

from mteditflow.config import Config
from mteditflow.config.command import train as main
from mteditflow.reward import build_reward
from mteditflow.types import Rollout, Scores


def test_all_groups_without_spread_say_so(
    arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def constant(rollout: Rollout) -> Scores:
        half, valid = torch.full((len(rollout.group), 2), 0.5), torch.ones(len(rollout.group), dtype=torch.bool)
        return Scores(rewards={"instruction": half}, weights={"instruction": 1}, valid=valid)

    monkeypatch.setattr("mteditflow.run.build_reward", lambda *_: GivenRewards(constant))
    main(arguments(tmp_path, run__num_iterations=2, evaluation__every=0))
    said = capsys.readouterr().err
    for n in (1, 2):
        assert f"iteration {n}: all groups without spread, nothing to learn from them\n" in said
    for line in metrics(tmp_path):
        assert line["reward/zero_spread_share"] == 1 and line["update/grad_norm"] == 0
        assert line["update/ratio_mean"] is None  # no chunk was run, and a line has the same keys all the same
    assert all(weight.abs().max() == 0 for key, weight in lora(tmp_path).items() if "lora_B" in key)


def test_too_many_failures_of_the_reward_stop_the_run(
    arguments: Arguments,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls: list[int] = []

    def failing(rollout: Rollout) -> Scores:
        calls.append(len(calls))
        scores, bad = build_reward(Config())(rollout), 1 if len(calls) <= 2 else 3  # an iteration has two waves
        valid = rollout.member >= bad
        instruction = scores.instruction.masked_fill(~valid[:, None], math.nan)
        return replace(scores, rewards=scores.rewards | {"instruction": instruction}, valid=valid)

    with monkeypatch.context() as patch:
        patch.setattr("mteditflow.run.build_reward", lambda *_: GivenRewards(failing))
        line = refused(capsys, arguments(tmp_path))
    assert "75% of the trajectories could not be scored" in line
    assert [line["reward/valid_share"] for line in metrics(tmp_path)] == [0.75]
    assert (tmp_path / "checkpoints" / "iteration-000001").is_dir()
    main(arguments(tmp_path))  # the reward is back
    assert [line["reward/valid_share"] for line in metrics(tmp_path)] == [0.75, 1, 1, 1]


def test_an_adapter_that_does_nothing_stops_the_run(
    arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its gradient is zero, so its norm cannot be what decides whether to look."""
    from mteditflow.policy import Policy

    original = Policy.velocity

    def deaf(self: Any, *args: Any) -> Tensor:
        with self.adapters.use("off"):
            velocity = original(self, *args)
        return velocity + 0 * sum(weight.sum() for _, weight in self.adapters.trainable)

    monkeypatch.setattr(Policy, "velocity", deaf)
    line = refused(capsys, arguments(tmp_path, objective__kl_beta=0))
    assert "the adapter does not change the velocity after an update: check lora.targets" in line


def test_a_full_disk_is_one_line(
    arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    short = arguments(tmp_path, run__num_iterations=1, evaluation__every=0)
    for place in ("mteditflow.evaluate.held_out.replace_file", "mteditflow.record.checkpoint.replace_file"):
        with monkeypatch.context() as patch:
            patch.setattr(place, full)
            assert "no room on the disk" in refused(capsys, short)
    main(short)
    assert len(metrics(tmp_path)) == 1


def test_bad_input_is_one_line(arguments: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty, other = tmp_path / "empty", tmp_path / "other"
    empty.mkdir()
    other.mkdir()
    (other / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    cases = [
        ({"model__path": empty}, "is not a diffusers pipeline"),
        ({"model__path": other}, "is a StableDiffusionPipeline, which cannot be trained here"),
        ({"model__height": 128}, "model.height is 128: must be 64"),
        ({"data__num_turns": 11}, "data.num_turns is 11"),
        ({"rollout__group_size": 1}, "rollout.group_size is 1"),
        ({"rollout__rule": "cps", "rollout__noise_level": 1.5, "evaluation__every": 0}, "noise_level is 1.5"),
        ({"objective__name": "nft", "objective__nft_num_times": 4}, "objective.nft_num_times is 4"),
    ]
    for overrides, expected in cases:
        assert expected in refused(capsys, arguments(tmp_path / "run", **overrides))
