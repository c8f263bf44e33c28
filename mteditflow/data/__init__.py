"""Edit tasks, of the embedded world or of a user's data. Which tasks a step sees is a function of (data.seed, step)
alone, so a resume sees what would have come, on any number of ranks.

`python -m mteditflow.data --help` imports no torch: what needs it is imported where it is used.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mteditflow.config import EMBEDDED, Config
from mteditflow.config.ranges import require
from mteditflow.world.edits import Session, make_session
from mteditflow.world.scenes import IMAGE

if TYPE_CHECKING:
    from mteditflow.distributed import Ranks
    from mteditflow.types import EditTask


def check_data(config: Config, *, is_speaking: bool, is_training: bool = True) -> None:
    """Raise ValueError for anything that is wrong with the data before the first image is read; what is skipped is
    named on stderr. Where nothing is trained, data.path may be what is evaluated on.
    """
    if config.data.path == EMBEDDED:
        check_size(config)
        return
    from mteditflow.data.userdata import check_sessions

    check_sessions(config, is_speaking=is_speaking, is_training=is_training)


def check_size(config: Config) -> None:
    """Raise ValueError where the editor is set to another size than that of the embedded world's pictures."""
    for name, value in (("model.height", config.model.height), ("model.width", config.model.width)):
        is_right = config.data.path != EMBEDDED or value == IMAGE
        require(is_right, name, value, f"must be {IMAGE}, the size of the embedded world's pictures")


def training_tasks(config: Config, iteration: int, ranks: "Ranks") -> "list[EditTask]":
    """Make those of the P tasks of an iteration that this rank's trajectories belong to: ranks may share a group."""
    num_tasks, size = config.rollout.num_tasks, config.rollout.group_size
    rows = ranks.share(num_tasks * size)
    ids = range(iteration * num_tasks, (iteration + 1) * num_tasks)[rows[0] // size : rows[-1] // size + 1]
    if config.data.path != EMBEDDED:
        from mteditflow.data.userdata import user_task

        return [user_task(config, i) for i in ids]
    num_turns = config.data.num_turns
    return _world_tasks(ids, [make_session(f"{config.data.seed}/{i}", num_turns, held_out=False) for i in ids])


def size_shares(config: Config) -> dict[tuple[int, int], float]:
    """Say how large a share of the training pictures takes each of `config.sizes`, by the headers of some of them; each
    takes as much where data.path is not on this machine.
    """
    if len(config.sizes) == 1 or not Path(config.data.path).exists():
        return dict.fromkeys(config.sizes, 1 / len(config.sizes))
    from mteditflow.data.userdata import measure_shares

    return measure_shares(config.data, config.sizes)


def count_references(config: Config) -> tuple[float, int]:
    """Count the reference images of a training session, on average, and of any session at the most; none where
    data.path is not on this machine.
    """
    if config.data.path == EMBEDDED or not Path(config.data.path).exists():
        return 0.0, 0
    from mteditflow.data.userdata import reference_counts

    return reference_counts(config.data, config.num_held_out_turns)


def all_instructions(config: Config) -> set[str]:
    """Collect the instructions that a run on a user's data is about, of training and evaluation; the embedded world's
    are none of a user's.
    """
    if config.data.path == EMBEDDED:
        return set()
    from mteditflow.data.userdata import held_out_source, training_source

    sources = training_source(config.data), held_out_source(config.data, config.num_held_out_turns)
    sessions = ((session, source.num_turns) for source in sources for session in source.sessions)
    return {text for session, num_turns in sessions for text in session.instructions[:num_turns]}


def cut_lines(texts: set[str], count_tokens: Callable[[str], int], limit: int) -> list[str]:
    """Say how many instructions are longer than the text encoder reads; no line where none is."""
    num = sum(count_tokens(text) > limit for text in texts)
    cut = f"{num} of {len(texts)} instructions are longer than model.max_text_tokens {limit}: their ends are not read"
    return [cut] if num else []


def held_out_tasks(config: Config) -> "list[EditTask]":
    """Make the first evaluation.num_sessions held-out sessions: the same for every run on the same data."""
    if config.data.path != EMBEDDED:
        from mteditflow.data.userdata import held_out_user_tasks

        return held_out_user_tasks(config)
    ids = range(config.evaluation.num_sessions)
    return _world_tasks(ids, [make_session(str(i), config.num_held_out_turns, held_out=True) for i in ids])


def _world_tasks(ids: Sequence[int], sessions: list[Session]) -> "list[EditTask]":
    from mteditflow.types import EditTask
    from mteditflow.world.render import render

    pictures = render([session.source for session in sessions])
    return [
        EditTask(
            id=i, source=picture, instructions=tuple(edit.instruction for edit in session.edits),
            edit_types=tuple(edit.edit_type for edit in session.edits), truth=session,
        )
        for i, session, picture in zip(ids, sessions, pictures, strict=True)
    ]  # fmt: skip
