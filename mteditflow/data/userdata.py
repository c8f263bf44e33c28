"""Users' sessions as tasks: who is held out, in which order the others come, what happens to damaged images.

Held out is decided by a hash of the image's name, so that all sessions of an image are on one side, and adding data
moves none of the old ones. The order of an epoch sorts the sessions by a hash of (data.seed, epoch, session): it
depends neither on the order in the file nor on ranks. Slot j of a run, step P j // P, is the j-th session of the
epochs laid end to end; where its image is damaged, the next session of that epoch whose image is not takes the slot.
The slot is the task's id: two tasks of a step have different noise even where they are the same session.
"""

import sys
from functools import cache

from mteditflow.config import Config, DataConfig
from mteditflow.data.formats import read_sessions
from mteditflow.data.images import fitted, in_frame, read_picture
from mteditflow.data.sessions import MAX_BAD_SHARE, Fault, Sessions, UserSession, digest
from mteditflow.types import EditTask

MAX_NAMED = 10  # faults that are printed; `python -m mteditflow.data check` prints them all


@cache
def read_named(name: str, path: str) -> Sessions:
    """The sessions of the field `name`. ValueError: the field, its value, and what is wrong with it."""
    try:
        return read_sessions(path)
    except ValueError as error:
        raise ValueError(f"{name} is {path!r}: {error}") from None


def is_held_out(image: str, share: float) -> bool:
    """Whether an image is among the share that is held out."""
    return int(digest(f"held out {image}")[:13], 16) / 16**13 < share


class Source:
    """The sessions of one file, some of them left out; knows which images have turned out to be damaged."""

    def __init__(self, name: str, path: str, sessions: list[UserSession], everything: Sessions) -> None:
        self.name, self.path, self.sessions = name, path, sessions
        self.num_faults, self.total = len(everything.faults), everything.total
        self._keys = [session.key for session in sessions]
        self._damaged: set[int] = set()
        self._order: tuple[str, list[int]] = ("", [])

    def check(self) -> None:
        """ValueError where too much is damaged."""
        num_bad = self.num_faults + len(self._damaged)
        if num_bad > MAX_BAD_SHARE * self.total:
            raise ValueError(
                f"{self.name} is {self.path!r}: {num_bad} of {self.total} sessions are damaged, more than "
                f"{MAX_BAD_SHARE:.0%}: see python -m mteditflow.data check {self.path}"
            )

    def order(self, seed: str) -> list[int]:
        """Places of the sessions, sorted by a hash."""
        if self._order[0] != seed:
            places = sorted(range(len(self.sessions)), key=lambda i: digest(f"{seed} {self._keys[i]}"))
            self._order = (seed, places)
        return self._order[1]

    def task(self, place: int, identity: int, num_turns: int, config: Config) -> EditTask | None:
        """The task of a session, its image read now; None where the image is damaged, which is said once."""
        if place in self._damaged:
            return None
        session = self.sessions[place]
        try:
            picture = read_picture(session.read())
        except ValueError as error:
            self._damaged.add(place)
            print(f"mteditflow: skipped {session.place}: image {session.image}: {error}", file=sys.stderr)
            self.check()
            return None
        model = config.model
        seen = fitted(picture, height=model.height, width=model.width, fit=config.data.fit)
        objects, *untouched = [
            tuple(region for region in (in_frame(it, seen.frame) for it in regions) if region)
            for regions in (session.objects, *session.untouched[:num_turns])
        ]
        return EditTask(
            id=identity, source=seen.image, instructions=session.instructions[:num_turns],
            edit_types=session.edit_types[:num_turns], objects=objects, untouched=tuple(untouched),
        )  # fmt: skip


