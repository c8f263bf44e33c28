"""docs/start.md and the Dockerfile: their commands are commands, and what is copied into the image is enough."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch
from command_lines import assert_parses
from train_runs import Arguments

from mteditflow.config import command
from mteditflow.config.cli import from_yaml

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "start.md").read_text()
BLOCKS = [block.strip().splitlines() for block in re.findall(r"^```\n(.*?)^```", PAGE, flags=re.M | re.S)]
LINES = [line for block in BLOCKS for line in block]
DOCKERFILE = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text())
STEPS = [line.split(" ", 1) for line in DOCKERFILE.splitlines() if line and not line.startswith("#")]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def ours() -> list[str]:
    """The page's command lines of the program itself, without what stands before it."""
    found = [re.search(r"\bmteditflow ((?:train|report|evaluate|export)\b.*)$", line) for line in LINES]
    found += [re.search(r"-m mteditflow\.(train .*)$", line) for line in LINES]
    return [match[1] for match in found if match]


@pytest.mark.parametrize("line", ours())
def test_a_command_of_the_page_is_one(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert_parses(line, monkeypatch)


def test_the_page_names_what_is_there() -> None:
    """Every extra, and every config, wherever the page or the Dockerfile installs or starts one."""
    assert len(ours()) >= 8
    for text in (PAGE, DOCKERFILE):
        for extras in re.findall(r"\[([a-z,]+)\]\"", text):
            assert {*extras.split(",")} <= EXTRAS.keys()
        for path in re.findall(r"configs/\w+\.yaml", text):
            from_yaml(ROOT / path)
    volumes = {volume.split(":")[1].strip('"') for line in LINES for volume in re.findall(r"--volume (\S+)", line)}
    assert volumes == {"/work/runs", "/work/data", "/root/.cache"}
    (place,) = (value for name, value in STEPS if name == "WORKDIR")
    assert place == "/work" and ["COPY", "configs /work/configs"] in STEPS


def test_what_the_image_copies_is_the_package(tmp_path: Path) -> None:
    """The wheel that `pip install` makes of it, used where nothing else of the repository is: it starts, and has the
    miniature, the small judge and the templates.
    """
    pytest.importorskip("setuptools")
    source, place = tmp_path / "source", tmp_path / "place"
    for name, value in STEPS:
        if name == "COPY" and "/source" in value:
            *files, target = value.split()
            for file in files:
                to = tmp_path / target.strip("/")
                if (ROOT / file).is_dir():
                    shutil.copytree(ROOT / file, to, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
                else:
                    to.mkdir(parents=True, exist_ok=True)
                    shutil.copy(ROOT / file, to)
    build = "from setuptools.build_meta import build_wheel; print(build_wheel('.'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True, check=True)
    with zipfile.ZipFile(source / done.stdout.split()[-1]) as wheel:
        wheel.extractall(place)
    mine, theirs = ({str(path.relative_to(folder)) for path in (folder / "mteditflow").rglob("*")
                     if path.is_file() and "__pycache__" not in path.parts} for folder in (ROOT, place))  # fmt: skip
    assert theirs == mine
    words = {name: value for name, value in STEPS if name in ("ENTRYPOINT", "CMD")}
    assert json.loads(words["ENTRYPOINT"]) == ["mteditflow"] and json.loads(words["CMD"]) == ["train"]
    code = "import sys; from mteditflow.config.command import main; sys.argv[0] = 'mteditflow'; sys.exit(main())"
    environment = os.environ | {"PYTHONPATH": str(place)}
    shown = subprocess.run(
        [sys.executable, "-c", code, "train", "--dry_run"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert shown.returncode == 0 and "trajectories" in shown.stdout, shown.stderr


def test_words_of_the_shell_are_whole() -> None:
    for line in LINES:
        assert shlex.split(line), line


def test_windows_itself_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(SystemExit) as caught:
        command.main(["train"])
    assert caught.value.code == 2 and "use WSL 2 (docs/start.md)" in capsys.readouterr().err


def test_a_mac_says_that_it_is_the_cpu(
    arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert command.train(arguments(tmp_path / "run", run__num_iterations=1, evaluation__every=0)) == 0
    said = "".join(capsys.readouterr()).replace("\n", " ")  # on stdout or stderr
    assert "training runs on the CPU: Apple's GPU (MPS) is not used" in said
