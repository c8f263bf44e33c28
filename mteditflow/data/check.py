"""`python -m mteditflow.data check FILE`: what a user's data hold, and everything that is wrong with them.

Unlike a run, it reads every image.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from rich.console import Console
from rich.progress import track
from rich.table import Column, Table
from rich.text import Text

from mteditflow.config import DataConfig, ModelConfig
from mteditflow.config.errors import printable
from mteditflow.config.ranges import require
from mteditflow.data import cut_lines
from mteditflow.data.formats import read_sessions
from mteditflow.data.sessions import MAX_BAD_SHARE, Fault, Sessions
from mteditflow.data.userdata import see

MAX_PLACES = 20  # faults of a kind, or files that are no data, that are listed
FAULTS = {
    "line": "lines that cannot be read", "fields": "wrong fields", "image": "missing or damaged images",
    "path": "pictures outside of the data's folder",
}  # fmt: skip
ASPECTS = {"1:1": 1, "5:4": 5 / 4, "4:3": 4 / 3, "3:2": 3 / 2, "16:9": 16 / 9, "2:1": 2.0}  # and on end


def check(
    path: str, num_turns: int, allowed_folder: str = "", *, max_bad_share: float | None = None,
    count_tokens: Callable[[str], int] | None = None, max_text_tokens: int = 0,
) -> int:  # fmt: skip
    """Print the tables; returns 1 where more than `max_bad_share` (None: what a run allows) is damaged, or no session
    has `num_turns`, else 0. count_tokens: of an instruction, by an editor's text encoder; None: none are counted.

    ValueError, one line, where the data as a whole cannot be read.
    """
    require(num_turns >= 1, "--num_turns", num_turns, "must be at least 1")
    max_bad_share = MAX_BAD_SHARE if max_bad_share is None else max_bad_share
    require(0 <= max_bad_share <= 1, "--max_bad_share", max_bad_share, "must lie in [0, 1]")
    try:
        sessions = read_sessions(path, allowed_folder)
    except ValueError as error:
        raise ValueError(f"{path!r}: {error}") from None
    sizes, damaged = read_images(sessions)
    faults, bad = [*sessions.faults, *damaged], {fault.place for fault in damaged}
    good = Sessions(found=[session for session in sessions.found if session.place not in bad], faults=faults)
    usable = [session for session in good.found if len(session.instructions) >= num_turns]
    num_usable, texts = len(usable), {text for session in usable for text in session.instructions[:num_turns]}
    cut = cut_lines(texts, count_tokens, max_text_tokens) if count_tokens else []
    console = Console(width=None if Console().is_terminal else 120)
    for table in tables(good, sizes, num_turns):
        console.print(table)
    for line in [*fault_lines(faults), *cut, *passed_lines(sessions)]:
        console.print(printable(line), markup=False, highlight=False, soft_wrap=True)
    is_fit = num_usable > 0 and not good.is_too_damaged(len(faults), max_bad_share)
    console.print(
        f"{'fit for' if is_fit else 'not fit for'} data.num_turns {num_turns}: {num_usable} of {good.total} sessions "
        f"usable, {len(faults)} damaged ({100 * len(faults) / good.total:.1f} %, at most {100 * max_bad_share:.1f} %)",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    return 0 if is_fit else 1


def passed_lines(sessions: Sessions) -> list[str]:
    """Name what is there and not used: fields, and files."""
    fields = [f"fields that are not used: {', '.join(sessions.unused)}"] if sessions.unused else []
    files, more = sessions.passed_over[:MAX_PLACES], len(sessions.passed_over) - MAX_PLACES
    ending = f", and {more} more" if more > 0 else ""
    return [*fields, f"files that are no data: {', '.join(files)}{ending}"] if files else fields


def read_images(sessions: Sessions) -> tuple[list[tuple[int, int]], list[Fault]]:
    """Read every image once, as a run does: width and height of each, and a fault for every session whose image is
    damaged.
    """
    known: dict[str, tuple[int, int] | str] = {}
    faults, model, console = [], ModelConfig(), Console(stderr=True)  # damage shows at any size
    shown = track(sessions.found, "reading images", console=console, transient=True, disable=not console.is_terminal)
    for session in shown:
        for name, read in session.readers:
            if name not in known:
                try:
                    known[name] = see(read, DataConfig().fit, [(model.height, model.width)]).size
                except ValueError as error:
                    known[name] = str(error)
        damaged = [(name, known[name]) for name, _ in session.readers if isinstance(known[name], str)]
        faults += [Fault(place=session.place, kind="image", text=f"{name}: {text}") for name, text in damaged[:1]]
    return [size for size in known.values() if not isinstance(size, str)], faults


def tables(sessions: Sessions, sizes: list[tuple[int, int]], num_turns: int) -> list[Table]:
    """Count sessions by number of turns, instructions by edit type, images by shape."""
    lengths = Counter(len(session.instructions) for session in sessions.found)
    types, with_untouched = Counter[str](), Counter[str]()
    for session in sessions.found:
        types.update(session.edit_types)
        compared = zip(session.edit_types, session.untouched, strict=False)  # as many, or none are known
        with_untouched.update(name for name, regions in compared if any(region.box for region in regions))
    by_aspect: dict[str, list[tuple[int, int]]] = {}
    for size in sizes:
        by_aspect.setdefault(nearest_aspect(*size), []).append(size)

    def use(length: int) -> str:
        return "too short" if length < num_turns else "whole" if length == num_turns else f"cut to {num_turns}"

    def span(found: list[tuple[int, int]]) -> tuple[str, ...]:
        ordered = sorted(found, key=lambda size: size[0] * size[1])
        return tuple("{}x{}".format(*size) for size in (ordered[0], ordered[-1]))

    turns = [(length, count, use(length)) for length, count in sorted(lengths.items())]
    edits = [(name, count, with_untouched[name]) for name, count in sorted(types.items())]
    most_first = sorted(by_aspect.items(), key=lambda item: -len(item[1]))
    shapes = [(name, len(found), *span(found)) for name, found in most_first]
    return [
        _table("sessions", ("turns", "sessions", "use"), turns, text="use"),
        _table("instructions", ("edit type", "count", "with boxes of untouched objects"), edits, text="edit type"),
        _table("images", ("nearest aspect", "images", "smallest", "largest"), shapes, text="nearest aspect"),
    ]


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, text: str) -> Table:
    """Make a table of numbers, but for the column `text`."""
    table = Table(*(Column(name, justify="left" if name == text else "right") for name in columns), title=title)
    for row in rows:
        table.add_row(*(Text(printable(str(cell))) for cell in row))
    return table


def nearest_aspect(width: int, height: int) -> str:
    """Name the common shape nearest to width : height, by ratio."""
    ratio = max(width, height) / min(width, height)
    name = min(ASPECTS, key=lambda name: max(ratio / ASPECTS[name], ASPECTS[name] / ratio))
    return name if width >= height else ":".join(reversed(name.split(":")))


def fault_lines(faults: list[Fault]) -> list[str]:
    """List the faults by kind, with their places."""
    lines = []
    for kind, title in FAULTS.items():
        found = [f"  {fault.place}: {fault.text}" for fault in faults if fault.kind == kind]
        if found:
            lines += [f"{title}: {len(found)}", *found[:MAX_PLACES]]
        if len(found) > MAX_PLACES:
            lines.append(f"  and {len(found) - MAX_PLACES} more")
    return lines
