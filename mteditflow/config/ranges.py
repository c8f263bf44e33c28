"""What the fields of a section may be: a range beside every number, and one form of error, field, value and remedy."""

import reprlib
import unicodedata
from dataclasses import dataclass, fields
from typing import Annotated, Any, get_type_hints


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`; `is_above`: without `low` itself; `step`: only multiples of it."""

    low: float
    high: float
    is_above: bool = False
    step: int = 0
    hint: str = ""

    def __contains__(self, value: float) -> bool:  # NaN is in no range
        is_high_enough = self.low < value if self.is_above else self.low <= value
        return is_high_enough and value <= self.high and (not self.step or value % self.step == 0)

    def __str__(self) -> str:
        multiple = f" and be a multiple of {self.step}" if self.step else ""
        return f"must lie in {'(' if self.is_above else '['}{self.low}, {self.high}]{multiple}{self.hint}"


Share = Annotated[float, Range(0, 1)]
Weight = Annotated[float, Range(0, 1000)]
PIXELS = Range(16, 8192, step=16)
Pixels = Annotated[int, PIXELS]
Count = Annotated[int, Range(1, 1_000_000)]
CountOrNone = Annotated[int, Range(0, 1_000_000)]
Turns = Annotated[int, Range(1, 10)]
Seed = Annotated[int, Range(0, 2**31 - 1)]
Rate = Annotated[float, Range(0, 1, is_above=True)]


def show(value: object) -> str:
    """Write a value as it stands in an error, of bounded length."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 300
    short.maxlist = short.maxtuple = short.maxdict = 20
    return short.repr(value)


def require(is_right: bool, name: str, value: object, remedy: str) -> None:
    """Raise ValueError in one line, of the field, its value and the remedy, unless `is_right`."""
    if not is_right:
        raise ValueError(f"{name} is {show(value)}: {remedy}")


def ranges(section_class: type) -> dict[str, Range]:
    """Return the range of each number of a section, by the field's name."""
    hints: dict[str, Any] = get_type_hints(section_class, include_extras=True)
    found = {field.name: getattr(hints[field.name], "__metadata__", ()) for field in fields(section_class)}
    return {name: metadata[0] for name, metadata in found.items() if metadata}


def is_text(value: str) -> bool:
    """Whether a text can be printed, written as UTF-8 and be a path: no control characters, no halves of a character,
    and more than blanks where it is anything.
    """
    is_seen = value == "" or value.strip() != ""
    return is_seen and not any(unicodedata.category(sign) in ("Cc", "Cs") for sign in value)


def check_ranges(section: object) -> None:
    """Raise ValueError where a number of a section lies outside its range, or a text is none."""
    section_name = type(section).__name__.removesuffix("Config").lower()
    for field in fields(section):  # pyright: ignore[reportArgumentType]
        value = getattr(section, field.name)
        for text in value if isinstance(value, tuple) else (value,):
            is_right = not isinstance(text, str) or is_text(text)
            remedy = "must be a text without control characters, not of blanks alone"
            require(is_right, f"{section_name}.{field.name}", text, remedy)
    for name, allowed in ranges(type(section)).items():
        value = getattr(section, name)
        require(value in allowed, f"{section_name}.{name}", value, str(allowed))
