"""README's snippets run as they stand."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_lines import assert_parses
from conftest import TINY_MAX_TEXT_TOKENS
from photos import PHOTOS, photo
from PIL import Image

from mteditflow.config import Config
from mteditflow.config.cli import from_yaml
from mteditflow.config.command import COMMANDS
from mteditflow.export.card import read_usage
from mteditflow.export.weights import write_lora
from mteditflow.plan.memory import memory_plan, read_sizes
from mteditflow.policy import build_policy

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
(SNIPPET,) = re.findall(r"```python\n(.*?)```", README, flags=re.S)
LINES = [line.split("#")[0] for line in re.findall(r"^\.venv/bin/mteditflow (.*)$", README, flags=re.M)]
(PHOTOGRAPHS,) = re.findall(r"^## Your photographs\n(.*?)^## ", README, flags=re.M | re.S)
SMALL: dict[str, dict[str, Any]] = {
    "model": {"height": 64, "width": 64, "base": "float32", "text_encoder": "resident"},
    "lora": {"rank": 2, "alpha": 4},
    "rollout": {"num_tasks": 1, "group_size": 2, "num_steps": 3, "window_range": []},
    "reward": {"vlm": "small", "readout": "direct", "consistency": "none"},
    "advantage": {"consistency_weight": 0},
    "evaluation": {"num_sessions": 2, "num_sessions_short": 2, "num_strips": 1, "num_steps": 2, "every": 0},
    "run": {"num_iterations": 1, "gpu_gib": 0},
}
"""What the README's config has otherwise where there is no GPU: the models, and how much is done with them."""


def test_the_lora_is_used_as_the_readme_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the LoRA that a run of the default begins with, and a photograph that is not square."""
    config = Config()
    policy = build_policy(config.model, config.lora, 0, has_old=False)
    folder = tmp_path / "runs" / "mini" / "lora"
    write_lora(type(policy.pipeline), policy.adapters.state("ema"), config.lora, folder)
    Image.new("RGB", (90, 60), "red").save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    exec(compile(SNIPPET, "README.md", "exec"), scope)
    assert scope["edit"].size == (config.model.width, config.model.height)
    given = {"max_sequence_length": config.model.max_text_tokens, "guidance_scale": config.model.guidance_scale}
    for name, value in (given | {"num_inference_steps": config.evaluation.num_steps}).items():
        assert f"{name}={value}," in SNIPPET


@pytest.mark.parametrize("line", LINES)
def test_a_command_of_the_readme_is_one(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert_parses(line, monkeypatch)


def test_the_memory_is_what_a_dry_run_plans() -> None:
    """The parts and the sum of every row; what is added up in a column is named by its head."""
    (section,) = re.findall(r"^## Memory per GPU\n(.*?)^## ", README, flags=re.M | re.S)
    heads, *rows = re.findall(r"^\| (config \| card|`[a-z0-9_]+\.yaml`)(.*) \|$", section, flags=re.M)
    assert heads[1].split(" | ")[1:] == [
        "base, encoders", "adapter, optimizer", "latents, activations", "judge", "encoders, to encode", "margin", "sum"
    ]  # fmt: skip
    assert len(rows) == 13
    for name, cells in rows:
        config = from_yaml(ROOT / "configs" / name.strip("`"))
        plan = memory_plan(config, read_sizes(config))
        starts = ("base", ("adapter", "gradient"), ("latents", "activations"), "judge", "encoders", "margin", "")
        parts = [sum(gib for part, gib in plan.items() if part.startswith(start)) for start in starts]
        assert sum(parts[:-1]) == pytest.approx(parts[-1]), name  # nothing is left out
        shown = [cell.strip() for cell in cells.split("|")[-len(starts) :]]
        assert [cell.replace("server", "") for cell in shown] == [f"{gib:.1f}" if gib else "" for gib in parts], name


def follow(line: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What a command of the README prints; it must succeed."""
    name, *words = shlex.split(line.split("#")[0])
    assert COMMANDS[name](words) == 0, line
    return "".join(capsys.readouterr())


def test_the_way_from_photographs_to_a_lora(
    tmp_path: Path, tiny_pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """README's commands as they stand, on JPEGs with a text beside each, with a tiny editor and the small judge in the
    config that they name; then the code beside the LoRA, in stock diffusers.
    """
    monkeypatch.chdir(tmp_path)
    lines = re.findall(r"^\.venv/bin/mteditflow (.*)$", PHOTOGRAPHS, flags=re.M)
    path, (folder,) = re.findall(r"configs/\S+", lines[-1])[0], re.findall(r"data check (\S+)", lines[0])
    settings = yaml.safe_load((ROOT / path).read_text())
    small = {"path": str(tiny_pipeline_folder), "max_text_tokens": TINY_MAX_TEXT_TOKENS}
    for section, values in {**SMALL, "model": SMALL["model"] | small}.items():
        settings[section] |= values
    Path("configs").mkdir()
    Path(path).write_text(yaml.safe_dump(settings))
    Path(folder).mkdir(parents=True)
    for number in range(20):
        with Image.open(photo(PHOTOS[number % len(PHOTOS)])) as picture:
            picture.convert("RGB").resize((96 + number, 72)).save(f"{folder}/IMG_{number:04}.JPG")
        Path(f"{folder}/IMG_{number:04}.txt").write_text("make the square red\nremove the circle\nadd a blue circle\n")
    checked, planned, trained = (follow(line, capsys) for line in lines)
    assert "20 of 20 sessions usable, 0 damaged" in checked
    assert "GiB" in planned and "not estimated" in planned  # hours and kWh: of so small an editor there are none
    (lora,) = re.findall(r"The LoRA is in `(.*?)`", PHOTOGRAPHS)
    assert f"load_lora_weights('{lora}')" in trained
    Image.open(f"{folder}/IMG_0000.JPG").save("photo.png")
    names: dict[str, Any] = {}
    exec(read_usage(Path(lora), str(tiny_pipeline_folder)), names)
    assert len(names["pipe"].transformer.peft_config) == 1 and names["edit"].size == (64, 64)
