"""Files that appear whole or not at all: written beside their place, then renamed."""

import errno
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ASIDE = "set_aside"  # in a run's folder: what was not wanted any more


def replace_file(path: Path, content: bytes, *, is_durable: bool = False) -> None:
    """Write a file, or put another in its place, whole or not at all. is_durable: on the disk before it is renamed."""
    temporary = path.with_name(f".{path.name}.new")
    with temporary.open("wb") as file:
        file.write(content)
        if is_durable:
            file.flush()
            os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, value: dict[str, Any], *, is_durable: bool = False) -> None:
    """Write a JSON object, whole or not at all."""
    replace_file(path, json.dumps(value, indent=1).encode(), is_durable=is_durable)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no file. ValueError, one line: the file holds something else."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError alike
        raise ValueError(f"{path} is not JSON ({error}): delete it, or evaluate again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not a JSON object: delete it, or evaluate again")
    return value


@contextmanager
def shaped(path: Path, remedy: str = "delete it, or make it again") -> Iterator[None]:
    """Have what a file of another shape does to its reader be a ValueError of one line that names the file."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ArithmeticError, ValueError) as error:
        what = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} has another shape than such a file ({what}): {remedy}") from error


def set_aside(folder: Path, name: str, *, copied: Iterable[Path], moved: Iterable[Path]) -> Path:
    """Copy and move what there is of the paths in a folder to `folder/set_aside/NAME`, and return that.

    It has its name when all is there: after a kill the same call goes on with it.
    """
    aside = folder / ASIDE / name
    temporary = aside.with_name(f".{name}")
    temporary.mkdir(parents=True, exist_ok=True)
    for path in copied:
        if path.is_dir():
            shutil.copytree(path, temporary / path.name, dirs_exist_ok=True)
        elif path.exists() and not (temporary / path.name).exists():
            replace_file(temporary / path.name, path.read_bytes())
    for path in moved:
        if path.exists():
            target = temporary / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)
    temporary.rename(aside)
    return aside


def retire(folder: Path, name: str, paths: Iterable[Path]) -> Path | None:
    """Move what there is of the paths in a folder to `folder/set_aside/NAME`, or to NAME-2, NAME-3, ... where that is
    taken, and return where; None: there is nothing. After a kill what was left goes to the next.
    """
    made = [path for path in paths if path.exists()]
    if not made:
        return None
    names = (name if number == 1 else f"{name}-{number}" for number in itertools.count(1))
    aside = next(place for place in (folder / ASIDE / name for name in names) if not place.exists())
    for path in made:
        target = aside / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
    return aside


def check_folder(folder: Path, name: str) -> None:
    """Raise ValueError where a folder is none, or can neither be made nor written to; nothing is made."""
    there = folder
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        is_right, what = there.is_dir(), "no folder" if there == folder else f"{there} is no folder"
    except OSError as error:
        is_right, what = False, error.strerror
    if is_right and not os.access(there, os.W_OK | os.X_OK):
        is_right, what = False, f"{there} may not be written to"
    if not is_right:
        raise ValueError(f"{name} is {str(folder)!r}: {what}; choose another")


def is_disk_full(error: BaseException) -> bool:
    """Whether an error says that the disk, or the user's share of it, is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
