"""A user's editing session as data: an image somewhere, K instructions, and what is known of them.

    {"image": "dog.jpg", "instructions": ["Remove the ball", "Change the background to a beach"]}
    {"image": "dog.jpg", "prompt": "Remove the ball"}                                              K = 1
    {"images": ["dog.jpg", "hat.png"], "prompt": "Put the hat of image 2 on the dog"}

Of `images` the first is edited, and the others are references, which every turn is given as they are.

Optional: `edit_types` (K texts), `untouched_objects` (K lists of what no instruction so far touches), `objects` (all of
the image). An object is a name or {"name": ..., "box": [left, top, right, bottom]}, the box in shares of the image's
width and height as it is shown; an untouched object that is a name takes its box from the one in `objects` of that
name. Every reader of a format makes such a record; what is wrong with one is a Fault, not the end of the run.
"""

import hashlib
import os
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from PIL import Image

from mteditflow.data.images import read_picture, read_size
from mteditflow.types import Box, Region

FIELDS = ("image", "images", "instructions", "prompt", "edit_types", "objects", "untouched_objects")
MAX_BAD_SHARE = 0.05  # of the sessions, with an unreadable line or image, above which a run stops
MAX_LETTERS = 10_000  # of an instruction or a name: more is a file in the wrong cell
SHOWN_LETTERS = 80  # of a value in a message
UNSPECIFIED = "unspecified"  # the edit type of an instruction that names none
Picture = Path | Callable[[], Path | bytes]
"""A file, or what reads the picture inside a table."""
R = TypeVar("R")
Kind = Literal["line", "fields", "image", "path"]
Reference = tuple[str, Path]
"""Name and file of an image that every turn is given beside the one that is edited."""
Located = tuple[str, Picture, *tuple[Reference, ...]]
"""An image's name, the image, and its references."""
Entry = tuple[Mapping[str, Any], Callable[[], Located]]
"""A record, and what finds its image. ValueError where it is not there."""


class RowError(ValueError):
    """What is wrong with a row, of a kind other than `fields`."""

    def __init__(self, kind: Kind, text: str) -> None:
        super().__init__(text)
        self.kind: Kind = kind


@dataclass(frozen=True, kw_only=True)
class Folder:
    """Where the pictures of a data file are: their paths start from `root`, and do not leave `allowed`; both absolute,
    without links.
    """

    root: Path
    allowed: Path

    def find(self, name: str) -> Reference:
        """Find the picture that a row names: its name, which is one however it is spelt, and its file, as `file`."""
        file = self.file(name)
        return unicodedata.normalize("NFC", Path(os.path.relpath(file, self.root)).as_posix()), file

    def file(self, name: str) -> Path:
        """Find a picture's file. RowError where it is not there, or leaves the folder, by `..`, from the root of the
        machine, or by a link.
        """
        if "://" in name:
            raise RowError("image", f"{shorten(name)} is an address: download the picture, and name its file")
        file = Path(os.path.realpath(self.root / name))
        if not file.is_relative_to(self.allowed):
            raise RowError(
                "path", f"{shorten(name)} is outside of {self.allowed}: move it there, or set data.allowed_folder"
            )
        if not os.path.isfile(file):  # False, too, of a name that is too long
            raise RowError("image", f"no such file: {shorten(str(file), 200)}")
        return file


