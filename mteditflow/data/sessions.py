"""A user's editing session as data: an image somewhere, K instructions, and what is known of them.

    {"image": "dog.jpg", "instructions": ["Remove the ball", "Change the background to a beach"]}
    {"image": "dog.jpg", "prompt": "Remove the ball"}                                              K = 1

Optional: `edit_types` (K texts), `untouched_objects` (K lists of what no instruction so far touches), `objects` (all of
the image). An object is a name or {"name": ..., "box": [left, top, right, bottom]}, the box in shares of the image's
width and height as it is shown; an untouched object that is a name takes its box from the one in `objects` of that
name. Every reader of a format makes such a record; what is wrong with one is a Fault, not the end of the run.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from mteditflow.data.images import read_picture, read_size
from mteditflow.types import Box, Region

FIELDS = ("image", "instructions", "prompt", "edit_types", "objects", "untouched_objects")
MAX_BAD_SHARE = 0.05  # of the sessions, with an unreadable line or image, above which a run stops
UNSPECIFIED = "unspecified"  # the edit type of an instruction that names none
Picture = Path | Callable[[], Path | bytes]
"""A file, or what reads the picture inside a table."""


@dataclass(frozen=True, kw_only=True)
class UserSession:
    """A session of K instructions whose image is not read yet."""

    place: str  # where it stands, such as sessions.jsonl:12
    image: str  # as the data name it; sessions with one name share an image
    picture: Picture
    instructions: tuple[str, ...]
    edit_types: tuple[str, ...]
    objects: tuple[Region, ...]  # of the source, or () where unknown
    untouched: tuple[tuple[Region, ...], ...]  # K, or () where unknown

    @property
    def file(self) -> Path | None:
        """The image's file; None where the image is inside a table."""
        return self.picture if isinstance(self.picture, Path) else None

    @property
    def key(self) -> str:
        """What the session is, wherever the data lie and in whatever order."""
        return digest("\n".join([self.image, *self.instructions]))

    def read(self) -> Image.Image:
        """Read the image, as `read_picture` does. ValueError in one line where it cannot be read."""
        return read_picture(self.picture if isinstance(self.picture, Path) else self.picture())

    def read_size(self) -> tuple[int, int]:
        """Read the image's width and height, from its header. ValueError as `read`."""
        return read_size(self.picture if isinstance(self.picture, Path) else self.picture())


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Why something in the data is skipped."""

    place: str
    kind: Literal["line", "fields", "image"]
    text: str


@dataclass(frozen=True, kw_only=True)
class Sessions:
    """What a file, folder or data set holds. `unused`: names of fields that are there and mean nothing here."""

    found: list[UserSession]
    faults: list[Fault]
    unused: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """Sessions and faults."""
        return len(self.found) + len(self.faults)

    def is_too_damaged(self, num_bad: int, max_bad_share: float) -> bool:
        """Say whether `num_bad` of the sessions are more than `max_bad_share`."""
        return num_bad / self.total > max_bad_share


def digest(text: str) -> str:
    """Hash a text, to the same in every process and release."""
    return hashlib.sha256(text.encode()).hexdigest()


def make_session(place: str, record: Mapping[str, Any], image: str, picture: Picture) -> UserSession:
    """Make a session of the fields of a record. ValueError: which field is wrong, and what it should be."""
    fields = {name: value for name, value in record.items() if value is not None}
    if ("instructions" in fields) == ("prompt" in fields):
        raise ValueError("must have either instructions, a list of texts, or prompt, a text")
    if "prompt" in fields:
        instructions = _texts([fields["prompt"]], "prompt must be a text")
    else:
        instructions = _texts(fields["instructions"], "instructions must be a list of texts, none of them empty")
    num_turns = len(instructions)
    edit_types = fields.get("edit_types", [UNSPECIFIED] * num_turns)
    edit_types = _texts(edit_types, "edit_types must be a list of texts, none of them empty")
    if len(edit_types) != num_turns:
        raise ValueError(f"edit_types has {len(edit_types)}: must have {num_turns}, one for each instruction")
    objects = tuple(_region(value, "objects") for value in _list(fields.get("objects", []), "objects"))
    turns = _list(fields.get("untouched_objects", []), "untouched_objects")
    is_one_each = len(turns) == num_turns and all(isinstance(turn, list) for turn in turns)
    if "untouched_objects" in fields and not is_one_each:
        raise ValueError(f"untouched_objects must be {num_turns} lists, one for each instruction")
    untouched = tuple(tuple(_region(value, "untouched_objects", objects) for value in turn) for turn in turns)
    return UserSession(
        place=place, image=image, picture=picture, instructions=instructions, edit_types=edit_types, objects=objects,
        untouched=untouched,
    )  # fmt: skip


def image_name(record: Mapping[str, Any], names: tuple[str, ...] = ("image",)) -> str:
    """Take the image that a record names. ValueError where it names none."""
    found = [record[name] for name in names if record.get(name) is not None]
    if not found or not isinstance(found[0], str) or not found[0].strip():
        raise ValueError(f"must have {names[0]}, the path of a picture")
    return found[0]


def _texts(value: Any, message: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(text, str) and text.strip() for text in value):
        raise ValueError(message)
    return tuple(" ".join(text.split()) for text in value)


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{name} must be a list")
    return value


def _region(value: Any, name: str, known: tuple[Region, ...] = ()) -> Region:
    """Make an object of a name, or of a name and a box; without a box it takes that of the known one of its name."""
    fields = {"name": value} if isinstance(value, str) else value
    if not isinstance(fields, Mapping) or not isinstance(fields.get("name"), str) or not fields["name"].strip():
        raise ValueError(f'{name} has {value!r}: an object is a name, or {{"name": ..., "box": [...]}}')
    if fields.get("box") is not None:
        return Region(name=fields["name"], box=_box(fields["box"], name))
    same = [region for region in known if region.name == fields["name"]]
    return same[0] if len(same) == 1 else Region(name=fields["name"])


def _box(value: Any, name: str) -> Box:
    is_four = isinstance(value, list) and len(value) == 4 and all(isinstance(side, int | float) for side in value)
    if not is_four or not (0 <= value[0] < value[2] <= 1 and 0 <= value[1] < value[3] <= 1):
        raise ValueError(
            f"{name} has box {value!r}: must be [left, top, right, bottom] in shares of width and height, from 0 to 1"
        )
    left, top, right, bottom = map(float, value)
    return (left, top, right, bottom)
