"""What the program says when something is wrong: one line on stderr, of what is wrong and the remedy."""

import difflib
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

FIRST_S = 10.0  # that other ranks leave to the first, which has most likely the same to say


def fail(message: object) -> NoReturn:
    """Say what is wrong in one line on stderr, and exit with code 2; of several ranks the first says it.

    torchrun ends the other ranks once the first has ended. One that is still there then is alone with its fault.
    """
    line = printable(" ".join(str(message).split()))
    rank, world_size = map(os.environ.get, ("RANK", "WORLD_SIZE"))
    if rank and world_size and rank.isdecimal() and world_size.isdecimal() and 0 < int(rank) < int(world_size):
        line = f"rank {rank}: {line}"
        write_error_file(line)
        signal.signal(signal.SIGTERM, lambda *_: os._exit(2))
        time.sleep(FIRST_S)
    write_error_file(line)
    print(f"mteditflow: {line}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def printable(text: str) -> str:
    """Write what a terminal would act on, or not show, as Python writes it: names and texts come from anywhere."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def write_error_file(line: str) -> None:
    """Write the file from which torchrun shows why a rank ended; without torchrun, nothing."""
    if name := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"py_callstack": line, "timestamp": str(int(time.time()))}
        Path(name).write_text(json.dumps({"message": {"message": line, "extraInfo": extra}}))


def suggest(word: str, known: Sequence[str]) -> str:
    """Return the remedy for a word that is not known: the nearest one, or all of them."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"


def first_line(error: BaseException) -> str:
    """The first line of an error's text that says something, without its last stop; its type where none does."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(":.") if lines else type(error).__name__
