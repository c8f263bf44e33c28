"""Published data of other shapes as records: EdiVal-Bench's CSV, MagicBrush's rows, Pico-Banana-400K's sessions."""

import ast
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from mteditflow.data.images import SUFFIXES
from mteditflow.data.rows import csv_rows
from mteditflow.data.sessions import (
    Entry,
    Folder,
    Located,
    RowError,
    Sessions,
    check_text,
    make_sessions,
    read_each,
    shorten,
)

EDIVAL_COLUMNS = (
    *("image_index", "turns", "task_type", "instructions", "format_instructions", "bg_consistency"),
    *("unchanged_objects", "available_objects", "all_objects"),
)
EDIVAL_NEEDED = EDIVAL_COLUMNS[:2] + EDIVAL_COLUMNS[3:4]
EDIVAL_FOLDERS = (".", "input_images_resize_512", "images")  # beside the CSV; the second is that of its download
TURN_FIELDS = ("img_id", "turn_index", "source_img", "instruction")  # MagicBrush's: a row for each turn
PICO_PROMPTS, PICO_FILES, PICO_LOCAL = "metadata_edit_turn_prompts", "files", "local_input_image"
PICO_SOURCE = "original_input_image"  # the id, among the files, of the picture that a session begins with
OPEN_IMAGES_URLS = "train-images-boxable-with-rotation.csv"  # ImageID and OriginalURL of Open Images' pictures

Row = tuple[str, Mapping[str, Any]]
"""A place and its record."""


def group_turns(rows: Iterable[Row]) -> list[list[Row]]:
    """Group rows of one turn each into sessions, by image; another first turn of an image begins another session."""
    by_image: dict[Any, list[Row]] = {}
    for place, record in rows:
        image = record.get("img_id")
        by_image.setdefault(str(image) if isinstance(image, str | int) else (place,), []).append((place, record))
    sessions = []
    for same in by_image.values():
        starts = [i for i, (_, record) in enumerate(same) if str(record.get("turn_index")) == "1"]
        sessions += [same[start:end] for start, end in pairwise([0, *starts[1:], len(same)])]
    return sessions


def turn_record(rows: list[Row]) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """Make the fields of a session of the rows of its turns, in any order; returns the first turn's row, too."""
    image = rows[0][1].get("img_id")
    if not isinstance(image, str | int) or not str(image).strip():
        raise ValueError(f"img_id is {shorten(image)}: must name the image that the turn belongs to")
    check_text(str(image), "img_id")
    in_order = _in_turns([(str(record.get("turn_index")), record) for _, record in rows], "turn_index")
    return {"instructions": [record.get("instruction") for record in in_order]}, in_order[0]


def _in_turns(rows: list[tuple[str, Any]], name: str) -> list[Any]:
    """Sort rows by their turns. ValueError unless these are 1, 2, ..."""
    by_turn = dict(rows)
    if set(by_turn) != {str(turn) for turn in range(1, len(rows) + 1)}:
        there = shorten(", ".join(sorted(turn for turn, _ in rows)))
        raise ValueError(f"{name} are {there}: must be 1 to {len(rows)}, each once")
    return [by_turn[str(turn)] for turn in range(1, len(rows) + 1)]


def pico_entries(rows: list[Row], folder: Folder) -> Iterator[tuple[str, partial[Entry]]]:
    """Make the entries of Pico-Banana-400K's sessions, whose pictures come from Open Images and are named by address.

    A picture is looked for where the set's own script has written it down (`local_input_image`), then anywhere in the
    folder, by the file's name in the address, or by its ImageID, if Open Images' list of addresses is there too.
    """
    files: dict[str, str] = {}
    for path, names, file_names in os.walk(folder.root):
        names.sort()
        for name in file_names:
            files.setdefault(name, os.path.relpath(os.path.join(path, name), folder.root))
    addresses = {pico_source(record) for _, record in rows}
    ids = _open_images_ids(folder.root / files[OPEN_IMAGES_URLS], addresses) if OPEN_IMAGES_URLS in files else {}

    def locate(record: Mapping[str, Any]) -> Located:
        address, local = pico_source(record), record.get(PICO_LOCAL)
        names = [local] if isinstance(local, str) and local else []
        if names and os.path.isfile(folder.root / check_text(names[0], PICO_LOCAL)):
            return folder.find(names[0])
        names = [PurePosixPath(name).name for name in (*names, unquote(urlsplit(address).path)) if name]
        names += [f"{ids[address]}.jpg"] if address in ids else []
        found = next((files[name] for name in names if name in files), None)
        if found is None:
            raise RowError("image", f"no picture of {shorten(address, 200)} in {folder.root}: download it to there")
        return folder.find(found)

    def parse(record: Mapping[str, Any]) -> Entry:
        return {"instructions": record[PICO_PROMPTS]}, partial(locate, record)

    return ((place, partial(parse, record)) for place, record in rows)


