"""The YAML of a study: comparisons of cells, each cell some overrides of a common base, and what the paper found.

    base: {evaluation.num_turns: 3}            overrides of the defaults, for every cell
    seeds: [0, 1, 2]                           each sets run.seed and data.seed
    comparisons:
      training_turns:
        question: Do more training turns help?
        cells:                                 the first is the one that the others are paired with
          K=3: {}
          K=1: {data.num_turns: 1}
        paper: [K=3, K=1]                      best first; a list within the list is not ordered; optional
        note: What is held equal.              optional
        seeds: [0]                             instead of the study's; optional

All cells are evaluated on the same sessions in the same way, and those of a comparison train one editor (all fields of
`model`); another comparison may train another, such as the same question on another world.

Cells that resolve to the same config are one cell, run once per seed, whatever the comparisons call it.
"""

import hashlib
import json
import re
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from mteditflow.config import Config
from mteditflow.config.cli import as_arguments, changed_fields, from_overrides, read_yaml
from mteditflow.config.errors import suggest
from mteditflow.config.model import ModelConfig
from mteditflow.evaluate.held_out import check_held_out

OWNED = ("run.folder", "run.seed", "data.seed")
"""Fields that the study sets itself."""
OPTIONAL = {"paper": [], "note": "", "seeds": []}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A config of the grid, but for its seed and folder."""

    key: str
    name: str  # the first that it is given: comparison and label
    overrides: dict[str, Any]
    config: Config


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Cells by the names that they have here, the first being the reference; `paper` orders the names, best first."""

    name: str
    question: str
    cells: dict[str, Cell]
    seeds: tuple[int, ...]
    paper: tuple[tuple[str, ...], ...]
    note: str

    @property
    def model(self) -> ModelConfig:
        """The editor that all of its cells train."""
        return next(iter(self.cells.values())).config.model

    @property
    def claims(self) -> list[tuple[str, str]]:
        """Pairs of names of which the paper has the first ahead of the second."""
        return [(a, b) for better, worse in combinations(self.paper, 2) for a in better for b in worse]


@dataclass(frozen=True, kw_only=True)
class CellRun:
    """A cell at a seed: a run in a folder of its own."""

    cell: Cell
    seed: int
    folder: Path

    @property
    def config(self) -> Config:
        """The config of the run, to the last field."""
        config = self.cell.config
        run = replace(config.run, seed=self.seed, folder=str(self.folder))
        return replace(config, run=run, data=replace(config.data, seed=self.seed))

    @property
    def arguments(self) -> list[str]:
        """The command line of `python -m mteditflow.train`."""
        owned = {"run.folder": str(self.folder), "run.seed": self.seed, "data.seed": self.seed}
        return as_arguments(self.cell.overrides | owned)

    @property
    def label(self) -> str:
        """What the user reads."""
        return f"{self.cell.name}, seed {self.seed}"


def read_study(path: Path) -> list[Comparison]:
    """Read the comparisons of a study file. ValueError: one line that names file or cell, value and remedy."""
    tree = read_yaml(path, "study")
    _check_keys(tree, {"base": dict, "seeds": list, "comparisons": dict}, {}, f"study {path}")
    seeds = _seeds(tree["seeds"], "seeds")
    cells: dict[str, Cell] = {}
    found = [_comparison(name, value, tree["base"], seeds, cells) for name, value in tree["comparisons"].items()]
    if not found:
        raise ValueError(f"study {path} has no comparisons: write at least one")
    configs = {f"cell {cell.name!r}": cell.config for cell in cells.values()}
    check_held_out(configs, "set it in base, for all", is_one_editor=False)
    for comparison in found:
        configs = {f"cell '{comparison.name}: {name}'": cell.config for name, cell in comparison.cells.items()}
        check_held_out(configs, "cells are compared on one editor and its world: give each a comparison of its own")
    starts = sorted({cell.config.lora.init_from for cell in cells.values()})
    if len(starts) > 1:  # what all gains are over would be another editor for some
        raise ValueError(f"lora.init_from is {starts[0]!r} and {starts[1]!r} in study {path}: set it in base, for all")
    return found


