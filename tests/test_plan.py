"""A plan for a GPU that is named, against the derived figures of its work, and in one line where it cannot be made."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from mteditflow.config import Config, RewardConfig
from mteditflow.config.cli import from_yaml
from mteditflow.config.command import train as main
from mteditflow.plan.dry_run import dry_run
from mteditflow.plan.duration import RowSeconds, num_instructions
from mteditflow.plan.estimate import estimate
from mteditflow.plan.gpus import GPUS, Target, find_gpu, gpu_of, read_target
from mteditflow.plan.memory import memory_plan, read_sizes
from mteditflow.policy.published import MODELS

ROOT = Path(__file__).parent.parent
KONTEXT = from_yaml(ROOT / "configs" / "profile_kontext.yaml")  # one group of 16, K 3, S 12, 2 trained, 512 px, bf16


def seconds(config: Config, name: str = "h200", target: Target | None = None) -> tuple[RowSeconds, RowSeconds]:
    """At the slowest and at the fastest."""
    sizes = read_sizes(config)
    found = estimate(config, sizes, memory_plan(config, sizes)["judge"], target or Target(gpu=GPUS[name]))
    assert found is not None
    return found


def with_model(**fields: Any) -> Config:
    return replace(KONTEXT, model=replace(KONTEXT.model, **fields))


def test_the_practical_roofline_of_an_h200() -> None:
    """Derived for an H200, at what a matrix product reaches there: 576 forward passes in 32 s; training on 2 of 12
    steps in 13 s, which counts attention's second forward pass and more, hence 15 %; 48 pictures in 0.7 s.
    """
    _, fastest = seconds(KONTEXT)
    assert 576 * fastest.forward == pytest.approx(32, rel=0.02)
    assert 96 * fastest.forward_backward == pytest.approx(13, rel=0.15)
    assert 48 * (fastest.encode + fastest.decode) == pytest.approx(0.7, rel=0.02)


def test_the_reported_times_of_an_h100() -> None:
    """FLUX.1-dev at 1024 px without a condition, 28 steps in 6.7 s eager: 74.4 TFLOP a pass."""
    slowest, fastest = seconds(with_model(compile="off"), "h100")
    assert 28 * slowest.forward * 74.4 / 37.6 == pytest.approx(6.7, rel=0.02)
    assert fastest.forward < slowest.forward


def test_settings_that_change_the_work() -> None:
    """Checkpointing runs the forward pass again; float8 is faster forwards alone; guidance is two passes."""
    slowest, fastest = seconds(KONTEXT)
    again, _ = seconds(with_model(is_checkpointed=True))
    assert again.forward_backward == pytest.approx(slowest.forward_backward + slowest.forward)
    eighth, _ = seconds(with_model(base="float8"))
    assert 1.1 < slowest.forward / eighth.forward < 1.2  # 1.2 of the linears, seven eighths of the work
    backward, of_eighth = (rows.forward_backward - rows.forward for rows in (slowest, eighth))
    assert backward == pytest.approx(of_eighth)
    for name in ("forward", "forward_backward", "encode", "decode", "text"):
        assert getattr(slowest, name) > getattr(fastest, name) > 0
    away, _ = seconds(with_model(text_encoder="offload"))
    assert away.text - slowest.text == pytest.approx(2 * 4.885e9 * 2 / 12e9)  # there and back, at 12 GB/s
    klein = from_yaml(ROOT / "configs" / "klein_base_4b_nft_1gpu.yaml")
    unguided, _ = seconds(klein)
    assert unguided.guided == 2 * unguided.forward
    guided, _ = seconds(replace(klein, rollout=replace(klein.rollout, is_guided=True)))
    assert guided.guided == guided.forward == unguided.guided


def test_the_judge() -> None:
    """8.77 billion weights on 500 + 4 x 256 tokens, and 128 to 500 tokens of thought for 16 trajectories at once."""
    judged = replace(KONTEXT, reward=RewardConfig(judge="vlm"))
    slowest, fastest = seconds(judged)
    assert slowest.judge is not None and fastest.judge is not None
    question = 2 * 8.77e9 * 1524 / (0.46 * 989e12)
    assert fastest.judge == pytest.approx(question + (128 + 36) * 0.008 / 16, rel=1e-3)
    assert slowest.judge > fastest.judge
    assert seconds(replace(judged, reward=RewardConfig(judge="vlm", url="http://judge/v1")))[0].judge is None
    assert seconds(KONTEXT)[0].judge is None  # the exact verifier's scores are the host's


def test_instructions_are_encoded_once_per_task_or_per_image() -> None:
    config = replace(KONTEXT, rollout=replace(KONTEXT.rollout, num_tasks=2))
    assert num_instructions(config, is_text_of_image=False) == 2 * 3
    assert num_instructions(config, is_text_of_image=True) == 2 + 2 * 2 * 16


def test_autoencoders_are_the_published_ones() -> None:
    for known in MODELS.values():
        with torch.device("meta"):
            vae = getattr(diffusers, known.autoencoder_class).from_config(known.autoencoder_config)
        assert sum(weight.numel() for weight in vae.parameters()) / 1e9 == pytest.approx(known.autoencoder, rel=0.01)


def test_the_table_of_gpus() -> None:
    """Every name is found by what torch calls such a GPU, and FP8 is twice bf16 where there is any."""
    devices = {
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA L40S": "l40s",
        "NVIDIA L4": "l4",
        "NVIDIA A100-SXM4-40GB": "a100_40",
    }
    assert {device: gpu.name for device in devices if (gpu := gpu_of(device))} == devices
    assert gpu_of("NVIDIA GeForce GTX 1080") is None
    for name, gpu in GPUS.items():
        assert gpu_of(f"NVIDIA {gpu.device}") == gpu == find_gpu(f"NVIDIA {name.upper().replace('_', ' ')}")
        assert gpu.fp8 == 0 or gpu.fp8 / gpu.bf16 == pytest.approx(2, rel=0.02)
        for low, high in (gpu.shares.eager, gpu.shares.compiled):
            assert 0 < low < high < 1


def test_cost_and_energy(capsys: pytest.CaptureFixture[str]) -> None:
    """GPU-hours of all GPUs, at the board's 700 W and at 2.5 an hour; the plan is held against the named GPU."""
    path = str(ROOT / "configs" / "kontext_nft_8gpu.yaml")
    assert main(["--config", path, "--dry_run", "--gpu", "H200", "--price", "2.5"]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]

    def span(title: str) -> list[float]:
        (line,) = [line for line in lines if line.startswith(title)]
        return [float(word) for word in line.removeprefix(title).split() if word not in ("to", "h")]

    hours, gpu_hours = span("run, without saving"), span("GPU-hours")
    assert gpu_hours == pytest.approx([8 * value for value in hours], rel=0.02)
    assert hours[0] < hours[1]
    assert span("energy at 700 W a GPU, without the host, kWh") == pytest.approx([0.7 * h for h in gpu_hours], rel=0.02)
    assert span("cost at 2.5 a GPU-hour") == pytest.approx([2.5 * h for h in gpu_hours], rel=0.02)
    assert span("--gpu h200") == [139.0]
    assert any(line.startswith("not measured on h200") for line in lines)
    problem = dry_run(from_yaml(path), read_target("rtx4090", None, None)).problem
    assert problem is not None and "of a GPU's 23.0" in problem


