"""`python -m mteditflow.data check FILE`: what a user's data hold, and everything that is wrong with them.

Unlike a run, it reads every image.
"""

from collections import Counter

from rich.console import Console
from rich.table import Table

from mteditflow.data.formats import read_sessions
from mteditflow.data.images import read_picture
from mteditflow.data.sessions import MAX_BAD_SHARE, Fault, Sessions

MAX_PLACES = 20  # faults of a kind that are listed
ASPECTS = {"1:1": 1, "5:4": 5 / 4, "4:3": 4 / 3, "3:2": 3 / 2, "16:9": 16 / 9, "2:1": 2.0}  # and on end


def check(path: str, *, num_turns: int, max_bad_share: float = MAX_BAD_SHARE) -> int:
    """Print the tables. 0, or 1 where more than `max_bad_share` is damaged or no session has `num_turns`.

    ValueError, one line, where the data as a whole cannot be read.
    """
    if num_turns < 1:
        raise ValueError(f"--num_turns is {num_turns}: must be at least 1")
    if not 0 <= max_bad_share <= 1:
        raise ValueError(f"--max_bad_share is {max_bad_share}: must lie in [0, 1]")
    try:
        sessions = read_sessions(path)
    except ValueError as error:
        raise ValueError(f"{path!r}: {error}") from None
    sizes, damaged = read_images(sessions)
    faults = [*sessions.faults, *damaged]
    bad_share = len(faults) / sessions.total
    console = Console(width=None if Console().is_terminal else 120)
    bad = {fault.place for fault in damaged}
    good = Sessions(found=[it for it in sessions.found if it.place not in bad], faults=faults, unused=sessions.unused)
    num_usable = sum(len(it.instructions) >= num_turns for it in good.found)
    for table in tables(good, sizes, num_turns):
        console.print(table)
    for line in fault_lines(faults):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if good.unused:
        console.print(f"fields that are not used: {', '.join(good.unused)}", markup=False, highlight=False)
    is_right = bad_share <= max_bad_share and num_usable > 0
    verdict = "fit for" if is_right else "not fit for"
    console.print(
        f"{verdict} data.num_turns {num_turns}: {num_usable} of {sessions.total} sessions usable, "
        f"{len(faults)} damaged ({100 * bad_share:.1f} %, at most {100 * max_bad_share:.1f} %)",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    return 0 if is_right else 1


def read_images(sessions: Sessions) -> tuple[list[tuple[int, int]], list[Fault]]:
    """Width and height of every image, each counted once, and a fault for every session whose image is damaged."""
    known: dict[str, tuple[int, int] | str] = {}
    faults = []
    for session in sessions.found:
        if session.image not in known:
            try:
                known[session.image] = read_picture(session.read()).size
            except ValueError as error:
                known[session.image] = str(error)
        found = known[session.image]
        if isinstance(found, str):
            faults.append(Fault(place=session.place, kind="image", text=f"{session.image}: {found}"))
    return [size for size in known.values() if not isinstance(size, str)], faults


def tables(sessions: Sessions, sizes: list[tuple[int, int]], num_turns: int) -> list[Table]:
    """Sessions by number of turns, instructions by edit type, images by shape."""
    turns = Table(title="sessions")
    for column in ("turns", "sessions", "use"):
        turns.add_column(column, justify="left" if column == "use" else "right")
    for length, count in sorted(Counter(len(it.instructions) for it in sessions.found).items()):
        use = "too short" if length < num_turns else "whole" if length == num_turns else f"cut to {num_turns}"
        turns.add_row(str(length), str(count), use)
    types = Table(title="instructions")
    for column in ("edit type", "count", "with untouched objects"):
        types.add_column(column, justify="left" if column == "edit type" else "right")
    counts, known = Counter[str](), Counter[str]()
    for it in sessions.found:
        counts.update(it.edit_types)
        known.update(it.edit_types if it.untouched else ())
    for name, count in sorted(counts.items()):
        types.add_row(name, str(count), str(known[name]))
    shapes = Table(title="images")
    for column in ("nearest aspect", "images", "smallest", "largest"):
        shapes.add_column(column, justify="left" if column == "nearest aspect" else "right")
    by_aspect: dict[str, list[tuple[int, int]]] = {}
    for size in sizes:
        by_aspect.setdefault(nearest_aspect(*size), []).append(size)
    for name, own in sorted(by_aspect.items(), key=lambda item: -len(item[1])):
        own = sorted(own, key=lambda size: size[0] * size[1])
        shapes.add_row(name, str(len(own)), *("{}x{}".format(*size) for size in (own[0], own[-1])))
    return [turns, types, shapes]


def nearest_aspect(width: int, height: int) -> str:
    """The common shape nearest to width : height, by ratio."""
    ratio = max(width, height) / min(width, height)
    name = min(ASPECTS, key=lambda it: max(ratio / ASPECTS[it], ASPECTS[it] / ratio))
    return name if width >= height else ":".join(reversed(name.split(":")))


def fault_lines(faults: list[Fault]) -> list[str]:
    """Faults by kind, each with its place."""
    titles = {"line": "lines that cannot be read", "fields": "wrong fields", "image": "missing or damaged images"}
    lines = []
    for kind, title in titles.items():
        own = [fault for fault in faults if fault.kind == kind]
        if own:
            lines.append(f"{title}: {len(own)}")
            lines += [f"  {fault.place}: {fault.text}" for fault in own[:MAX_PLACES]]
            lines += [f"  and {len(own) - MAX_PLACES} more"] if len(own) > MAX_PLACES else []
    return lines