def pico_source(record: Mapping[str, Any]) -> str:
    """Take the address of the picture that a session of Pico-Banana-400K begins with; '' where it has none."""
    files = record.get(PICO_FILES)
    named = [file for file in files if isinstance(file, Mapping)] if isinstance(files, list) else []
    found = [file.get("url") for file in named if file.get("id") == PICO_SOURCE]
    return found[0] if found and isinstance(found[0], str) else ""


def _open_images_ids(path: Path, addresses: set[str]) -> dict[str, str]:
    """Read the ImageIDs of these addresses; ids that are no plain names are left out."""
    ids = {}
    for _, read in csv_rows(path)[1]:  # of 1.7 million: not kept
        with suppress(ValueError):
            row = read()
            if row.get("OriginalURL") in addresses and row.get("ImageID", "").isalnum():
                ids[row["OriginalURL"]] = row["ImageID"]
    return ids


def read_edival(path: Path, folder: Folder) -> Sessions:
    """Read EdiVal's CSV: a row per image and turn, whose cells are Python lists that grow with the turn. The last entry
    of turn t's list is of turn t; so is a cell that is no list.
    """
    columns, rows = csv_rows(path)
    for name in EDIVAL_NEEDED:
        if name not in columns:
            raise ValueError(f"has no column {name}: EdiVal's are {', '.join(EDIVAL_COLUMNS)}")
    readable, faults = read_each((f"{path.name}:{line}", read) for line, read in rows)
    places, by_image = dict[str, str](), dict[str, list[dict[str, Any]]]()
    for place, row in readable:
        index = row.get("image_index", "")
        places.setdefault(index, place)
        by_image.setdefault(index, []).append(row)

    def parse(index: str) -> Entry:
        return _edival_record(by_image[index]), partial(_edival_image, folder, index)

    sessions = make_sessions(((places[index], partial(parse, index)) for index in by_image), faults)
    return replace(sessions, unused=tuple(sorted(set(columns) - set(EDIVAL_COLUMNS))))


def _edival_record(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Make the fields of a session of the rows of its image."""
    rows = _in_turns([(row.get("turns", ""), row) for row in rows], "turns")
    record = {"instructions": [_unwrap(str(_last(literal(row, "instructions"))).strip()) for row in rows]}
    if all(row.get("task_type") for row in rows):
        record["edit_types"] = [str(_last(literal(row, "task_type"))) for row in rows]
    if all(row.get("unchanged_objects") for row in rows):
        record["untouched_objects"] = [literal(row, "unchanged_objects") for row in rows]
    return record


def _unwrap(text: str) -> str:
    """Take off quotes around all of a text, as the public file has around some."""
    return text[1:-1].strip() if len(text) > 2 and text[0] == text[-1] == '"' else text


def literal(row: Mapping[str, Any], name: str) -> Any:
    """Read a cell as the Python list that it shows, or else as text."""
    text = row.get(name, "").strip()
    if not text.startswith("["):
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise ValueError(f"{name} is {text[:40]!r}: must be a list as Python writes it") from None


def _last(value: Any) -> Any:
    return value[-1] if isinstance(value, list) and value else value


def _edival_image(folder: Folder, index: str) -> Located:
    """Find the picture of an image_index by the names that EdiVal's code looks for; RowError where none is there."""
    check_text(index, "image_index")
    names = [f"{index}{stem}{suffix}" for stem in ("_input_raw", "") for suffix in SUFFIXES]
    paths = (f"{sub}/{name}" for sub in EDIVAL_FOLDERS for name in names)
    missing = f"{EDIVAL_FOLDERS[1]}/{index}_input_raw.jpg"
    file = folder.file(next((path for path in paths if os.path.isfile(folder.root / path)), missing))
    return file.name, file