def test_an_editor_too_small_for_a_gpu() -> None:
    plan = dry_run(Config(), read_target("h100", None, None))
    assert plan.problem is None and "waits for the host, not for the GPU" in plan.table


def profile_of(folder: Path, **changes: Any) -> str:
    model = {"base": "bfloat16", "compile": "auto", "is_checkpointed": False}
    figures = {"device": "NVIDIA H100 80GB HBM3", "model": model}
    figures["tflop_per_second"] = {"denoise": 500.0, "forward, backward": 400.0}
    path = folder / "profile.json"
    path.write_text(json.dumps(figures | changes))
    return str(path)


def test_a_profile_of_that_gpu_is_taken(tmp_path: Path) -> None:
    """A tenth less and more than the measured rates; a forward pass is 37.6 TFLOP in blocks, 37.7 in all."""
    target = read_target("h100", None, Path(profile_of(tmp_path)))
    slowest, fastest = seconds(KONTEXT, target=target)
    assert slowest.forward == pytest.approx(37.64e12 / 450e12, rel=2e-3)
    assert fastest.forward == pytest.approx(37.64e12 / 550e12, rel=2e-3)
    backward = 33.05e12 + 2 * 4.59e12
    assert slowest.forward_backward == pytest.approx((37.64e12 + backward) / 360e12, rel=2e-3)
    table = dry_run(from_yaml(ROOT / "configs" / "kontext_grpo_1gpu.yaml"), target).table
    assert "  measured on h100" in table and "500 TFLOP/s in forward passes, 400 in" in " ".join(table.split("\n  "))


WRONG = {
    "--gpu h10": "--gpu is 'h10': known are h100, h200",
    "--gpu 4090": "--gpu is '4090': known are rtx4090, ",
    "--price 2": "--price is 2.0: is of an hour of a GPU: name it with --gpu",
    "--gpu h100 --price -1": "--price is -1.0: must be what an hour of one GPU costs, 0 or more",
    "--gpu h100 --price .nan": "--price is nan: must be what an hour of one GPU costs, 0 or more",
    "--calibration a.json": "--calibration is 'a.json': is of a GPU: name it with --gpu",
    "--gpu h100 --calibration nowhere.json": "--calibration nowhere.json cannot be read (No such file or directory)",
    "--gpu a100_80 --calibration PROFILE": "was measured on 'NVIDIA H100 80GB HBM3': give one of a100_80",
    "--gpu h100 --calibration PROFILE": "model.base is 'float32': {path} was measured with 'bfloat16': take a profile",
    "--gpu h100 --calibration BROKEN": "is no profile: give the profile.json that 'mteditflow profile' wrote on that",
    "--gpu a100_80 --model.base float8": "model.base is 'float8': a100_80 has no FP8: take bfloat16, or int8 or nf4",
}


@pytest.mark.parametrize(("words", "message"), WRONG.items())
def test_wrong_target_is_one_line(words: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = profile_of(tmp_path, **({"tflop_per_second": {}} if "BROKEN" in words else {}))
    with pytest.raises(SystemExit, match="2"):
        main(["--dry_run", *words.replace("PROFILE", path).replace("BROKEN", path).split()])
    (line,) = capsys.readouterr().err.splitlines()
    assert message.format(path=path) in line


def test_a_gpu_without_a_plan_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--gpu", "h100"])
    assert "--gpu is 'h100': is of a plan: give --dry_run with it" in capsys.readouterr().err
