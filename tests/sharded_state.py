"""A toy that is cut over ranks, and what is saved of it: written by 4 ranks, and read by 1, 2 and 8."""

import errno
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from mteditflow.config import Config, LoraConfig, RunConfig
from mteditflow.config.distributed import DistributedConfig
from mteditflow.distributed import Ranks
from mteditflow.evaluate.best import Best
from mteditflow.evaluate.edival import Evaluation
from mteditflow.record import checkpoint
from mteditflow.run import Run
from mteditflow.transformer.adapters import Adapters
from mteditflow.transformer.full_weights import full_weights
from mteditflow.transformer.sharded import clip_, cut_like, make_mesh, shard, uncut, whole_on_host

CONFIG = Config(run=RunConfig(num_iterations=9))
CPU = torch.device("cpu")
ONE = Ranks(rank=0, world_size=1, device=CPU)
LAST = 3


class Block(nn.Module):
    """Sizes that no number of ranks divides, and one that is smaller than all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.wide, self.scale = nn.Linear(6, 1), nn.Linear(1, 7), nn.Parameter(torch.ones(1))
        self.back = nn.Linear(7, 6)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 6) to (B, 6)."""
        return x + self.back(self.wide(self.narrow(x))) * self.scale


class Toy(nn.Module):
    """What `shard` asks of a transformer. Its numbers are small and whole, so that sums are exact in any order."""

    _repeated_blocks = ("Block",)

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Linear(3, 6), nn.ModuleList([Block(), Block()])
        for i, weight in enumerate(self.parameters()):
            weight.data = torch.randint(-2, 3, weight.shape, generator=torch.Generator().manual_seed(i)).float()
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3) to (B, 6)."""
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return x


def mesh_of(kind: Any, ranks: Ranks) -> DeviceMesh | None:
    return make_mesh(DistributedConfig(shard=kind), ranks)


def adapters_of(mesh: DeviceMesh | None) -> Adapters:
    toy = Toy()
    adapters = full_weights(toy, LoraConfig(is_full=True, targets=()), has_old=False, device=CPU, mesh=mesh)
    if mesh is not None:
        shard(toy, mesh)
    return adapters


def train(adapters: Adapters, ranks: Ranks, num_steps: int) -> None:
    """Steps on all ranks' rows together, each rank's its own."""
    optimizer = torch.optim.SGD([weight for _, weight in adapters.trainable], lr=0.5)
    for step in range(num_steps):
        for micro in range(2):
            rows = torch.full((2, 3), float(ranks.rank % 2 + micro - step))
            adapters.transformer(rows).sum().backward()
        weights = [weight for _, weight in adapters.trainable]
        ranks.sum_(uncut([weight.grad for weight in weights if weight.grad is not None]))
        assert clip_(weights, 2.0**30) > 0
        optimizer.step()
        optimizer.zero_grad()
        adapters.copy("current", "ema", decay=0.5)


def state_of(adapters: Adapters) -> list[Tensor]:
    states = [whole_on_host(adapters.state(name), is_kept=True) for name in ("current", "ema")]  # pyright: ignore[reportArgumentType]
    return [value for state in states for value in state.values()]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def check_trained(ranks: Ranks, kind: str) -> None:
    """Two steps of four ranks, cut and whole: the same weights, all of whose sums are exact."""
    mine, whole = adapters_of(mesh_of(kind, ranks)), adapters_of(None)
    for adapters in (mine, whole):
        train(adapters, ranks, 2)
    assert_same(state_of(mine), state_of(whole))
    assert not torch.equal(state_of(mine)[0], state_of(adapters_of(None))[0])


def as_run(folder: Path, adapters: Adapters, ranks: Ranks) -> Any:
    """What saving and restoring know of a run."""
    weights = [weight for _, weight in adapters.trainable]
    optimizer = torch.optim.AdamW(weights, lr=0.1)
    return SimpleNamespace(
        folder=folder, config=CONFIG, ranks=ranks, policy=SimpleNamespace(adapters=adapters), optimizer=optimizer,
        objective=SimpleNamespace(has_old=False), best=Best(CONFIG, ranks),
    )  # fmt: skip


def step(run: Any, number: int) -> None:
    """Move as AdamW does by a gradient that is a function of the number."""
    for i, (_, weight) in enumerate(run.policy.adapters.trainable):
        drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(99 * number + i))
        weight.grad = cut_like(weight, drawn)
    run.optimizer.step()
    run.policy.adapters.copy("current", "ema", decay=0.5)


def expected_after(number: int) -> list[Tensor]:
    """Weights after so many steps, where nothing was cut or saved."""
    run = as_run(Path(), adapters_of(None), ONE)
    for i in range(number):
        step(run, i)
    return state_of(run.policy.adapters)


def refuse(line: str) -> None:
    raise AssertionError(f"a whole checkpoint was called damaged: {line}")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def check_saved(ranks: Ranks, folder: Path, kind: str) -> None:
    """Three checkpoints, of which the newest two are kept; each rank has written a file."""
    run = as_run(folder, adapters_of(mesh_of(kind, ranks)), ranks)
    for number in range(LAST):
        step(run, number)
        Run._save(run, number + 1, Run._state(run))
    ranks.barrier()
    assert names(folder) == ["iteration-000002", "iteration-000003"]
    files = [path.name for path in (folder / "checkpoints" / "iteration-000003").rglob("*.safetensors")]
    if kind == "none":
        assert sorted(files) == ["current.safetensors", "ema.safetensors", "optimizer.safetensors"]
    else:
        assert 2 <= len(files) <= 4 and all(name.startswith("shard-") for name in files)
    assert not [path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".safetensors", ".json")]


def check_resumed(ranks: Ranks, folder: Path, kind: str) -> None:
    """What was saved by other ranks is there to the bit, cut or whole, moments and all: the next step shows it."""
    saved = checkpoint.load_latest(folder, CONFIG, refuse, ranks=ranks)
    assert saved is not None and saved.iteration == LAST
    run = as_run(folder, adapters_of(mesh_of(kind, ranks)), ranks)
    Run._restore(run, saved)
    assert run.first_iteration == LAST
    assert_same(state_of(run.policy.adapters), expected_after(LAST))
    assert (kind == "none") == all(not isinstance(w, DTensor) for _, w in run.policy.adapters.trainable)
    step(run, LAST)
    assert_same(state_of(run.policy.adapters), expected_after(LAST + 1))


def check_best(ranks: Ranks, folder: Path, kind: str) -> None:
    """The best average, of an earlier iteration, is saved beside the newest, and is there to the bit after a resume: on
    the host, whole or cut, from where it can be the average again.
    """
    config = Config(run=RunConfig(num_iterations=9, patience=2))
    base = Evaluation(
        verdict=torch.zeros(10, 2).bool(), consistency=torch.ones(10, 2), valid=torch.ones(10).bool(), edit_types=[],
        images=torch.zeros(0), num_steps=0,
    )  # fmt: skip
    run, again = (as_run(folder, adapters_of(mesh_of(kind, ranks)), ranks) for _ in range(2))
    run.config, again.config = config, config
    run.best, again.best = (Best(config, ranks) for _ in range(2))
    for number, verdict in enumerate((torch.ones(10, 2), torch.zeros(10, 2))):
        step(run, number)
        now = replace(base, verdict=verdict.bool())
        figures = run.best.see(now, base, number + 1, lambda: run.policy.adapters.state("ema"))
        assert figures == {"heldout/best_iteration": 1.0, "heldout/num_stalled": float(number)}
        Run._save(run, number + 1, Run._state(run))
    saved = checkpoint.load_latest(folder, config, refuse, ranks=ranks)
    assert saved is not None and saved.iteration == 2
    Run._restore(again, saved)
    standing = again.best.standing
    assert standing is not None
    assert (standing.best, standing.num_stalled, standing.best_score) == (1, 1, 100.0)
    assert all(weight.device.type == "cpu" for weight in again.best.weights.values())
    again.policy.adapters.load("ema", again.best.weights)
    half = len(expected_after(1)) // 2
    assert_same(state_of(again.policy.adapters), [*expected_after(2)[:half], *expected_after(1)[half:]])


def check_damaged(ranks: Ranks, folder: Path) -> None:
    """One byte of one rank's file: all ranks go on from the checkpoint before; with none left, all say so."""
    run, told = as_run(folder, adapters_of(mesh_of("full", ranks)), ranks), list[str]()
    for number in range(2):
        step(run, number)
        Run._save(run, number + 1, Run._state(run))
    for iteration, expected in ((2, 1), (1, 0)):
        if ranks.is_main:
            path = folder / "checkpoints" / f"iteration-{iteration:06d}" / "shards"
            path = path / "shard-00003-model-00001-of-00001.safetensors"
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path.write_bytes(content)
        ranks.barrier()
        if expected:
            saved = checkpoint.load_latest(folder, CONFIG, told.append, ranks=ranks)
            assert saved is not None and saved.iteration == expected
            assert len(told) == ranks.is_main and all("shard-00003" in line for line in told)
        else:
            with pytest.raises(ValueError, match=r"every checkpoint in .* is damaged"):
                checkpoint.load_latest(folder, CONFIG, told.append, ranks=ranks)


