"""Readers of users' data by the form of what they name: JSONL, CSV, a folder, parquet, a data set of the hub. All give
`Sessions`.

Texts are read and checked at once; pictures stay where they are until they are drawn.
"""

import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mteditflow.data.images import SUFFIXES
from mteditflow.data.published import (
    EDIVAL_NEEDED,
    PICO_PROMPTS,
    TURN_FIELDS,
    Row,
    group_turns,
    literal,
    pico_entries,
    read_edival,
    turn_record,
)
from mteditflow.data.rows import GZIP, Read, csv_rows, find_unused, json_rows
from mteditflow.data.sessions import (
    Entry,
    Folder,
    RowError,
    Sessions,
    find_all,
    image_name,
    image_names,
    make_sessions,
    read_each,
    shorten,
)
from mteditflow.data.tables import IMAGE_FIELDS, choose_split, read_hub, read_parquet, read_saved, read_shards

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # imagefolder's; the first is ours, too
SAVED = ("state.json", "dataset_dict.json")  # by which a folder of `save_to_disk` is known
LISTS = ("images", "instructions", "edit_types", "objects", "untouched_objects")  # what a cell of a CSV holds as JSON
KNOWN = "a .jsonl file, a .csv, a .parquet file, a folder of images, or a data set of the hub (owner/name)"
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")  # owner/name:split
JUNK = ("__MACOSX", "Thumbs.db", "desktop.ini", "@eaDir")  # what systems leave in folders, beside names with a dot


def read_sessions(path: str, allowed_folder: str = "") -> Sessions:
    """Read all sessions of `path`. What is wrong with a single line is a Fault.

    allowed_folder: data.allowed_folder. ValueError, one line without the path: not there, of another format, a wrong
    column, or empty.
    """
    if allowed_folder and not os.path.isdir(allowed_folder):
        raise ValueError(f"data.allowed_folder is {allowed_folder!r}, which is no folder: name one that is there")
    try:
        sessions = _read(path, allowed_folder)
    except UnicodeDecodeError:
        raise ValueError("is not text in UTF-8: save it so") from None
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror or error}): give a file that can") from None
    if not sessions.total:
        raise ValueError("holds no session: give data with at least one")
    return _name_files_once(sessions)


