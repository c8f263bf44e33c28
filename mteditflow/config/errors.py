"""What the program says when something is wrong: one line on stderr, of what is wrong and the remedy."""

import difflib
import sys
from collections.abc import Sequence
from typing import NoReturn


def fail(message: object) -> NoReturn:
    """Say what is wrong in one line on stderr, and exit with code 2."""
    print(f"mteditflow: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


def suggest(word: str, known: Sequence[str]) -> str:
    """Return the remedy for a word that is not known: the nearest one, or all of them."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"


def first_line(error: Exception) -> str:
    """The first line of an error's text that says something, without its last stop; its type where none does."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(":.") if lines else type(error).__name__
