"""Users' sessions as tasks: who is held out, in which order the others come, what happens to damaged images.

Held out is decided by a hash of the image's name, so that all sessions of an image are on one side, and adding data
moves none of the old ones; of few images, where that would scatter, the share itself is taken, lowest hashes first.
The order of an epoch sorts the sessions by a hash of (data.seed, epoch, session): it
depends neither on the order in the file nor on ranks. Slot j of a run, step P j // P, is the j-th session of the
epochs laid end to end; where its image is damaged, the next session of that epoch whose image is not takes the slot.
The slot is the task's id: two tasks of a step have different noise even where they are the same session.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import cache, lru_cache

from PIL import Image

from mteditflow.config import Config, DataConfig
from mteditflow.config.errors import printable
from mteditflow.config.ranges import require
from mteditflow.data.formats import read_sessions
from mteditflow.data.images import Fit, Fitted, crop_region, fit_picture, nearest_size
from mteditflow.data.sessions import MAX_BAD_SHARE, Sessions, UserSession, digest
from mteditflow.types import EditTask

NUM_MEASURED = 1000  # pictures whose headers a plan reads
MAX_NAMED = 10  # faults, or images that are held out, that are printed; `mteditflow data check` prints all faults
MANY_IMAGES = 200  # of which a share of 0.1 by hashes alone is 20 give or take 4


@cache
def read_named(name: str, path: str, allowed_folder: str) -> Sessions:
    """Read the sessions of the field `name`. ValueError: the field, its value, and what is wrong with it."""
    try:
        return read_sessions(path, allowed_folder)
    except ValueError as error:
        raise ValueError(f"{name} is {path!r}: {error}") from None


def is_held_out_image(image: str, share: float) -> bool:
    """Say whether an image is among the share that is held out."""
    return int(digest(f"held out {image}")[:13], 16) / 16**13 < share


def held_out_images(images: Iterable[str], share: float) -> frozenset[str]:
    """Choose the images that are held out: those of the share; of fewer than MANY_IMAGES as many as fit into the share,
    at least one, and not the only one.
    """
    names = sorted({*images}, key=lambda image: digest(f"held out {image}"))
    if len(names) >= MANY_IMAGES or not 0 < share < 1:
        return frozenset(image for image in names if is_held_out_image(image, share))
    num = int(round(share * len(names), 9))
    return frozenset(names[: min(max(num, 1), len(names) - 1)])


def _say(text: str) -> None:
    print(f"mteditflow: {printable(text)}", file=sys.stderr)


def see(read: Callable[[], Image.Image], fit: Fit, sizes: Sequence[tuple[int, int]]) -> Fitted:
    """Read an image and bring it to that of the sizes, (height, width), whose aspect is nearest: in a run and in the
    check. ValueError where it is damaged.
    """
    picture = read()
    height, width = nearest_size(picture.size, sizes)
    return fit_picture(picture, height=height, width=width, fit=fit)


class Source:
    """Sessions of one file that are long enough, on one side of the split; knows which of their images are damaged.

    ValueError where too much of the file is damaged.
    """

    def __init__(self, name: str, path: str, everything: Sessions, sessions: list[UserSession], num_turns: int) -> None:
        self.name, self.path, self.num_turns = name, path, num_turns
        self.everything = everything
        self.sessions = [session for session in sessions if len(session.instructions) >= num_turns]
        self._damaged: dict[str, str] = {}  # by place, what is wrong with the image
        self._check()

    def _check(self) -> None:
        faults = {fault.place: fault.text for fault in self.everything.faults} | self._damaged
        num_bad = len(self.everything.faults) + len(self._damaged)
        if self.everything.is_too_damaged(num_bad, MAX_BAD_SHARE):
            first = next(iter(faults))
            raise ValueError(
                f"{self.name} is {self.path!r}: {num_bad} of {self.everything.total} sessions are damaged, more than "
                f"{MAX_BAD_SHARE:.0%} ({first}: {faults[first]}): see python -m mteditflow.data check {self.path}"
            )

    @property
    def num_damaged(self) -> int:
        """Sessions of which a picture that was read is damaged."""
        return len(self._damaged)

    def task(self, session: UserSession, task_id: int, config: Config) -> EditTask | None:
        """Make the task of a session, reading its image; None where the image is damaged, which is said once."""
        if session.place in self._damaged:
            return None
        fitted = list[Fitted]()
        for name, read in session.readers:
            try:
                fitted.append(see(read, config.data.fit, config.sizes))
            except ValueError as error:
                self._damaged[session.place] = f"{name}: {error}"
                _say(f"skipped {session.place}: image {name}: {error}")
                self._check()
                return None
        seen, *references = fitted
        objects, *untouched = [
            tuple(region for region in (crop_region(region, seen.frame) for region in regions) if region)
            for regions in (session.objects, *session.untouched[: self.num_turns])
        ]
        return EditTask(
            id=task_id, source=seen.image, references=tuple(picture.image for picture in references),
            instructions=session.instructions[: self.num_turns], edit_types=session.edit_types[: self.num_turns],
            objects=objects, untouched=tuple(untouched),
        )  # fmt: skip


@lru_cache(maxsize=2)  # an epoch of each source
def _in_order(source: Source, seed: str) -> list[UserSession]:
    """Sort the sessions by a hash."""
    return sorted(source.sessions, key=lambda session: digest(f"{seed} {session.key}"))


@cache
def training_source(data: DataConfig) -> Source:
    """Find the sessions to train on. ValueError where there are none, or too many are damaged."""
    everything = read_named("data.path", data.path, data.allowed_folder)
    away = _held_out(everything, data)
    sessions = [session for session in everything.found if session.image not in away]
    source = Source("data.path", data.path, everything, sessions, data.num_turns)
    longest = max((len(session.instructions) for session in sessions), default=0)
    remedy = f"no session of {data.path} to train on is that long, the longest has {longest}; lower it, or add data"
    require(bool(source.sessions), "data.num_turns", data.num_turns, remedy)
    return source


def _held_out(everything: Sessions, data: DataConfig) -> frozenset[str]:
    """Choose the images of data.path that are held out: none where data.held_out has others."""
    images = (session.image for session in everything.found)
    return frozenset() if data.held_out else held_out_images(images, data.held_out_share)


@cache
def held_out_source(data: DataConfig, num_turns: int) -> Source:
    """Find the sessions to evaluate on, of at least `num_turns` turns. ValueError where too many are damaged."""
    name, path = ("data.held_out", data.held_out) if data.held_out else ("data.path", data.path)
    everything = read_named(name, path, data.allowed_folder)
    chosen = None if data.held_out else _held_out(everything, data)
    sessions = [session for session in everything.found if chosen is None or session.image in chosen]
    return Source(name, path, everything, sessions, num_turns)


def _check_disjoint(training: list[UserSession], held_out: list[UserSession], data: DataConfig) -> None:
    """Raise ValueError where an image file is trained and evaluated on."""
    files = {session.file.resolve() for session in training if session.file}
    both = sorted({session.image for session in held_out if session.file and session.file.resolve() in files})
    shared = f" ({len(both)}, such as {both[0]})" if both else ""
    remedy = f"has images of data.path{shared}; take them out of one, or leave it empty for a split by images"
    require(not both and data.held_out != data.path, "data.held_out", data.held_out, remedy)


def check_sessions(config: Config, *, is_speaking: bool, is_training: bool) -> None:
    """Raise ValueError for what is wrong with the data before an image is read; faults are named on stderr."""
    held_out = held_out_source(config.data, config.num_held_out_turns)
    split = "" if config.data.held_out else f": {_split_line(held_out, config.data)}"
    used = [(held_out, f"evaluation{split}")]
    if is_training:
        training = training_source(config.data)
        if config.data.held_out:
            _check_disjoint(training.sessions, held_out.everything.found, config.data)
        used.insert(0, (training, "training"))
    _check_count(held_out, len(held_out.sessions), config)
    if not is_speaking:
        return
    for everything in {source.name: source.everything for source, _ in used}.values():
        for fault in everything.faults[:MAX_NAMED]:
            _say(f"skipped {fault.place}: {fault.text}")
        if len(everything.faults) > MAX_NAMED:
            _say(f"skipped {len(everything.faults) - MAX_NAMED} more")
    for source, use in used:
        _say(f"{len(source.sessions)} sessions of {source.path} for {use}")


def _split_line(held_out: Source, data: DataConfig) -> str:
    """Say which of the images are held out, by their names where they are few."""
    images = {session.image for session in held_out.everything.found}
    chosen = sorted(_held_out(held_out.everything, data))
    names = f": {', '.join(chosen)}" if len(chosen) <= MAX_NAMED else ""
    return f"{len(chosen)} of {len(images)} images are held out (data.held_out_share {data.held_out_share:g}){names}"


def user_task(config: Config, slot: int) -> EditTask:
    """Make the task of slot j, whichever rank asks. ValueError where no image can be read."""
    source = training_source(config.data)
    num = len(source.sessions)
    epoch, first = divmod(slot, num)
    order = _in_order(source, f"{config.data.seed}/{epoch}")
    for place in range(first, first + num):
        task = source.task(order[place % num], slot, config)
        if task:
            return task
    raise ValueError(f"data.path is {source.path!r}: none of its {num} images can be read")


@cache
def measure_shares(data: DataConfig, sizes: tuple[tuple[int, int], ...]) -> dict[tuple[int, int], float]:
    """Count which of the sizes pictures take, of up to NUM_MEASURED training sessions in the order of the first epoch;
    those of damaged pictures aside. ValueError where none can be read.
    """
    source, counts = training_source(data), Counter[tuple[int, int]]()
    for session in _in_order(source, f"{data.seed}/0")[:NUM_MEASURED]:
        with suppress(ValueError):  # which a run would pass over, too
            counts[nearest_size(session.read_size(), sizes)] += 1
    require(bool(counts), "data.path", data.path, f"none of the first {NUM_MEASURED} images can be read")
    return {size: counts[size] / counts.total() for size in sizes}


@cache
def reference_counts(data: DataConfig, num_held_out_turns: int) -> tuple[float, int]:
    """Count the references of a training session, on average, and of any session at the most."""
    training, held_out = training_source(data).sessions, held_out_source(data, num_held_out_turns).sessions
    mean = sum(len(session.references) for session in training) / len(training)
    return mean, max(len(session.references) for session in [*training, *held_out])


def held_out_user_tasks(config: Config) -> list[EditTask]:
    """Make the first evaluation.num_sessions of the held-out sessions by hash. ValueError where there are fewer."""
    source, tasks = held_out_source(config.data, config.num_held_out_turns), []
    for session in _in_order(source, "held out"):
        task = source.task(session, len(tasks), config)
        tasks += [task] if task else []
        if len(tasks) == config.evaluation.num_sessions:
            break
    _check_count(source, len(tasks), config)
    return tasks


def _check_count(source: Source, num: int, config: Config) -> None:
    """Raise ValueError where there are fewer held-out sessions than evaluation wants."""
    wanted, lever = config.evaluation.num_sessions, "add data" if config.data.held_out else "raise data.held_out_share"
    damaged = f" beside {source.num_damaged} with damaged pictures" if source.num_damaged else ""
    found = f"{source.path} has {num} held-out sessions of {config.num_held_out_turns} turns{damaged}"
    remedy = f"{found}; lower it (and num_sessions_short, num_strips), or {lever}"
    require(num >= wanted, "evaluation.num_sessions", wanted, remedy)
