"""Readers of users' data: JSONL, EdiVal's CSV, a folder, parquet, a data set of the hub. All give `Sessions`.

Texts are read and checked at once; pictures stay where they are until they are drawn. Parquet and the hub go through
the `datasets` library, which maps the table into memory.
"""

import ast
import csv
import difflib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mteditflow.data.images import SUFFIXES
from mteditflow.data.sessions import FIELDS, Fault, Sessions, from_record, image_name

METADATA = "metadata.jsonl"
EDIVAL_COLUMNS = (
    *("image_index", "turns", "task_type", "instructions", "format_instructions", "bg_consistency"),
    *("unchanged_objects", "available_objects", "all_objects"),
)
EDIVAL_NEEDED = EDIVAL_COLUMNS[:2] + EDIVAL_COLUMNS[3:4]
EDIVAL_FOLDERS = (".", "input_images_resize_512", "images")  # beside the CSV; the second is that of its download
KNOWN = "a .jsonl file, EdiVal's .csv, a .parquet file, a folder of images, or a data set of the hub (owner/name)"
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")  # owner/name:split


def read_sessions(path: str) -> Sessions:
    """All sessions of `path`. ValueError, one line without the path: not there, of another format, a wrong column, or
    empty. What is wrong with a single line is a Fault.
    """
    file = Path(path)
    if file.is_dir():
        sessions = _read_folder(file)
    elif file.exists() or file.suffix in (".jsonl", ".csv", ".parquet"):
        sessions = _read_file(file)
    elif _HUB_NAME.fullmatch(path):
        sessions = _read_hub(path)
    else:
        raise ValueError(f"no such file or folder: give {KNOWN}")
    if not sessions.total:
        raise ValueError("holds no session: give data with at least one")
    is_there: dict[Path, bool] = {}
    found, missing = [], []
    for session in sessions.found:
        file = session.file
        if file is not None and not is_there.setdefault(file, file.is_file()):
            missing.append(Fault(place=session.place, kind="image", text=f"no such file: {file}"))
        else:
            found.append(session)
    return Sessions(found=found, faults=[*sessions.faults, *missing], unused=sessions.unused)


def _read_file(path: Path) -> Sessions:
    readers: dict[str, Callable[[Path], Sessions]] = {
        ".jsonl": _read_jsonl, ".csv": _read_edival, ".parquet": _read_parquet
    }  # fmt: skip
    if path.suffix not in readers:
        raise ValueError(f"format {path.suffix or 'without a suffix'} is not known: give {KNOWN}")
    try:
        return readers[path.suffix](path)
    except UnicodeDecodeError:
        raise ValueError("is not text in UTF-8: save it so") from None
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror or error}): give a file that can") from None


def _unused(names: Iterable[str], what: str) -> tuple[str, ...]:
    """Fields that mean nothing here. ValueError where one looks like a misspelt field that is not there."""
    given = set(names)
    absent = [field for field in FIELDS if field not in given]
    unknown = sorted(given - set(FIELDS))
    for name in unknown:
        if near := difflib.get_close_matches(name, absent, n=1, cutoff=0.85):
            raise ValueError(f"{name} is no {what}: did you mean {near[0]}?")
    return tuple(unknown)


def _read_jsonl(path: Path, image_fields: tuple[str, ...] = ("image",)) -> Sessions:
    """One record a line; empty lines are passed over. Image paths are relative to the file."""
    found, faults, unused = [], [], set()
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            place = f"{path.name}:{number}"
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                faults.append(Fault(place=place, kind="line", text=f"is not JSON: {error.msg}"))
                continue
            try:
                if not isinstance(record, dict):
                    raise ValueError("must be an object with fields such as image and instructions")
                extra = _unused([name for name in record if name not in image_fields[1:]], "field")
                image = image_name(record, image_fields)
                file = path.parent / image
                found.append(from_record(record, place, image, file, partial(_same, file)))
                unused |= set(extra)
            except ValueError as error:
                faults.append(Fault(place=place, kind="fields", text=str(error)))
    return Sessions(found=found, faults=faults, unused=tuple(sorted(unused)))


def _same(path: Path) -> Path:
    return path


