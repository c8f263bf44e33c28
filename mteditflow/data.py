"""Edit tasks. Which tasks a step sees is a function of (data.seed, step) alone, so a resume sees what would have
come.
"""

from mteditflow.config import Config
from mteditflow.distributed import Ranks
from mteditflow.types import EditTask
from mteditflow.world.edits import Session, make_session
from mteditflow.world.render import render

SIZE = 64  # pixels, of the embedded world's pictures


def check_size(config: Config) -> None:
    """Raise ValueError where the editor is set to another size than that of the pictures."""
    for name, value in (("model.height", config.model.height), ("model.width", config.model.width)):
        if value != SIZE:
            raise ValueError(f"{name} is {value}: must be {SIZE}, the size of the embedded world's pictures")


def training_tasks(config: Config, iteration: int, ranks: Ranks) -> list[EditTask]:
    """This rank's share of the P tasks of an iteration. Raises ValueError where P is not a multiple of the ranks."""
    num_tasks = config.rollout.num_tasks
    if num_tasks % ranks.world_size:
        raise ValueError(f"rollout.num_tasks is {num_tasks}: must be a multiple of the {ranks.world_size} ranks")
    ids = range(iteration * num_tasks, (iteration + 1) * num_tasks)[ranks.rank :: ranks.world_size]
    num_turns = config.data.num_turns
    return _tasks(list(ids), [make_session(f"{config.data.seed}/{i}", num_turns, held_out=False) for i in ids])


def held_out_tasks(num_sessions: int, num_turns: int) -> list[EditTask]:
    """The first held-out sessions: the same for every run."""
    return _tasks(
        list(range(num_sessions)), [make_session(str(i), num_turns, held_out=True) for i in range(num_sessions)]
    )


def _tasks(ids: list[int], sessions: list[Session]) -> list[EditTask]:
    pictures = render([session.source for session in sessions])
    return [
        EditTask(
            id=i,
            source=picture,
            instructions=tuple(edit.instruction for edit in session.edits),
            edit_types=tuple(edit.edit_type for edit in session.edits),
            truth=session,
        )
        for i, session, picture in zip(ids, sessions, pictures, strict=True)
    ]
