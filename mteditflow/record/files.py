"""Files that appear whole or not at all: written beside their place, then renamed."""

import errno
import json
import os
from pathlib import Path
from typing import Any


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
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError alike
        raise ValueError(f"{path} is not JSON ({error}): delete it, or evaluate again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not a JSON object: delete it, or evaluate again")
    return value


def is_disk_full(error: BaseException) -> bool:
    """Whether an error says that the disk, or the user's share of it, is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