def check_faults(ranks: Ranks, folder: Path) -> None:
    """A full disk under one rank, and a rank that sees another folder, are one line on all; what was there stays."""
    run = as_run(folder, adapters_of(mesh_of("full", ranks)), ranks)
    step(run, 0)
    Run._save(run, 1, Run._state(run))

    def no_room(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        if ranks.rank == 2:
            patch.setattr(os, "fsync", no_room)
        with pytest.raises(ValueError, match="no room on the disk to save"):
            Run._save(run, 2, Run._state(run))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "SECONDS_TO_SEE", 1)
        elsewhere = as_run(folder if ranks.rank != 2 else folder / "elsewhere", run.policy.adapters, ranks)
        elsewhere.optimizer = run.optimizer
        with pytest.raises(ValueError, match=r"ranks 2 do not see .* all nodes share"):
            Run._save(elsewhere, 2, Run._state(elsewhere))
        with pytest.raises(ValueError, match=r"ranks 2 do not see .* all nodes share"):
            checkpoint.load_latest(elsewhere.folder, CONFIG, refuse, ranks=ranks)
    ranks.barrier()
    assert names(folder) == ["iteration-000001"]
    Run._save(run, 2, Run._state(run))
    assert names(folder) == ["iteration-000001", "iteration-000002"]  # whole when this rank goes on


def check_other_model(ranks: Ranks, folder: Path) -> None:
    """What fits another model cannot be mapped: one line."""
    saved = checkpoint.load_latest(folder, CONFIG, refuse, ranks=ranks)
    assert saved is not None
    run = as_run(folder, adapters_of(mesh_of("full", ranks)), ranks)
    state = {f"other.{name}": value for name, value in saved.read("current").items()}
    with pytest.raises(ValueError, match="does not fit the model"):
        run.policy.adapters.load("current", state)
