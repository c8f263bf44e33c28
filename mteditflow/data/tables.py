"""Sessions of tables with pictures inside: parquet, in one file or in shards, folders of `save_to_disk`, data sets of
the hub. They go through the `datasets` library, which maps a table into memory.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub.utils import logging as hub_logging

from mteditflow.config.errors import first_line
from mteditflow.data.published import TURN_FIELDS, Row, group_turns, turn_record
from mteditflow.data.rows import find_unused
from mteditflow.data.sessions import FIELDS, Entry, Folder, RowError, Sessions, image_name, make_sessions, read_each

IMAGE_FIELDS = ("image", "file_name", "image_file_name")  # the others are imagefolder's
ROWS_AT_ONCE = 1000
SHARD = re.compile(r"(.+?)-\d+-of-\d+")  # such as train-00000-of-00031-453c1a9c
ROW = "row"  # where a record says which row of the table it is, from 0


def _datasets() -> Any:
    try:
        import datasets
    except ModuleNotFoundError:
        raise ValueError("needs the datasets library: pip install 'mteditflow[data]'") from None
    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)  # what is wrong is said once, by us
    hub_logging.set_verbosity_error()
    return datasets


def read_parquet(files: Sequence[Path], name: str, folder: Folder) -> Sessions:
    """Read a table of one or more parquet files. ValueError where one cannot be read."""
    datasets = _datasets()
    try:
        table = datasets.Dataset.from_parquet([str(file) for file in files])
    except (ValueError, datasets.exceptions.DatasetsError) as error:  # pyarrow's are ValueErrors of many lines
        damaged = _first_damaged(files) if len(files) > 1 else None
        called, reason = f"has {damaged[0].name}, which is" if damaged else "is", damaged[1] if damaged else error
        raise ValueError(f"{called} no parquet file that can be read: {first_line(reason)}") from None
    return _read_table(table, name, folder)


def _first_damaged(files: Sequence[Path]) -> tuple[Path, Exception] | None:
    """Find the first parquet file whose schema cannot be read, and why; None where all can."""
    from pyarrow import parquet

    for file in files:
        try:
            parquet.read_schema(file)
        except (OSError, ValueError) as error:
            return file, error
    return None


def read_shards(files: Sequence[Path], split: str, folder: Folder) -> Sessions:
    """Read the parquet files of a split, in the order of their names. ValueError where it is not there."""
    by_split: dict[str, list[Path]] = {}
    for file in files:
        found = SHARD.match(file.stem)
        by_split.setdefault(found[1] if found else "", []).append(file)
    chosen = choose_split(by_split, split)
    return read_parquet(by_split[chosen], f"{folder.root.name}:{chosen}" if chosen else folder.root.name, folder)


def choose_split(splits: Iterable[str], split: str) -> str:
    """Choose the split that is asked for; else the only one, or train. ValueError where that is not there."""
    names = sorted(splits)
    chosen = split or (names[0] if len(names) == 1 else "train")
    if chosen not in names:
        there = ", ".join(name or "one without a name" for name in names)
        raise ValueError(f"has no split {chosen}: it has {there}; add the one you mean, as in FOLDER:train")
    return chosen


def read_saved(path: Path, split: str, folder: Folder) -> Sessions:
    """Read a folder that `save_to_disk` has written, of one table or of splits."""
    datasets = _datasets()
    try:
        saved = datasets.load_from_disk(str(path))
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # arrow's damage, or JSON of another shape
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"is no folder of save_to_disk that can be read: {reason}") from None
    is_split = isinstance(saved, datasets.DatasetDict)
    if split and not is_split:
        raise ValueError(f"has no split {split}: it is one table; leave the split out")
    chosen = choose_split(saved, split) if is_split else ""
    return _read_table(saved[chosen] if is_split else saved, f"{path.name}:{chosen}" if chosen else path.name, folder)


def read_hub(name: str, known: str) -> Sessions:
    """Read `owner/name`, its split train, or `owner/name:split`. known: what can be read at all, for the message."""
    repository, _, split = name.partition(":")
    datasets = _datasets()
    try:
        table = datasets.load_dataset(repository, split=split or "train")
    except OSError as error:  # no network, no such data set, no access
        reason = " ".join(str(error).split())
        raise ValueError(f"no such file or folder, and the hub has no such data set ({reason}): give {known}") from None
    except (
        RuntimeError,
        ValueError,
        datasets.exceptions.DatasetsError,
    ) as error:  # a set made by a script, a split or a configuration that is not there
        raise ValueError(f"the hub's data set cannot be read ({' '.join(str(error).split())}): give {known}") from None
    return _read_table(table, name, None)


def _hub_folders() -> list[Folder]:
    """List the folders that the hub's libraries download to: a path in a row of a hub set lies in one of them."""
    from huggingface_hub.constants import HF_HUB_CACHE

    config = _datasets().config
    paths = (Path(path).resolve() for path in (config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH, HF_HUB_CACHE))
    return [Folder(root=path, allowed=path) for path in paths]


