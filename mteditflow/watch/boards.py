"""Where curves, pictures and tables of a run are looked at: TensorBoard always, and the boards of `run.log_to`.

Each is spoken to by its own client, which decides by its own settings whether it is online: `wandb login` or
WANDB_MODE=offline (then `wandb sync`); trackio writes to this machine (`trackio show`), or to a Space of the hub with
TRACKIO_SPACE_ID. A run that goes on after a kill is the same run there, and its figures stand at their iterations.
"""

import uuid
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from math import isfinite
from os import environ
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL.Image import Image

from mteditflow.config.errors import first_line
from mteditflow.config.ranges import require

PROJECT = "mteditflow"
RUN_ID = "board_id"  # file in a run's folder: by which boards know it again, and tell it from others of its name

Rows = Sequence[Mapping[str, Any]]
"""Of a table: cells by column, the same columns in all rows; numbers, texts, pictures or None."""


class Board(Protocol):
    """Shows a run. `iteration` counts as in metrics.jsonl."""

    def figures(self, iteration: int, values: Mapping[str, float]) -> None:
        """Show the figures of an iteration."""
        ...

    def picture(self, name: str, iteration: int, picture: Image) -> None:
        """Show a picture."""
        ...

    def table(self, name: str, iteration: int, rows: Rows) -> None:
        """Show a table."""
        ...

    def close(self) -> None:
        """Write what is left, and let go."""
        ...


def check_boards(names: Sequence[str]) -> None:
    """ValueError where the client of a board is not installed."""
    for name in names:
        found, remedy = (
            find_spec(name),
            f"its client is not installed: pip install 'mteditflow[{name}]', or leave it out",
        )
        is_installed = found is not None and found.origin is not None  # a folder of this name is no client
        require(is_installed, "run.log_to", name, remedy)


def open_boards(folder: Path, iteration: int, names: Sequence[str], config: Mapping[str, Any]) -> list[Board]:
    """Open the boards of a run whose next iteration is `iteration`. ValueError where one cannot be had."""
    boards: list[Board] = [TensorBoard(folder, iteration)]
    for name in names:
        boards.append(Wandb(folder, config) if name == "wandb" else Trackio(folder, config))
    return boards


class TensorBoard:
    """The files of TensorBoard, in `tensorboard/` of the run's folder; tables as text, without their pictures."""

    def __init__(self, folder: Path, iteration: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # costs a second that --help should not pay

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=iteration)

    def figures(self, iteration: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, iteration)

    def picture(self, name: str, iteration: int, picture: Image) -> None:
        self._writer.add_image(name, np.asarray(picture.convert("RGB")), iteration, dataformats="HWC")

    def table(self, name: str, iteration: int, rows: Rows) -> None:
        columns = [column for column in rows[0] if not any(isinstance(row[column], Image) for row in rows)]
        lines = [columns, ["---"] * len(columns), *([_as_text(row[column]) for column in columns] for row in rows)]
        self._writer.add_text(name, "\n".join(f"| {' | '.join(line)} |" for line in lines), iteration)

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """Weights & Biases; offline its files are in `wandb/` of the run's folder."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        self._wandb = wandb
        try:
            self._run = wandb.init(
                project=environ.get("WANDB_PROJECT", PROJECT), name=folder.resolve().name, dir=str(folder),
                config=dict(config), id=_run_id(folder), resume="allow", settings=wandb.Settings(console="off"),
            )  # fmt: skip
        except wandb.errors.Error as error:
            remedy = "`wandb login`, or WANDB_MODE=offline and `wandb sync` later"
            raise ValueError(f"run.log_to is 'wandb': {first_line(error)}: {remedy}") from None
        self._run.define_metric("*", step_metric="iteration")  # wandb's own step only goes up

    def figures(self, iteration: int, values: Mapping[str, float]) -> None:
        self._run.log({"iteration": iteration, **values})

    def picture(self, name: str, iteration: int, picture: Image) -> None:
        self._run.log({"iteration": iteration, name: self._wandb.Image(picture)})

    def table(self, name: str, iteration: int, rows: Rows) -> None:
        data = [[self._wandb.Image(cell) if isinstance(cell, Image) else cell for cell in row.values()] for row in rows]
        self._run.log({"iteration": iteration, name: self._wandb.Table(columns=list(rows[0]), data=data)})

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """trackio: a data base of this machine, in TRACKIO_DIR, or a Space."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        import trackio  # pyright: ignore[reportMissingImports]

        self._trackio = trackio
        self._run = trackio.init(
            project=environ.get("TRACKIO_PROJECT", PROJECT), name=f"{folder.resolve().name}-{_run_id(folder)[:6]}",
            config=dict(config), resume="allow", auto_log_gpu=False, auto_log_cpu=False,
        )  # fmt: skip

    def figures(self, iteration: int, values: Mapping[str, float]) -> None:
        self._run.log({name: value for name, value in values.items() if isfinite(value)}, step=iteration)

    def picture(self, name: str, iteration: int, picture: Image) -> None:
        self._run.log({name: self._trackio.Image(picture)}, step=iteration)

    def table(self, name: str, iteration: int, rows: Rows) -> None:
        data = [[self._trackio.Image(cell) if isinstance(cell, Image) else cell for cell in it.values()] for it in rows]
        self._run.log({name: self._trackio.Table(columns=list(rows[0]), data=data)}, step=iteration)

    def close(self) -> None:
        self._run.finish()


def _run_id(folder: Path) -> str:
    """Read the run's own name among all runs, or draw it."""
    path = folder / RUN_ID
    if not path.is_file():
        path.write_text(uuid.uuid4().hex)
    return path.read_text()


def _as_text(cell: Any) -> str:
    """Write a cell of a Markdown table."""
    text = f"{cell:zg}" if isinstance(cell, float) else "" if cell is None else str(cell)
    return " ".join(text.replace("|", "\\|").split())
