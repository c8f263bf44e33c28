"""Rows of text files, JSONL and CSV, also gzipped: whatever is wrong with a row is wrong with that row alone."""

import csv
import difflib
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from mteditflow.data.sessions import FIELDS, RowError

GZIP = ".gz"
UTF_16 = (b"\xff\xfe", b"\xfe\xff")
CUT = (EOFError, OSError, zlib.error)  # what a gzipped file raises in the middle
Read = Callable[[], dict[str, Any]]
"""Makes the record of a row. ValueError where it has none."""


@contextmanager
def _open(path: Path) -> Iterator[gzip.GzipFile | io.BufferedReader]:
    """Open a file, gzipped or not. ValueError where it is text of a computer that writes two bytes a letter."""
    with gzip.open(path) if path.suffix.lower() == GZIP else path.open("rb") as file:
        try:
            head = file.peek(2)[:2]
        except CUT as error:
            raise ValueError(f"cannot be read ({' '.join(str(error).split())}): give a file that can") from None
        if head in UTF_16:
            raise ValueError("is not text in UTF-8: save it so")
        yield file


def json_rows(path: Path) -> Iterator[tuple[int, Read]]:
    """Read a record a line, by its line; empty lines are passed over. ValueError where no line is text."""
    num_texts, num_damaged, last = 0, 0, 0
    with _open(path) as file:
        lines = enumerate(file, 1)
        while True:
            try:
                number, line = next(lines, (0, b""))
            except CUT as error:
                yield last + 1, partial(_fail, f"the file breaks off: {error}")
                return
            if not number:
                break
            last = number
            if not line.strip():
                continue
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                num_damaged += 1
                yield number, partial(_fail, "is not text in UTF-8")
                continue
            num_texts += 1
            if text.strip():
                yield number, partial(_parse, text)
    if num_damaged and not num_texts:
        raise ValueError("is not text in UTF-8: save it so")


def _fail(text: str) -> dict[str, Any]:
    raise RowError("line", text)


def _parse(line: str) -> dict[str, Any]:
    """Read a line as a JSON object. RowError where it is none that can be read."""
    try:
        record = json.loads(line, object_pairs_hook=_once)
    except RowError:
        raise
    except json.JSONDecodeError as error:
        raise RowError("line", f"is not JSON: {error.msg}") from None
    except ValueError:  # Python's limit
        raise RowError("line", "has a number of more digits than can be read") from None
    except RecursionError:
        raise RowError("line", "is not JSON that can be read: nested too deeply") from None
    if not isinstance(record, dict):
        raise ValueError("must be an object with fields such as image and instructions")
    return record


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of its fields. RowError where one is given twice."""
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        raise RowError("fields", f"has {next(name for name in names if names.count(name) > 1)} twice: give it once")
    return record


def csv_rows(path: Path) -> tuple[list[str], Iterator[tuple[int, Read]]]:
    """Read a CSV: the names of its columns, and each row by the line that it ends on. A cell may be of any length.

    ValueError where there is no header, or one that names a column twice.
    """
    body = csv_body(path)
    _, columns = next(body, (0, []))
    if isinstance(columns, str):
        raise ValueError(f"is no CSV file: {columns}")
    columns = [name.strip() for name in columns]
    if not columns:
        raise ValueError("holds no session: give data with at least one")
    if twice := [name for name in columns if name.strip() and columns.count(name) > 1]:
        raise ValueError(f"has column {twice[0]} twice: give it once")
    return columns, ((line, partial(_name_cells, cells, columns)) for line, cells in body)


def csv_body(path: Path) -> Iterator[tuple[int, list[str] | str]]:
    """Read the cells of each row, the header too, by the line that it ends on; a text is what is wrong with it."""
    csv.field_size_limit(2**31 - 1)
    with _open(path) as file, io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="") as text:
        rows = csv.reader(text, strict=True)  # else a quote that is not closed takes in all rows after it
        while True:
            try:
                cells = next(rows, None)
            except csv.Error as error:
                yield rows.line_num, f"is no CSV: {error}"
                continue
            except CUT as error:
                yield rows.line_num + 1, f"the file breaks off: {error}"
                return
            if cells is None:
                return
            if cells:
                yield rows.line_num, cells


def _name_cells(cells: list[str] | str, columns: list[str]) -> dict[str, str]:
    """Name the cells of a row, empty ones left out. RowError where the row cannot be read."""
    if isinstance(cells, str):
        raise RowError("line", cells)
    if not is_text("".join(cells)):
        raise RowError("line", "is not text in UTF-8")
    if any(cells[len(columns) :]):
        raise RowError("line", f"has {len(cells)} cells: must have {len(columns)}, one for each column")
    return {column: cell for column, cell in zip(columns, cells, strict=False) if cell.strip()}


def is_text(cells: str) -> bool:
    """Say whether all bytes of a CSV's cells were UTF-8: those that are not were kept as halves of characters."""
    return cells.isascii() or not any(0xDC80 <= ord(letter) < 0xDD00 for letter in cells)


def find_unused(names: Iterable[str], what: str, known: Iterable[str] = ()) -> tuple[str, ...]:
    """List the fields that mean nothing here. ValueError where one looks like a misspelt field that is not there."""
    given = set(names)
    absent, unknown = [field for field in FIELDS if field not in given], sorted(given - set(FIELDS) - set(known))
    for name in unknown:
        if near := difflib.get_close_matches(name, absent, n=1, cutoff=0.85):
            raise ValueError(f"{name} is no {what}: did you mean {near[0]}?")
    return tuple(unknown)