def _read(path: str, allowed_folder: str) -> Sessions:
    """Choose the reader."""
    file, split = Path(path), ""
    if not file.exists() and os.path.isdir(path.rpartition(":")[0]):
        folder_name, _, split = path.rpartition(":")
        file = Path(folder_name)
    root = Path(os.path.realpath(file if file.is_dir() else file.parent))
    folder = Folder(root=root, allowed=Path(os.path.realpath(allowed_folder)) if allowed_folder else root)
    readers = {".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
    suffixes = [suffix.lower() for suffix in file.suffixes]
    suffix = suffixes[-2] if suffixes[1:] and suffixes[-1] == GZIP else "".join(suffixes[-1:])
    if file.is_dir():
        return _read_folder(file, split, folder)
    if suffix in readers and not (suffix == ".parquet" and suffixes[-1] == GZIP):
        return readers[suffix](file, folder)
    if file.exists():
        raise ValueError(f"format {''.join(suffixes[-1:]) or 'without a suffix'} is not known: give {KNOWN}")
    if HUB_NAME.fullmatch(path):
        return read_hub(path, KNOWN)
    raise ValueError(f"no such file or folder: give {KNOWN}")


def _name_files_once(sessions: Sessions) -> Sessions:
    """Give one name to pictures that are one file: hard links, and names that the file system takes as one."""
    files = {session.image: session.file for session in sessions.found if session.file}
    names: dict[tuple[int, int], list[str]] = defaultdict(list)
    for name, file in files.items():
        status = file.stat()
        names[status.st_dev, status.st_ino].append(name)
    first = {name: min(same) for same in names.values() if len(same) > 1 for name in same}
    found = [replace(session, image=first.get(session.image, session.image)) for session in sessions.found]
    return replace(sessions, found=found) if first else sessions


def _read_jsonl(path: Path, folder: Folder, image_fields: tuple[str, ...] = ("image",)) -> Sessions:
    """Read one record a line. Image paths are relative to the file."""
    return _read_records(((f"{path.name}:{line}", read) for line, read in json_rows(path)), folder, image_fields)


def _read_csv(path: Path, folder: Folder, image_fields: tuple[str, ...] = IMAGE_FIELDS) -> Sessions:
    """Read EdiVal's CSV, or one with a record a row, whose lists are written as JSON."""
    columns, rows = csv_rows(path)
    if set(EDIVAL_NEEDED) & {*columns} - {"instructions"}:
        return read_edival(path, folder)
    has_records = {"instructions", "prompt"} & set(columns) and {*image_fields, "images"} & set(columns)
    if not has_records and not set(TURN_FIELDS) <= set(columns):
        find_unused(columns, "column", image_fields)
        remedy = "give image, and instructions or prompt, as names in the first line, with commas between them"
        raise ValueError(f"has columns {shorten(', '.join(columns), 200)}: {remedy}")
    found = ((f"{path.name}:{line}", partial(_csv_record, read)) for line, read in rows)
    return _read_records(found, folder, image_fields)


def _csv_record(read: Read) -> dict[str, Any]:
    """Read the lists of a row's cells. ValueError where one is no list."""
    record = read()
    for name in LISTS:
        if name in record:
            try:
                record[name] = json.loads(record[name])
            except (ValueError, RecursionError):
                record[name] = literal(record, name)
    return record


def _read_parquet(path: Path, folder: Folder) -> Sessions:
    return read_parquet([path], path.name, folder)


def _read_records(rows: Iterable[tuple[str, Read]], folder: Folder, image_fields: tuple[str, ...]) -> Sessions:
    """Make sessions of records of ours, of MagicBrush's turns, and of Pico-Banana-400K's sessions."""
    records, faults = read_each(rows)
    unused: dict[str, tuple[str, ...]] = {}

    def parse(place: str, record: Mapping[str, Any]) -> Entry:
        unused[place] = find_unused([name for name in record if name not in image_fields[1:]], "field")
        return record, partial(find_all, folder, image_names(record, image_fields))

    def parse_turns(rows: list[Row]) -> Entry:
        record, first = turn_record(rows)
        return record, partial(folder.find, image_name(first, ("source_img",)))

    turns, pico, others = list[Row](), list[Row](), list[Row]()
    for row in records:
        is_turn, is_pico = row[1].keys() >= set(TURN_FIELDS), PICO_PROMPTS in row[1]
        (turns if is_turn else pico if is_pico else others).append(row)
    entries: list[tuple[str, Callable[[], Entry]]] = [(place, partial(parse, place, it)) for place, it in others]
    entries += [(same[0][0], partial(parse_turns, same)) for same in group_turns(turns)]
    entries += pico_entries(pico, folder) if pico else []
    sessions = make_sessions(entries, faults)
    names = {name for session in sessions.found for name in unused.get(session.place, ())}
    return replace(sessions, unused=tuple(sorted(names)))


def _is_data(path: Path) -> bool:
    """Say whether a path in a folder is none of those that systems leave there."""
    return not any(part.startswith(".") or part in JUNK for part in path.parts)


def _read_folder(path: Path, split: str, folder: Folder) -> Sessions:
    """Read a folder of `save_to_disk`, of `metadata.jsonl` or imagefolder's other forms, of parquet files, of splits,
    or images with a .txt of the same name beside them.
    """
    if any((path / name).is_file() for name in SAVED):
        return read_saved(path, split, folder)
    there = {name.lower(): path / name for name in os.listdir(path)}
    readers = dict(zip(METADATA, (_read_jsonl, _read_csv, _read_parquet), strict=True))
    for name in METADATA:
        if name in there and not split:
            fields = () if name == METADATA[2] else (IMAGE_FIELDS,)
            return readers[name](there[name], folder, *fields)
    if inner := _split_folder(path, split):
        return _read_folder(inner, "", replace(folder, root=Path(os.path.realpath(inner))))
    names = sorted(it.relative_to(path) for it in path.rglob("*") if it.is_file())
    names = [name for name in names if _is_data(name)]
    if shards := [path / name for name in names if name.suffix.lower() == ".parquet"]:
        return read_shards(shards, split, folder)
    if split:
        raise ValueError(f"has no split {split}: name a folder in it, or leave the split out")
    return _read_texts(path, names, folder)


def _split_folder(path: Path, split: str) -> Path | None:
    """Choose the folder of a split, as imagefolder has them, with metadata in each; None where there are no splits."""
    folders = [it for it in path.iterdir() if it.is_dir() and _is_data(Path(it.name))]
    splits = [it.name for it in folders if split == it.name or any((it / name).is_file() for name in METADATA)]
    return path / choose_split(splits, split) if splits else None


def _read_texts(path: Path, names: list[Path], folder: Folder) -> Sessions:
    """Read images with a .txt of the same name beside them, one instruction a line."""
    beside: dict[Path, list[Path]] = defaultdict(list)
    for name in names:
        beside[name.with_suffix("")].append(name)
    texts = {stem: name for stem, same in beside.items() for name in same if name.suffix.lower() == ".txt"}
    images = [name for name in names if name.suffix.lower() in SUFFIXES]
    if not images and not texts:
        raise ValueError(f"folder without {METADATA[0]} and without images: give {KNOWN}")

    def parse(image: Path) -> Entry:
        if image.with_suffix("") not in texts:
            raise ValueError(f"there is no {image.with_suffix('.txt').name} beside it")
        text = path / texts[image.with_suffix("")]
        try:
            lines = text.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError:
            raise RowError("line", f"{text.name} is not text in UTF-8") from None
        except OSError as error:
            raise RowError("line", f"{text.name} cannot be read: {error.strerror}") from None
        return {"instructions": [line for line in lines if line.strip()]}, partial(folder.find, str(image))

    def miss(others: list[Path]) -> Entry:
        remedy = "save it as PNG or JPEG"
        raise RowError("image", f"{', '.join(other.name for other in others)} is no picture that can be read: {remedy}")

    with_image = {image.with_suffix("") for image in images}
    others = {text: [it for it in beside[stem] if it != text] for stem, text in texts.items() if stem not in with_image}
    entries: list[tuple[str, Callable[[], Entry]]] = [(str(image), partial(parse, image)) for image in images]
    entries += [(str(text), partial(miss, same)) for text, same in others.items() if same]
    used = {*images, *texts.values(), *(name for same in others.values() for name in same)}
    alone = {text for text, same in others.items() if not same}
    passed_over = tuple(str(name) for name in names if name not in used or name in alone)
    return replace(make_sessions(entries), passed_over=passed_over)
