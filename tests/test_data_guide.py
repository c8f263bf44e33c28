"""docs/data.md, followed literally: its files are written, its commands run, in a folder with real photographs."""

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from photos import PHOTOS, copy_photos

from mteditflow.config.cli import from_yaml, settings
from mteditflow.data import check_data, held_out_tasks
from mteditflow.data.formats import read_sessions
from mteditflow.data.sessions import FIELDS
from mteditflow.world.edits import EDIT_TYPES

ROOT = Path(__file__).parent.parent
GUIDE = (ROOT / "docs" / "data.md").read_text()
FILES = re.findall(r"^`(\S+)`\n\n```(?:json|yaml)\n(.*?)^```$", GUIDE, re.M | re.S)
FENCES = re.findall(r"^```(\w*)\n(.*?)^```$", GUIDE, re.M | re.S)
COMMANDS = [line for kind, block in FENCES if kind == "" for line in block.splitlines()]


def run(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What a command prints; it must succeed. A module runs as `python -m` runs it, in this process: torch is here."""
    program, *words = shlex.split(command)
    if program != "python":
        return subprocess.run(command, shell=True, check=True, capture_output=True, text=True).stdout
    assert words[0] == "-m"
    monkeypatch.setattr(sys, "argv", [words[1], *words[2:]])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(words[1], run_name="__main__")
    out, err = capsys.readouterr()
    assert (stop.value.code, err) == (0, ""), command
    return out


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_the_guide_is_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"{('six', 'seven', 'eight')[len(PHOTOS) - 6]} photographs" in GUIDE
    copy_photos(tmp_path / "photos")
    assert [name for name, _ in FILES] == ["sessions.jsonl", "objects.json", "words.yaml"]
    for name, content in FILES:
        (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    assert len(COMMANDS) == 9
    said = {command: run(command, monkeypatch, capsys) for command in COMMANDS}
    first, settings_of_run, folder, made, generated, chosen = (said[it] for it in COMMANDS if it.startswith("python"))
    assert "fit for data.num_turns 3: 4 of 4 sessions usable, 0 damaged" in first and "cut to 3" in first
    assert "fit for data.num_turns 2: 1 of 1 sessions usable" in folder
    assert "8 sessions of 3 turns in generated.jsonl" in made
    assert "fit for data.num_turns 3: 8 of 8 sessions usable" in generated
    assert "2 sessions of 2 turns in mine.jsonl (color_alter 50.0 %, background_change 50.0 %)" in chosen
    assert re.search("ochre|teal|crimson", (tmp_path / "mine.jsonl").read_text())
    (tmp_path / "run.yaml").write_text(settings_of_run)
    config = from_yaml("run.yaml")
    check_data(config, is_speaking=False)
    assert config.data.path == "sessions.jsonl" and len(held_out_tasks(config)) == 2
    cup, saucer = read_sessions(str(tmp_path / "sessions.jsonl")).found[1].untouched[0]
    assert (cup.box, saucer.name) == ((0.25, 0.15, 0.72, 0.83), "saucer")


@pytest.mark.parametrize("name", [*(field for field in FIELDS), *EDIT_TYPES])
def test_the_guide_names_every_field_and_type(name: str) -> None:
    assert f"`{name}`" in GUIDE


def test_the_guide_names_settings_that_there_are() -> None:
    named = set(re.findall(r"\b(?:data|model|evaluation|reward)\.[a-z_]+", GUIDE)) - {"data.md"}
    assert len(named) > 8 and named <= {*settings(), "evaluation.num_turns"}