def _read_folder(folder: Path) -> Sessions:
    """`metadata.jsonl` (the image's field may be `file_name`), or images with a .txt of the same name beside them, one
    instruction a line.
    """
    metadata = folder / METADATA
    if metadata.exists():
        return _read_jsonl(metadata, ("image", "file_name"))
    images = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not images:
        raise ValueError(f"folder without {METADATA} and without images: give {KNOWN}")
    found, faults = [], []
    for image in images:
        text, name = image.with_suffix(".txt"), str(image.relative_to(folder))
        try:
            if not text.exists():
                raise ValueError(f"there is no {text.name} beside it")
            lines = [line for line in text.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
            found.append(from_record({"instructions": lines}, name, name, image, partial(_same, image)))
        except UnicodeDecodeError:
            faults.append(Fault(place=name, kind="line", text=f"{text.name} is not text in UTF-8"))
        except ValueError as error:
            faults.append(Fault(place=name, kind="fields", text=str(error)))
    return Sessions(found=found, faults=faults)


def _read_edival(path: Path) -> Sessions:
    """EdiVal's CSV: a row per image and turn, whose cells are Python lists that grow with the turn. The last entry of
    turn t's list is turn t's own; a cell that is no list is it already.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file)
        columns = rows.fieldnames or []
        for name in EDIVAL_NEEDED:
            if name not in columns:
                raise ValueError(f"has no column {name}: EdiVal's are {', '.join(EDIVAL_COLUMNS)}")
        by_image: dict[str, list[tuple[int, dict[str, Any]]]] = {}
        for row in rows:
            by_image.setdefault(row["image_index"], []).append((rows.line_num, row))
    found, faults = [], []
    for index, own in by_image.items():
        place = f"{path.name}:{own[0][0]}"
        try:
            record = _edival_record([row for _, row in own])
        except ValueError as error:
            faults.append(Fault(place=place, kind="fields", text=str(error)))
            continue
        image = _edival_image(path.parent, index)
        name = image.name if image else f"{index}_input_raw.jpg"
        image = image or path.parent / EDIVAL_FOLDERS[1] / name
        try:
            found.append(from_record(record, place, name, image, partial(_same, image)))
        except ValueError as error:
            faults.append(Fault(place=place, kind="fields", text=str(error)))
    return Sessions(found=found, faults=faults, unused=tuple(sorted(set(columns) - set(EDIVAL_COLUMNS))))


def _edival_record(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The fields of a session from the rows of its image."""
    turns = {row["turns"]: row for row in rows}
    ordered = [turns.get(str(turn)) for turn in range(1, len(rows) + 1)]
    if any(row is None for row in ordered):
        raise ValueError(f"turns are {', '.join(sorted(map(str, turns)))}: must be 1 to {len(rows)}, each once")
    kept = [row for row in ordered if row is not None]
    record: dict[str, Any] = {
        "instructions": [_unwrapped(str(_last(_literal(row, "instructions"))).strip()) for row in kept]
    }
    if all(row.get("task_type") for row in kept):
        record["edit_types"] = [str(_last(_literal(row, "task_type"))) for row in kept]
    if all(row.get("unchanged_objects") for row in kept):
        record["untouched_objects"] = [_literal(row, "unchanged_objects") for row in kept]
    return record


def _unwrapped(text: str) -> str:
    """The text without quotes around all of it, as the public file has around some."""
    return text[1:-1].strip() if len(text) > 2 and text[0] == text[-1] == '"' else text


def _literal(row: Mapping[str, Any], name: str) -> Any:
    """A cell as the Python list that it shows, or its text."""
    text = (row[name] or "").strip()
    if not text.startswith("["):
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise ValueError(f"{name} is {text[:40]!r}: must be a list as Python writes it") from None


def _last(value: Any) -> Any:
    return value[-1] if isinstance(value, list) and value else value


def _edival_image(folder: Path, index: str) -> Path | None:
    """The picture of an image_index, by the names that EdiVal's own code looks for."""
    names = [f"{index}{stem}{suffix}" for stem in ("_input_raw", "") for suffix in SUFFIXES]
    paths = (folder / sub / name for sub in EDIVAL_FOLDERS for name in names)
    return next((path for path in paths if path.is_file()), None)


def _datasets() -> Any:
    try:
        import datasets
    except ModuleNotFoundError:
        raise ValueError("needs the datasets library: pip install 'mteditflow[data]'") from None
    datasets.disable_progress_bars()
    return datasets


def _read_parquet(path: Path) -> Sessions:
    datasets = _datasets()
    try:
        table = datasets.Dataset.from_parquet(str(path))
    except ValueError as error:  # pyarrow's and datasets' own are ValueErrors of many lines
        raise ValueError(f"is no parquet file that can be read: {str(error).splitlines()[0]}") from None
    return _read_table(table, path.name, path.parent)


def _read_hub(name: str) -> Sessions:
    """`owner/name`, its split train, or `owner/name:split`."""
    repository, _, split = name.partition(":")
    try:
        table = _datasets().load_dataset(repository, split=split or "train")
    except OSError as error:  # no network, no such data set, no access
        reason = " ".join(str(error).split())
        raise ValueError(f"no such file or folder, and the hub has no such data set ({reason}): give {KNOWN}") from None
    except (RuntimeError, ValueError) as error:  # a set made by a script, a split or a configuration that is not there
        raise ValueError(f"the hub's data set cannot be read ({' '.join(str(error).split())}): give {KNOWN}") from None
    return _read_table(table, name, Path())


def _read_table(table: Any, name: str, folder: Path) -> Sessions:
    """Sessions of a `datasets` table with the columns of a JSONL record. A picture in the table counts as one of its
    own; a text is a path, relative to `folder`.
    """
    columns = table.column_names
    unused = _unused(columns, "column")
    if "image" not in columns or not {"instructions", "prompt"} & set(columns):
        raise ValueError(f"has columns {', '.join(columns)}: needs image, and instructions or prompt")
    is_path = getattr(table.features["image"], "dtype", "") in ("string", "large_string")
    if type(table.features["image"]).__name__ == "Image":
        table = table.cast_column("image", type(table.features["image"])(decode=False))
    texts = [column for column in FIELDS if column in columns and (column != "image" or is_path)]
    found, faults = [], []
    for number, record in enumerate(table.select_columns(texts)):
        place = f"{name}:{number + 1}"
        try:
            image = image_name(record) if is_path else f"row {number + 1}"
            file = folder / image if is_path else None
            read = partial(_same, file) if file else partial(_picture_of, table, number, folder)
            found.append(from_record(record, place, image, file, read))
        except ValueError as error:
            faults.append(Fault(place=place, kind="fields", text=str(error)))
    return Sessions(found=found, faults=faults, unused=unused)


def _picture_of(table: Any, number: int, folder: Path) -> Path | bytes:
    """The bytes of a row's picture, or its path. ValueError where it has neither."""
    image = table[number]["image"]
    if isinstance(image, bytes):
        return image
    if not isinstance(image, dict) or not (image.get("bytes") or image.get("path")):
        raise ValueError("the row has no picture")
    return image["bytes"] or folder / image["path"]