def _read_table(table: Any, name: str, folder: Folder | None) -> Sessions:
    """Read a `datasets` table with the columns of a JSONL record, or of a turn. Every picture in the table counts as
    another image, but for the turns of one; a text is a path in the folder. folder: None for a set of the hub.
    """
    columns = table.column_names
    is_by_turn = set(TURN_FIELDS) <= set(columns)
    image = "source_img" if is_by_turn else next((it for it in IMAGE_FIELDS if it in columns), "image")
    used = {*(TURN_FIELDS if is_by_turn else FIELDS), image}
    is_known = columns if is_by_turn else ["image" if it == image else it for it in columns]
    unused = tuple(sorted(set(columns) - used)) if is_by_turn else find_unused(is_known, "column")
    if image not in columns or not {"instructions", "prompt", "instruction"} & used & set(columns):
        raise ValueError(f"has columns {', '.join(columns)}: needs image, and instructions or prompt")
    if "images" in columns and not is_by_turn:
        raise ValueError("has a column images: sessions of several images are read from a .jsonl")
    is_path = getattr(table.features[image], "dtype", "") in ("string", "large_string")
    if is_path and folder is None:
        raise ValueError(f"has texts in its column {image}: pictures of a hub data set must be in the set itself")
    if type(table.features[image]).__name__ == "Image":
        table = table.cast_column(image, type(table.features[image])(decode=False))
    folders, pictures = _hub_folders() if folder is None else [folder], table.select_columns([image])

    def entry(record: Mapping[str, Any], row: Mapping[str, Any], called: str) -> Entry:
        if is_path:
            return record, partial(folders[0].find, image_name(row, (image,)))
        picture = partial(_picture_of, pictures, image, row[ROW], folders)
        return record, lambda: (called, picture)

    def parse(read: Callable[[], Mapping[str, Any]]) -> Entry:
        record = read()
        return entry(record, record, f"row {record[ROW] + 1}")

    def parse_turns(rows: list[Row]) -> Entry:
        record, first = turn_record(rows)
        return entry(record, first, str(first["img_id"]))

    texts = table.select_columns([it for it in columns if it in used and (it != image or is_path)])
    rows = ((f"{name}:{number + 1}", read) for number, read in _rows(texts))
    if not is_by_turn:
        return replace(make_sessions((place, partial(parse, read)) for place, read in rows), unused=unused)
    readable, faults = read_each(rows)
    turns = ((rows[0][0], partial(parse_turns, rows)) for rows in group_turns(readable))
    return replace(make_sessions(turns, faults), unused=unused)


def _rows(table: Any) -> Iterator[tuple[int, Callable[[], Mapping[str, Any]]]]:
    """Read a table some rows at a time; where one of them is no text, one by one. A record says its row."""
    for start in range(0, len(table), ROWS_AT_ONCE):
        numbers = range(start, min(start + ROWS_AT_ONCE, len(table)))
        try:
            columns = table[numbers[0] : numbers[-1] + 1]
        except UnicodeDecodeError:
            yield from ((number, partial(_read_row, table, number)) for number in numbers)
            continue
        for i, number in enumerate(numbers):
            yield number, partial(dict, {ROW: number} | {column: values[i] for column, values in columns.items()})


def _read_row(table: Any, number: int) -> Mapping[str, Any]:
    try:
        return {ROW: number, **table[number]}
    except UnicodeDecodeError:
        raise RowError("line", "has a text that is not UTF-8") from None


def _picture_of(table: Any, column: str, number: int, folders: Sequence[Folder]) -> Path | bytes:
    """Read the bytes of a row's picture, or find its file in one of the folders. ValueError where it has neither."""
    try:
        image = table[number][column]
    except (OSError, ValueError) as error:  # of a damaged page, arrow's errors are ValueErrors or OSErrors
        raise ValueError(f"the row's picture cannot be read: {' '.join(str(error).split())}") from None
    if isinstance(image, bytes):
        return image
    if not isinstance(image, dict) or not (image.get("bytes") or image.get("path")):
        raise ValueError("the row has no picture")
    if image.get("bytes"):
        return image["bytes"]
    for folder in folders[:-1]:
        try:
            return folder.file(image["path"])
        except ValueError:
            continue
    return folders[-1].file(image["path"])