@dataclass(frozen=True, kw_only=True)
class UserSession:
    """A session of K instructions whose image is not read yet."""

    place: str  # where it stands, such as sessions.jsonl:12
    image: str  # its path from the data file, or its row; sessions with one name share an image
    picture: Picture
    instructions: tuple[str, ...]
    edit_types: tuple[str, ...]
    objects: tuple[Region, ...]  # of the source, or () where unknown
    untouched: tuple[tuple[Region, ...], ...]  # K, or () where unknown
    references: tuple[Reference, ...] = ()

    @property
    def file(self) -> Path | None:
        """The image's file; None where the image is inside a table."""
        return self.picture if isinstance(self.picture, Path) else None

    @property
    def key(self) -> str:
        """What the session is, wherever the data lie and in whatever order."""
        return digest("\n".join([self.image, *(name for name, _ in self.references), *self.instructions]))

    def read(self) -> Image.Image:
        """Read the image, as `read_picture` does. ValueError in one line where it cannot be read."""
        return read_picture(self.picture if isinstance(self.picture, Path) else self.picture())

    @property
    def readers(self) -> list[tuple[str, Callable[[], Image.Image]]]:
        """Names of the image and its references, and what reads each as `read`."""
        return [(self.image, self.read), *((name, partial(read_picture, file)) for name, file in self.references)]

    def read_size(self) -> tuple[int, int]:
        """Read the image's width and height, from its header. ValueError as `read`."""
        return read_size(self.picture if isinstance(self.picture, Path) else self.picture())


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Why something in the data is skipped."""

    place: str
    kind: Kind
    text: str


@dataclass(frozen=True, kw_only=True)
class Sessions:
    """What a file, folder or data set holds. `unused`: names of fields that are there and mean nothing here;
    `passed_over`: files that are no data.
    """

    found: list[UserSession]
    faults: list[Fault]
    unused: tuple[str, ...] = ()
    passed_over: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """Sessions and faults."""
        return len(self.found) + len(self.faults)

    def is_too_damaged(self, num_bad: int, max_bad_share: float) -> bool:
        """Say whether `num_bad` of the sessions are more than `max_bad_share`."""
        return num_bad / self.total > max_bad_share


def read_each(rows: Iterable[tuple[str, Callable[[], R]]]) -> tuple[list[tuple[str, R]], list[Fault]]:
    """Read every row, by its place; what is wrong with one is a Fault, and no more than that."""
    found, faults = [], []
    for place, read in rows:
        try:
            found.append((place, read()))
        except (ValueError, RecursionError) as error:
            kind = error.kind if isinstance(error, RowError) else "fields"
            faults.append(Fault(place=place, kind=kind, text=" ".join(str(error).split())))
    return found, faults


def make_sessions(entries: Iterable[tuple[str, Callable[[], Entry]]], faults: Iterable[Fault] = ()) -> Sessions:
    """Make a session of every entry, named by its place. faults: those that are known before."""
    made, more = read_each((place, partial(_make, place, parse)) for place, parse in entries)
    return Sessions(found=[session for _, session in made], faults=[*faults, *more])


def _make(place: str, parse: Callable[[], Entry]) -> UserSession:
    return make_session(place, *parse())


def digest(text: str) -> str:
    """Hash a text, to the same in every process and release."""
    return hashlib.sha256(text.encode()).hexdigest()


def shorten(value: object, length: int = SHOWN_LETTERS) -> str:
    """Write a value in a message, by its beginning where it is long; a text without quotes."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= length else f"{text[:length]}... ({len(text):,} letters)"


def make_session(place: str, record: Mapping[str, Any], locate: Callable[[], Located]) -> UserSession:
    """Make a session of the fields of a record. ValueError: which field is wrong, and what it should be."""
    fields = {name: value for name, value in record.items() if value is not None}
    if ("instructions" in fields) == ("prompt" in fields):
        raise ValueError("must have either instructions, a list of texts, or prompt, a text")
    if "prompt" in fields:
        instructions = _texts([fields["prompt"]], "prompt", "must be a text")
    else:
        instructions = _texts(fields["instructions"], "instructions", "must be a list of texts, none of them empty")
    num_turns = len(instructions)
    edit_types = fields.get("edit_types", [UNSPECIFIED] * num_turns)
    edit_types = _texts(edit_types, "edit_types", "must be a list of texts, none of them empty")
    if len(edit_types) != num_turns:
        raise ValueError(f"edit_types has {len(edit_types)}: must have {num_turns}, one for each instruction")
    objects = tuple(_region(value, "objects") for value in _list(fields.get("objects", []), "objects"))
    turns = _list(fields.get("untouched_objects", []), "untouched_objects")
    is_one_each = len(turns) == num_turns and all(isinstance(turn, list) for turn in turns)
    if "untouched_objects" in fields and not is_one_each:
        raise ValueError(f"untouched_objects must be {num_turns} lists, one for each instruction")
    untouched = tuple(tuple(_region(value, "untouched_objects", objects) for value in turn) for turn in turns)
    image, picture, *references = locate()
    return UserSession(
        place=place, image=image, picture=picture, instructions=instructions, edit_types=edit_types, objects=objects,
        untouched=untouched, references=tuple(references),
    )  # fmt: skip


