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
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mteditflow.data.images import SUFFIXES
from mteditflow.data.sessions import FIELDS, Fault, Picture, Sessions, image_name, make_session

METADATA = "metadata.jsonl"
EDIVAL_COLUMNS = (
    *("image_index", "turns", "task_type", "instructions", "format_instructions", "bg_consistency"),
    *("unchanged_objects", "available_objects", "all_objects"),
)
EDIVAL_NEEDED = EDIVAL_COLUMNS[:2] + EDIVAL_COLUMNS[3:4]
EDIVAL_FOLDERS = (".", "input_images_resize_512", "images")  # beside the CSV; the second is that of its download
KNOWN = "a .jsonl file, EdiVal's .csv, a .parquet file, a folder of images, or a data set of the hub (owner/name)"
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")  # owner/name:split

Entry = tuple[Mapping[str, Any], str, Picture]
"""A record, the image's name, and the image."""


class UnreadableError(ValueError):
    """A line or a text that cannot be read, so that nothing is known of its fields."""


def read_sessions(path: str) -> Sessions:
    """Read all sessions of `path`. What is wrong with a single line is a Fault.

    ValueError, one line without the path: not there, of another format, a wrong column, or empty.
    """
    readers = {".jsonl": _read_jsonl, ".csv": _read_edival, ".parquet": _read_parquet}
    file = Path(path)
    try:
        if file.is_dir():
            sessions = _read_folder(file)
        elif file.suffix in readers:
            sessions = readers[file.suffix](file)
        elif file.exists():
            raise ValueError(f"format {file.suffix or 'without a suffix'} is not known: give {KNOWN}")
        elif HUB_NAME.fullmatch(path):
            sessions = _read_hub(path)
        else:
            raise ValueError(f"no such file or folder: give {KNOWN}")
    except UnicodeDecodeError:
        raise ValueError("is not text in UTF-8: save it so") from None
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror or error}): give a file that can") from None
    if not sessions.total:
        raise ValueError("holds no session: give data with at least one")
    is_there: dict[Path, bool] = {}
    found, faults = [], [*sessions.faults]
    for session in sessions.found:
        file = session.file
        if file is None or is_there.setdefault(file, file.is_file()):
            found.append(session)
        else:
            faults.append(Fault(place=session.place, kind="image", text=f"no such file: {file}"))
    return replace(sessions, found=found, faults=faults)


def _find_unused(names: Iterable[str], what: str) -> tuple[str, ...]:
    """List the fields that mean nothing here. ValueError where one looks like a misspelt field that is not there."""
    given = set(names)
    absent, unknown = [field for field in FIELDS if field not in given], sorted(given - set(FIELDS))
    for name in unknown:
        if near := difflib.get_close_matches(name, absent, n=1, cutoff=0.85):
            raise ValueError(f"{name} is no {what}: did you mean {near[0]}?")
    return tuple(unknown)


def _sessions(entries: Iterable[tuple[str, Callable[[], Entry]]]) -> Sessions:
    """Make a session of every entry, named by its place; what is wrong with one is a Fault."""
    found, faults = [], []
    for place, parse in entries:
        try:
            found.append(make_session(place, *parse()))
        except ValueError as error:
            kind = "line" if isinstance(error, UnreadableError) else "fields"
            faults.append(Fault(place=place, kind=kind, text=str(error)))
    return Sessions(found=found, faults=faults)


def _read_jsonl(path: Path, image_fields: tuple[str, ...] = ("image",)) -> Sessions:
    """Read one record a line, passing over empty lines. Image paths are relative to the file."""
    unused: dict[str, tuple[str, ...]] = {}

    def parse(place: str, line: str) -> Entry:
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UnreadableError(f"is not JSON: {error.msg}") from None
        if not isinstance(record, dict):
            raise ValueError("must be an object with fields such as image and instructions")
        unused[place] = _find_unused([name for name in record if name not in image_fields[1:]], "field")
        image = image_name(record, image_fields)
        return record, image, path.parent / image

    with path.open(encoding="utf-8-sig") as lines:
        places = ((f"{path.name}:{number}", line) for number, line in enumerate(lines, 1) if line.strip())
        sessions = _sessions((place, partial(parse, place, line)) for place, line in places)
    names = {name for session in sessions.found for name in unused[session.place]}
    return replace(sessions, unused=tuple(sorted(names)))


def _read_folder(folder: Path) -> Sessions:
    """Read `metadata.jsonl` (the image's field may be `file_name`), or images with a .txt of the same name beside them,
    one instruction a line.
    """
    metadata = folder / METADATA
    if metadata.exists():
        return _read_jsonl(metadata, ("image", "file_name"))
    images = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not images:
        raise ValueError(f"folder without {METADATA} and without images: give {KNOWN}")

    def parse(image: Path, name: str) -> Entry:
        text = image.with_suffix(".txt")
        if not text.exists():
            raise ValueError(f"there is no {text.name} beside it")
        try:
            lines = text.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError:
            raise UnreadableError(f"{text.name} is not text in UTF-8") from None
        return {"instructions": [line for line in lines if line.strip()]}, name, image

    return _sessions((name := str(image.relative_to(folder)), partial(parse, image, name)) for image in images)