def select(comparisons: list[Comparison], names: list[str] | None, seeds: list[int] | None) -> list[Comparison]:
    """Pick the comparisons of these names, or all, at these seeds. ValueError for a name that is not there."""
    known = [comparison.name for comparison in comparisons]
    for name in names or []:
        if name not in known:
            raise ValueError(f"--only {name} is no comparison of the study: {suggest(name, known)}")
    chosen = [comparison for comparison in comparisons if not names or comparison.name in names]
    return [replace(comparison, seeds=_seeds(seeds, "--seeds")) for comparison in chosen] if seeds else chosen


def runs_of(comparisons: list[Comparison], folder: Path) -> list[CellRun]:
    """List every cell at every seed, once: all cells at the first seed, then at the next."""
    runs = {}
    for seed in sorted({seed for comparison in comparisons for seed in comparison.seeds}):
        for comparison in comparisons:
            for cell in comparison.cells.values() if seed in comparison.seeds else ():
                run = CellRun(cell=cell, seed=seed, folder=folder / "cells" / cell.key / f"seed-{seed}")
                runs.setdefault(run.folder, run)
    return list(runs.values())


def _comparison(
    name: str, value: Any, base: dict[str, Any], seeds: tuple[int, ...], cells: dict[str, Cell]
) -> Comparison:
    """Make a comparison; `cells` by key gains those that are new."""
    where = f"comparison {name}"
    if not re.fullmatch(r"[\w-]+", str(name)):
        raise ValueError(f"{where}: a figure is named after it, so it must be of letters, digits, _ and -")
    kinds = {"question": str, "cells": dict, "paper": list, "note": str, "seeds": list}
    _check_keys(value, kinds, OPTIONAL, where)
    value = OPTIONAL | value
    named = {str(label): _cell(f"{name}: {label}", tree, base, cells) for label, tree in value["cells"].items()}
    if len({cell.key for cell in named.values()}) < max(2, len(named)):
        raise ValueError(f"{where} has cells that are the same config, or a single one: give it two that differ")
    paper = tuple(tuple(map(str, rank if isinstance(rank, list) else [rank])) for rank in value["paper"])
    for label in (label for rank in paper for label in rank):
        if label not in named:
            raise ValueError(f"{where}: paper names {label!r}, no cell: {suggest(label, list(named))}")
    return Comparison(
        name=str(name), question=value["question"], cells=named, paper=paper, note=value["note"],
        seeds=_seeds(value["seeds"], f"{where}: seeds") if value["seeds"] else seeds,
    )  # fmt: skip


def _cell(name: str, overrides: Any, base: dict[str, Any], cells: dict[str, Cell]) -> Cell:
    """Find the cell of these overrides in `cells`, or add it."""
    if not isinstance(overrides, dict):
        raise ValueError(f"cell {name!r} is {overrides!r}: must be a map of overrides, {{}} for the base")
    everything = base | overrides
    for key in OWNED:
        if key in everything:
            raise ValueError(f"cell {name!r} sets {key}: leave it out, the study sets it")
    try:
        config = from_overrides(everything)
    except ValueError as error:
        raise ValueError(f"cell {name!r}: {error}") from None
    changed = [[*name.split("."), value] for name, value in changed_fields(config).items()]
    key = hashlib.sha256(json.dumps(changed).encode()).hexdigest()[:10]  # a later version's new field changes no key
    return cells.setdefault(key, Cell(key=key, name=name, overrides=everything, config=config))


def _check_keys(tree: Any, kinds: dict[str, type], optional: dict[str, Any], where: str) -> None:
    """Raise ValueError unless `tree` is a map with these keys and kinds of value."""
    if not isinstance(tree, dict):
        raise ValueError(f"{where} is no map: it needs {', '.join(key for key in kinds if key not in optional)}")
    for key in tree:
        if key not in kinds:
            raise ValueError(f"{where}: {key} is no key: {suggest(str(key), list(kinds))}")
    for key, kind in kinds.items():
        if key not in tree and key not in optional:
            raise ValueError(f"{where} has no {key}: add it")
        if key in tree and not isinstance(tree[key], kind):
            wanted = {dict: "a map", list: "a list", str: "a text"}[kind]
            raise ValueError(f"{where}: {key} is {tree[key]!r}: must be {wanted}")


def _seeds(value: list[Any], name: str) -> tuple[int, ...]:
    """Check seeds. ValueError in one line."""
    is_right = value and all(type(seed) is int and seed >= 0 for seed in value) and len(set(value)) == len(value)
    if not is_right:
        raise ValueError(f"{name} is {value!r}: must be a list of different whole numbers, from 0 up")
    return tuple(value)
