"""A user's editing session as data: an image somewhere, K instructions, and what is known of them.

    {"image": "dog.jpg", "instructions": ["Remove the ball", "Change the background to a beach"]}
    {"image": "dog.jpg", "prompt": "Remove the ball"}                                              K = 1

Optional: `edit_types` (K texts), `untouched_objects` (K lists of what no instruction so far touches), `objects` (all of
the image). An object is a name or {"name": ..., "box": [left, top, right, bottom]}, the box in shares of the image's
width and height as it is shown; an untouched object that is a name takes its box from the one in `objects` of that
name. Every reader of a format makes such a record; what is wrong with one is a Fault, not the end of the run.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mteditflow.types import Region

FIELDS = ("image", "instructions", "prompt", "edit_types", "objects", "untouched_objects")
MAX_BAD_SHARE = 0.05  # of the sessions, with an unreadable line or image, above which a run stops
UNSPECIFIED = "unspecified"  # the edit type of an instruction that names none


@dataclass(frozen=True, kw_only=True)
class UserSession:
    """A session of K instructions whose image is not read yet."""

    place: str  # where it stands, such as sessions.jsonl:12
    image: str  # as the data name it; sessions with one name share an image
    file: Path | None  # None: the image is inside a table
    read: Callable[[], Path | bytes]
    instructions: tuple[str, ...]
    edit_types: tuple[str, ...]
    objects: tuple[Region, ...]  # of the source, or () where unknown
    untouched: tuple[tuple[Region, ...], ...]  # K, or () where unknown

    @property
    def key(self) -> str:
        """What the session is, wherever the data lie and in whatever order."""
        return digest("\n".join([self.image, *self.instructions]))


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


def digest(text: str) -> str:
    """A hash that is the same in every process and release."""
    return hashlib.sha256(text.encode()).hexdigest()


def from_record(
    record: Mapping[str, Any], place: str, image: str, file: Path | None, read: Callable[[], Path | bytes]
) -> UserSession:
    """A session from the fields of one record. ValueError: which field is wrong, and what it should be."""
    fields = {name: value for name, value in record.items() if value is not None}
    if ("instructions" in fields) == ("prompt" in fields):
        raise ValueError("must have either instructions, a list of texts, or prompt, a text")
    instructions = [fields["prompt"]] if "prompt" in fields else fields["instructions"]
    instructions = _texts(instructions, "prompt" if "prompt" in fields else "instructions")
    edit_types = _texts(fields.get("edit_types", [UNSPECIFIED] * len(instructions)), "edit_types")
    if len(edit_types) != len(instructions):
        raise ValueError(f"edit_types has {len(edit_types)}: must have {len(instructions)}, one for each instruction")
    objects = tuple(_region(it, "objects") for it in _list(fields.get("objects", []), "objects"))
    return UserSession(
        place=place, image=image, file=file, read=read, instructions=instructions, edit_types=edit_types,
        objects=objects, untouched=_untouched(fields, objects, len(instructions)),
    )  # fmt: skip


def image_name(record: Mapping[str, Any], names: tuple[str, ...] = ("image",)) -> str:
    """The image that a record names. ValueError where it names none."""
    found = [record[name] for name in names if record.get(name) is not None]
    if not found or not isinstance(found[0], str) or not found[0].strip():
        raise ValueError(f"must have {names[0]}, the path of a picture")
    return found[0]


def _texts(value: Any, name: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(it, str) and it.strip() for it in value):
        kind = "a text" if name == "prompt" else "a list of texts"
        raise ValueError(f"{name} must be {kind}, none of them empty" if kind != "a text" else f"{name} must be {kind}")
    return tuple(" ".join(it.split()) for it in value)


def _untouched(fields: Mapping[str, Any], known: Sequence[Region], num_turns: int) -> tuple[tuple[Region, ...], ...]:
    if "untouched_objects" not in fields:
        return ()
    turns = _list(fields["untouched_objects"], "untouched_objects")
    if len(turns) != num_turns or not all(isinstance(turn, list) for turn in turns):
        raise ValueError(f"untouched_objects must be {num_turns} lists, one for each instruction")
    return tuple(tuple(_located(_region(it, "untouched_objects"), known) for it in turn) for turn in turns)


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{name} must be a list")
    return value


def _region(value: Any, name: str) -> Region:
    """An object: a name, or its name and box."""
    if isinstance(value, str) and value.strip():
        return Region(name=value)
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str) or not value["name"].strip():
        raise ValueError(f'{name} has {value!r}: an object is a name, or {{"name": ..., "box": [...]}}')
    box = value.get("box")
    if box is None:
        return Region(name=value["name"])
    is_four = isinstance(box, list) and len(box) == 4 and all(isinstance(side, int | float) for side in box)
    if not is_four or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
        raise ValueError(
            f"{name} has box {box!r}: must be [left, top, right, bottom] in shares of width and height, from 0 to 1"
        )
    left, top, right, bottom = map(float, box)
    return Region(name=value["name"], box=(left, top, right, bottom))


def _located(region: Region, known: Sequence[Region]) -> Region:
    """A region without a box takes that of the one known object of its name."""
    same = [it for it in known if it.name == region.name]
    return same[0] if region.box is None and len(same) == 1 else region