def image_name(record: Mapping[str, Any], names: tuple[str, ...] = ("image",)) -> str:
    """Take the image that a record names. ValueError where it names none."""
    found = [record[name] for name in names if record.get(name) is not None]
    if not found or not isinstance(found[0], str) or not found[0].strip():
        raise ValueError(f"must have {names[0]}, the path of a picture")
    return check_text(found[0], names[0])


def image_names(record: Mapping[str, Any], names: tuple[str, ...] = ("image",)) -> list[str]:
    """Take the images that a record names: the one that is edited, then its references. ValueError where it names none,
    or in two ways.
    """
    several = record.get("images")
    if several is None:
        return [image_name(record, names)]
    if any(record.get(name) is not None for name in names):
        raise ValueError(f"must have either {names[0]}, or images, a list of paths of which the first is edited")
    if not isinstance(several, list) or not several:
        raise ValueError("images must be a list of paths of pictures, of which the first is edited")
    return [image_name({"images": name}, ("images",)) for name in several]


def find_all(folder: Folder, names: Sequence[str]) -> Located:
    """Find the picture that is edited, and its references. RowError where one is not there."""
    (name, picture), *references = [folder.find(name) for name in names]
    return name, picture, *references


def check_text(text: str, name: str) -> str:
    """Return a text that can be written down. ValueError for halves of characters, zeros, and what is far too long."""
    if any(0xD800 <= ord(letter) < 0xE000 or letter == "\0" for letter in text):
        raise ValueError(f"{name} has {shorten(text)!r}: holds no whole characters (a lone surrogate, or a zero)")
    if len(text) > MAX_LETTERS:
        raise ValueError(f"{name} has {shorten(text)!r}: must have at most {MAX_LETTERS:,} letters")
    return text


def _texts(value: Any, name: str, remedy: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(text, str) and text.strip() for text in value):
        raise ValueError(f"{name} {remedy}")
    return tuple(" ".join(check_text(text, name).split()) for text in value)


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{name} must be a list")
    return value


def _region(value: Any, name: str, known: tuple[Region, ...] = ()) -> Region:
    """Make an object of a name, or of a name and a box; without a box it takes that of the known one of its name."""
    fields = {"name": value} if isinstance(value, str) else value
    if not isinstance(fields, Mapping) or not isinstance(fields.get("name"), str) or not fields["name"].strip():
        raise ValueError(f'{name} has {shorten(value)}: an object is a name, or {{"name": ..., "box": [...]}}')
    called = check_text(fields["name"], name)
    if fields.get("box") is not None:
        return Region(name=called, box=_box(fields["box"], name))
    same = [region for region in known if region.name == called]
    return same[0] if len(same) == 1 else Region(name=called)


def _box(value: Any, name: str) -> Box:
    is_four = isinstance(value, list) and len(value) == 4 and all(type(side) in (int, float) for side in value)
    if not is_four or not (0 <= value[0] < value[2] <= 1 and 0 <= value[1] < value[3] <= 1):
        raise ValueError(
            f"{name} has box {shorten(value)}: must be [left, top, right, bottom] in shares of width and height, "
            "from 0 to 1"
        )
    left, top, right, bottom = map(float, value)
    return (left, top, right, bottom)
