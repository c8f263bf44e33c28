"""What the fields of a section may be: a range beside every number, and one form of error, field, value and remedy."""

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


def require(is_right: bool, name: str, value: object, remedy: str) -> None:
    """Raise ValueError in one line, of the field, its value and the remedy, unless `is_right`."""
    if not is_right:
        raise ValueError(f"{name} is {value!r}: {remedy}")


def ranges(section_class: type) -> dict[str, Range]:
    """Return the range of each number of a section, by the field's name."""
    hints: dict[str, Any] = get_type_hints(section_class, include_extras=True)
    found = {field.name: getattr(hints[field.name], "__metadata__", ()) for field in fields(section_class)}
    return {name: metadata[0] for name, metadata in found.items() if metadata}


def check_ranges(section: object) -> None:
    """Raise ValueError where a number of a section lies outside its range."""
    section_name = type(section).__name__.removesuffix("Config").lower()
    for name, allowed in ranges(type(section)).items():
        value = getattr(section, name)
        require(value in allowed, f"{section_name}.{name}", value, str(allowed))
