"""README's snippets run as they stand."""

import re
from pathlib import Path
from typing import Any

import pytest
from command_lines import assert_parses
from PIL import Image

from mteditflow.config import Config
from mteditflow.export.weights import write_lora
from mteditflow.policy import build_policy

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
(SNIPPET,) = re.findall(r"```python\n(.*?)```", README, flags=re.S)
LINES = [line.split("#")[0] for line in re.findall(r"^\.venv/bin/mteditflow (.*)$", README, flags=re.M)]


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
