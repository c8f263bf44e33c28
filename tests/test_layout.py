"""The order of the house: imports point one way, words are the house's, files stay short, `kernels` is not ours."""

import ast
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from mteditflow_kernels import reference

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mteditflow"
LIST = """
    pictures config watch flow noise types distributed world data advantage record transformer policy objective rollout
    guards reward update export report evaluate plan profile run train judge study
"""
ORDER: list[str] = [*LIST.split()]
STARTER = ("mteditflow", "config", "command")  # its functions start the rooms, once a command line is known to be right
FILES = sorted([*(ROOT / "mteditflow").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])
TESTS = sorted((ROOT / "tests").glob("*.py"))
MEASURED = [*TESTS, *sorted((ROOT / "bench").glob("*.py"))]
IDS = [str(path.relative_to(ROOT)) for path in FILES]


def imported_modules(tree: ast.Module) -> Iterator[str]:
    """Full names of everything that a file imports, at its top or within a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "write imports out: no leading dots"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_imports_point_up_the_list(path: Path) -> None:
    names, tree = path.relative_to(ROOT).with_suffix("").parts, ast.parse(path.read_text())
    if names == STARTER:
        tree.body = [node for node in tree.body if not isinstance(node, ast.FunctionDef)]
    imports = [name.split(".") for name in imported_modules(tree)]
    if names[0] == "kernels":
        assert all(parts[0] != "mteditflow" for parts in imports)
        return
    own = names[1]
    if own == "__init__":
        assert all(parts[0] != "mteditflow" for parts in imports)
        return
    assert own in ORDER, f"{own} has no place in the list: give it one in ORDER"
    for parts in imports:
        if parts[0] == "mteditflow":
            assert ORDER.index(parts[1]) <= ORDER.index(own), f"{own} must not import {'.'.join(parts)}"


def test_kernels_is_no_package() -> None:
    """diffusers and transformers look for Hugging Face's `kernels`; from this root they must not find ours."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = (
        "import importlib.metadata, importlib.util\n"
        "spec = importlib.util.find_spec('kernels')\n"
        "print(spec is None or spec.origin)\n"
        "import diffusers.utils, transformers.utils\n"
        "print(transformers.utils.is_kernels_available(), diffusers.utils.is_kernels_available())\n"
    )
    try:
        from importlib.metadata import version

        version("kernels")
        pytest.skip("Hugging Face's kernels is installed")
    except ModuleNotFoundError:
        pass
    # As `python -c` and `python -m` from the repository root: the working folder comes first in sys.path.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, env=environment
    )
    assert done.stdout.split("\n")[:2] == ["None", "False False"]  # a namespace has no origin


def test_installed_kernels_is_found_before_the_folder(tmp_path: Path) -> None:
    """A folder without __init__.py gives way to a real package anywhere on the path."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("")
    code = "import importlib.util\nprint(importlib.util.find_spec('kernels').origin)\n"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, env=environment
    )
    assert Path(done.stdout.strip()) == tmp_path / "kernels" / "__init__.py"


def test_mteditflow_kernels_is_importable() -> None:
    spec = find_spec("mteditflow_kernels")
    assert spec is not None and spec.origin is not None


@pytest.mark.parametrize("path", [*FILES, *MEASURED], ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) < 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length < 60, f"{node.name} has {length} lines"


def num_lines(*paths: Path) -> int:
    return sum(len(path.read_text().splitlines()) for path in paths)


def test_the_paper_is_short() -> None:
    """A newcomer reads it in ten minutes: the flat files, and the objectives."""
    flat = [
        PACKAGE / f"{name}.py"
        for name in ["train", "types", "flow", "noise", "rollout", "advantage", "update", "guards"]
    ]
    assert num_lines(*flat, *(PACKAGE / "objective").glob("*.py")) <= 1300


@pytest.mark.parametrize("family", ["flux_kontext", "flux2", "qwen_image_edit"])
def test_a_family_is_short(family: str) -> None:
    assert num_lines(PACKAGE / "policy" / f"{family}.py") <= 250


def test_no_room_is_crowded() -> None:
    folders = [PACKAGE, *(path for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__")]
    for folder in folders:
        files = [path.name for path in folder.iterdir() if path.is_file()]
        assert len(files) <= 12, (folder.name, files)


def test_the_clipped_ratio_is_two_hops_from_train() -> None:
    """train.py names the objective's file, and that names the function whose text is the equation."""
    train, grpo = ((PACKAGE / name).read_text() for name in ("train.py", "objective/grpo.py"))
    assert "objective/grpo.py" in train and "mteditflow_kernels.reference.grpo_loss" in grpo
    equation = "torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip_range, 1 + clip_range))"
    assert equation in inspect.getsource(reference.grpo_loss)


def test_an_objective_is_named_in_its_file_alone() -> None:
    """But for the setting that chooses it, and the one place that reads the setting."""
    allowed = {PACKAGE / "objective" / name for name in ("__init__.py", "grpo.py", "nft.py")}
    allowed.add(PACKAGE / "config" / "settings.py")
    found = [path for path in FILES if re.search(r"""["'](nft|grpo)["']|is_nft|is_grpo""", path.read_text())]
    assert [str(path) for path in found if path not in allowed and PACKAGE in path.parents] == []


@pytest.mark.parametrize("path", [*FILES, *TESTS], ids=lambda path: path.name)
def test_words(path: Path) -> None:
    unwanted = ("noise_" + "pred", "model_" + "output", "TO" + "DO", "FIX" + "ME")
    found = [word for word in unwanted if re.search(rf"\b{word}\b", path.read_text())]
    assert found == []