def _read_edival(path: Path) -> Sessions:
    """Read EdiVal's CSV: a row per image and turn, whose cells are Python lists that grow with the turn. The last entry
    of turn t's list is of turn t; so is a cell that is no list.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file)
        columns = rows.fieldnames or []
        for name in EDIVAL_NEEDED:
            if name not in columns:
                raise ValueError(f"has no column {name}: EdiVal's are {', '.join(EDIVAL_COLUMNS)}")
        places, by_image = dict[str, str](), dict[str, list[dict[str, Any]]]()
        for row in rows:
            places.setdefault(row["image_index"], f"{path.name}:{rows.line_num}")
            by_image.setdefault(row["image_index"], []).append(row)

    def parse(index: str) -> Entry:
        record, image = _edival_record(by_image[index]), _edival_image(path.parent, index)
        return record, image.name, image

    sessions = _sessions((places[index], partial(parse, index)) for index in by_image)
    return replace(sessions, unused=tuple(sorted(set(columns) - set(EDIVAL_COLUMNS))))


def _edival_record(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Make the fields of a session of the rows of its image."""
    turns = {row["turns"]: row for row in rows}
    if set(turns) != {str(turn) for turn in range(1, len(rows) + 1)}:
        raise ValueError(f"turns are {', '.join(sorted(map(str, turns)))}: must be 1 to {len(rows)}, each once")
    rows = [turns[str(turn)] for turn in range(1, len(rows) + 1)]
    record = {"instructions": [_unwrap(str(_last(_literal(row, "instructions"))).strip()) for row in rows]}
    if all(row.get("task_type") for row in rows):
        record["edit_types"] = [str(_last(_literal(row, "task_type"))) for row in rows]
    if all(row.get("unchanged_objects") for row in rows):
        record["untouched_objects"] = [_literal(row, "unchanged_objects") for row in rows]
    return record


def _unwrap(text: str) -> str:
    """Take off quotes around all of a text, as the public file has around some."""
    return text[1:-1].strip() if len(text) > 2 and text[0] == text[-1] == '"' else text


def _literal(row: Mapping[str, Any], name: str) -> Any:
    """Read a cell as the Python list that it shows, or else as text."""
    text = (row[name] or "").strip()
    if not text.startswith("["):
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise ValueError(f"{name} is {text[:40]!r}: must be a list as Python writes it") from None


def _last(value: Any) -> Any:
    return value[-1] if isinstance(value, list) and value else value


def _edival_image(folder: Path, index: str) -> Path:
    """Find the picture of an image_index by the names that EdiVal's code looks for; one of them where none is there."""
    names = [f"{index}{stem}{suffix}" for stem in ("_input_raw", "") for suffix in SUFFIXES]
    paths = (folder / sub / name for sub in EDIVAL_FOLDERS for name in names)
    missing = folder / EDIVAL_FOLDERS[1] / f"{index}_input_raw.jpg"
    return next((path for path in paths if path.is_file()), missing)


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
    """Read `owner/name`, its split train, or `owner/name:split`."""
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
    """Read a `datasets` table with the columns of a JSONL record. Every picture in the table counts as another image; a
    text is a path, relative to `folder`.
    """
    columns = table.column_names
    unused = _find_unused(columns, "column")
    if "image" not in columns or not {"instructions", "prompt"} & set(columns):
        raise ValueError(f"has columns {', '.join(columns)}: needs image, and instructions or prompt")
    is_path = getattr(table.features["image"], "dtype", "") in ("string", "large_string")
    if type(table.features["image"]).__name__ == "Image":
        table = table.cast_column("image", type(table.features["image"])(decode=False))
    texts = [column for column in FIELDS if column in columns and (column != "image" or is_path)]

    def parse(number: int, record: Mapping[str, Any]) -> Entry:
        if is_path:
            return record, image_name(record), folder / image_name(record)
        return record, f"row {number}", partial(_picture_of, table, number - 1, folder)

    records = enumerate(table.select_columns(texts), 1)
    sessions = _sessions((f"{name}:{number}", partial(parse, number, record)) for number, record in records)
    return replace(sessions, unused=unused)


def _picture_of(table: Any, number: int, folder: Path) -> Path | bytes:
    """Read the bytes of a row's picture, or its path. ValueError where it has neither."""
    image = table[number]["image"]
    if isinstance(image, bytes):
        return image
    if not isinstance(image, dict) or not (image.get("bytes") or image.get("path")):
        raise ValueError("the row has no picture")
    return image["bytes"] or folder / image["path"]
