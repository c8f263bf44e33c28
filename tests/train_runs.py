"""Runs of a few seconds with a tiny editor: their command line, what they write, and the one line of a refusal."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from timed import is_timed
from torch import Tensor

from mteditflow.config.command import train as main
from mteditflow.record.metrics import read_lines

NUM_ITERATIONS = 4


Arguments = Callable[..., list[str]]
"""Folder and overrides -> the command line: the fixture `arguments`."""


def arguments(model: Path, folder: Path, **overrides: Any) -> list[str]:
    """The command line of GRPO in `folder`: 4 iterations of two waves of 2 trajectories, evaluated three times."""
    values = {
        "model.path": model,
        "lora.rank": 2,
        "lora.alpha": 4,
        "data.num_turns": 2,
        "rollout.num_tasks": 1,
        "rollout.group_size": 4,
        "rollout.num_steps": 3,
        "advantage.std": "group",
        "rollout.microbatch_size": 2,
        "rollout.wave_size": 2,  # two waves, beside which the first is scored
        "optimizer.microbatch_size": 2,
        "optimizer.num_updates": 2,
        "optimizer.learning_rate": 1e-3,
        "optimizer.schedule": "linear",
        "objective.name": "grpo",
        "objective.kl_beta": 0.01,
        "evaluation.num_sessions": 3,
        "evaluation.num_sessions_short": 2,
        "evaluation.num_strips": 1,
        "evaluation.num_steps": 2,
        "evaluation.every": 3,
        "run.num_iterations": NUM_ITERATIONS,
        "run.folder": folder,
    } | {name.replace("__", "."): value for name, value in overrides.items()}
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in line.items() if not is_timed(key)}
        for line in read_lines(folder / "metrics.jsonl")
    ]


def lora(folder: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(folder / "lora" / "pytorch_lora_weights.safetensors")


def refused(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    """The one line of a command that has to exit with code 2; libraries may have chattered before it."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(argv)
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("mteditflow: ")]
    assert caught.value.code == 2 and len(lines) == 1 and error.endswith(f"{lines[0]}\n") and "Traceback" not in error
    return lines[0]