@cache
def training_source(data: DataConfig) -> Source:
    """The sessions to train on. ValueError where there are none, or too many are damaged."""
    everything = read_named("data.path", data.path)
    is_split = not data.held_out
    own = [it for it in everything.found if not (is_split and is_held_out(it.image, data.held_out_share))]
    long = [it for it in own if len(it.instructions) >= data.num_turns]
    source = Source("data.path", data.path, long, everything)
    source.check()
    if not long:
        longest = max((len(it.instructions) for it in own), default=0)
        raise ValueError(
            f"data.num_turns is {data.num_turns}: no session of {data.path} to train on is that long, the longest "
            f"has {longest}; lower it, or add data"
        )
    if not is_split:
        _check_disjoint(own, read_named("data.held_out", data.held_out).found, data)
    return source


@cache
def held_out_source(data: DataConfig, num_turns: int) -> Source:
    """The sessions to evaluate on, of at least `num_turns` turns. ValueError where too many are damaged."""
    name, path = ("data.held_out", data.held_out) if data.held_out else ("data.path", data.path)
    everything = read_named(name, path)
    own = [it for it in everything.found if data.held_out or is_held_out(it.image, data.held_out_share)]
    source = Source(name, path, [it for it in own if len(it.instructions) >= num_turns], everything)
    source.check()
    return source


def _check_disjoint(training: list[UserSession], held_out: list[UserSession], data: DataConfig) -> None:
    """ValueError where an image file is trained and evaluated on."""
    files = {it.file.resolve() for it in training if it.file}
    both = sorted({it.image for it in held_out if it.file and it.file.resolve() in files})
    if both or data.held_out == data.path:
        image = f" ({len(both)}, such as {both[0]})" if both else ""
        raise ValueError(
            f"data.held_out is {data.held_out!r}: has images of data.path{image}; take them out of one, or leave "
            f"data.held_out empty for a split by images"
        )


def check_sessions(config: Config, is_speaking: bool) -> None:
    """ValueError for anything that is wrong with the data before an image is read; faults are named on stderr."""
    sources = [training_source(config.data), held_out_source(config.data, config.num_held_out_turns)]
    _check_count(sources[1], len(sources[1].sessions), config)
    if is_speaking:
        names = {source.name: source.path for source in sources}
        for name, path in names.items():
            _say(read_named(name, path).faults)
        for source, use in zip(sources, ("training", "evaluation"), strict=True):
            print(f"mteditflow: {len(source.sessions)} sessions of {source.path} for {use}", file=sys.stderr)


def _say(faults: list[Fault]) -> None:
    for fault in faults[:MAX_NAMED]:
        print(f"mteditflow: skipped {fault.place}: {fault.text}", file=sys.stderr)
    if len(faults) > MAX_NAMED:
        print(f"mteditflow: skipped {len(faults) - MAX_NAMED} more", file=sys.stderr)


def user_task(config: Config, slot: int) -> EditTask:
    """The task of slot j, whichever rank asks. ValueError where no image can be read."""
    source, data = training_source(config.data), config.data
    num = len(source.sessions)
    epoch, place = divmod(slot, num)
    order = source.order(f"{data.seed}/{epoch}")
    for i in range(num):
        task = source.task(order[(place + i) % num], slot, data.num_turns, config)
        if task:
            return task
    raise ValueError(f"data.path is {data.path!r}: none of its {num} images can be read")


def held_out_user_tasks(config: Config) -> list[EditTask]:
    """The first evaluation.num_sessions of the held-out sessions by hash. ValueError where there are fewer."""
    source, tasks = held_out_source(config.data, config.num_held_out_turns), []
    _check_count(source, len(source.sessions), config)
    for place in source.order("held out"):
        task = source.task(place, len(tasks), config.num_held_out_turns, config)
        if task:
            tasks.append(task)
        if len(tasks) == config.evaluation.num_sessions:
            return tasks
    _check_count(source, len(tasks), config)
    return tasks


def _check_count(source: Source, num: int, config: Config) -> None:
    wanted = config.evaluation.num_sessions
    if num < wanted:
        lever = "add data" if config.data.held_out else "raise data.held_out_share"
        raise ValueError(
            f"evaluation.num_sessions is {wanted}: {source.path} has {num} held-out sessions of "
            f"{config.num_held_out_turns} turns; lower it (and num_sessions_short, num_strips), or {lever}"
        )
