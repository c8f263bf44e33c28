"""What test_sharded.py runs by torchrun: a policy that is cut over two ranks beside one that each rank has whole.

    python -m torch.distributed.run --standalone --nproc_per_node 2 sharded_checks.py FOLDER [PART OF A NAME]

Each check is a function here; what it raised on either rank is written to FOLDER/results.json under its name.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from mteditflow.config import LoraConfig, ModelConfig
from mteditflow.config.distributed import DistributedConfig
from mteditflow.distributed import Ranks
from mteditflow.policy import Policy, build_policy
from mteditflow.transformer import compiled
from mteditflow.transformer.sharded import clip_, cut_like, make_mesh, whole_on_host
from mteditflow.types import Condition

LORA, FULL = LoraConfig(rank=4, alpha=16), LoraConfig(is_full=True, targets=())
SIZE, NUM_ROWS = 64, 2
PROMPT = "make the red square blue"


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a check runs."""

    ranks: Ranks
    folder: Path  # of the test, with the pipelines
    scratch: Path  # of the check, seen by all ranks

    def model(self, **fields: Any) -> ModelConfig:
        """The tiny FLUX.1-Kontext."""
        return ModelConfig(path=str(self.folder / "kontext"), max_text_tokens=8, **fields)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(policy: Policy, rank: int) -> tuple[Tensor, Tensor, Condition]:
    """Latents, noise levels and condition of two rows, others on each rank."""
    source = draw(NUM_ROWS, 3, SIZE, SIZE, seed=5 + rank).clamp(-1, 1)
    condition = Condition(
        text=policy.encode_text([PROMPT] * NUM_ROWS, source, has_cfg=False), image=policy.encode_image(source)
    )
    latents = draw(NUM_ROWS, policy.num_tokens, policy.num_channels, seed=20 + rank)
    return latents, torch.linspace(1, 0.3, NUM_ROWS), condition


def perturb(policy: Policy, name: Any, scale: float = 0.05) -> None:
    """Move an adapter from where all start, alike on all ranks, cut or not."""
    state = whole_on_host(policy.adapters.state(name), is_kept=True)
    moved = {key: w + scale * draw(*w.shape, seed=len(name) + i) for i, (key, w) in enumerate(state.items())}
    policy.adapters.load(name, moved)


def velocities_and_gradients(policy: Policy, rank: int) -> list[Tensor]:
    """Under each adapter without gradients, then with them under `current`, with others used while the graph waits."""
    for i, name in enumerate(("current", "old", "ema")):
        perturb(policy, name, 0.05 + 0.05 * i)
    given, found = inputs(policy, rank), list[Tensor]()
    for name in ("current", "old", "ema", "off"):
        with policy.adapters.use(name), torch.no_grad():
            found.append(policy.velocity(*given))
    assert not any(torch.equal(found[0], other) for other in found[1:])
    trained = policy.velocity(*given)
    with policy.adapters.use("off"), torch.no_grad():
        policy.velocity(*given)
    trained.square().sum().backward()
    found.append(trained.detach())
    for _, weight in policy.adapters.trainable:
        assert weight.grad is not None
        found.append(weight.grad)
    assert all(bool(value.any()) for value in found)
    return found


def assert_equal_bits(mine: list[Tensor], whole: list[Tensor]) -> None:
    assert len(mine) == len(whole)
    differing = [i for i, (a, b) in enumerate(zip(mine, whole, strict=True)) if not torch.equal(a, b)]
    assert not differing, f"{len(differing)} of {len(mine)} differ in bits: {differing[:9]}"


def both(place: Place, model: ModelConfig, lora: LoraConfig, shard: Any = "full", **options: Any) -> list[Policy]:
    """A policy that is cut, and one that is not."""
    mesh = make_mesh(DistributedConfig(shard=shard), place.ranks)
    return [build_policy(model, lora, 3, has_old=True, mesh=mesh, **options) for mesh in (mesh, None)]


def share_of_weights(policy: Policy) -> float:
    """The share of a transformer's weights, the adapters aside, that this rank holds."""
    adapters = policy.adapters.parameters()
    weights = [w for w in policy.pipeline.transformer.parameters() if w not in adapters]
    assert all(isinstance(weight, DTensor) for weight in weights)
    return sum(w.to_local().numel() for w in weights) / sum(w.numel() for w in weights)  # pyright: ignore[reportAttributeAccessIssue]


def check_lora(place: Place, base: str) -> None:
    """Bits of a base that is not cut, with blocks run again for the backward pass too, and with replayed ones."""
    cut, whole = both(place, place.model(base=base), LORA)
    rank = place.ranks.rank
    for change in (
        lambda _: None,
        lambda policy: policy.pipeline.transformer.enable_gradient_checkpointing(),
        Policy.replay,
    ):
        for policy in (cut, whole):
            change(policy)
        assert_equal_bits(velocities_and_gradients(cut, rank), velocities_and_gradients(whole, rank))
        for policy in (cut, whole):
            for _, weight in policy.adapters.trainable:
                weight.grad = None
    # shards of rows that two does not divide are padded: a row of some small weights
    assert 0.4 < share_of_weights(cut) < 0.6
    assert not any(isinstance(weight, DTensor) for weight in cut.adapters.parameters())


def check_compiled(place: Place) -> None:
    """Blocks that were compiled before they were cut are compiled still, and can be run eagerly after all."""
    compiled.BACKEND, compiled.OPTIONS = "eager", {}
    rank, mesh = place.ranks.rank, make_mesh(DistributedConfig(shard="full"), place.ranks)
    cut = build_policy(place.model(compile="blocks"), LORA, 3, has_old=True, mesh=mesh)
    whole = build_policy(place.model(), LORA, 3, has_old=True)
    before, eager = compiled.count_graphs()[0], velocities_and_gradients(whole, rank)
    assert_equal_bits(velocities_and_gradients(cut, rank), eager)
    found = compiled.count_graphs()[0]
    assert found >= before + 4  # two classes of block, with gradients and without
    cut.run_eagerly()
    for _, weight in cut.adapters.trainable:
        weight.grad = None
    assert_equal_bits(velocities_and_gradients(cut, rank), eager)
    assert compiled.count_graphs()[0] == found


def check_full(place: Place, base: str, targets: tuple[str, ...] = ()) -> None:
    """Every copy's velocity, the gradient as the sum over ranks, and what an optimizer makes of it, to the bit."""
    cut, whole = both(place, place.model(base=base), LoraConfig(is_full=True, targets=targets))
    ranks = place.ranks
    found = [velocities_and_gradients(policy, ranks.rank) for policy in (cut, whole)]
    gradients = [parts[5:] for parts in found]
    ranks.sum_(gradients[1])
    assert_equal_bits(found[0][:5], found[1][:5])
    summed = whole_on_host({str(i): part for i, part in enumerate(gradients[0])}, is_kept=True).values()
    for (name, weight), mine, other in zip(cut.adapters.trainable, summed, gradients[1], strict=True):
        # What goes into every block has its gradient summed block by block, where it is else summed use by use: 6 terms
        # in another order, which may be 8 times their sum.
        bound = 8 * 6 * 2**-24 if name.startswith("time_text_embed") else 0
        assert (mine - other).norm() <= bound * other.norm(), name
        weight.grad = cut_like(weight, other)  # type: ignore[assignment]
    parameters = [[weight for _, weight in policy.adapters.trainable] for policy in (cut, whole)]
    norms = [clip_(weights, 1e6).item() for weights in parameters]
    # float32 sums of squares in another order: half a bit for each of less than 2^17 terms, at worst; 2^-16 in all
    assert abs(norms[0] - norms[1]) <= 2**-16 * norms[1] and norms[1] > 0
    after = []
    for policy, weights in zip((cut, whole), parameters, strict=True):
        optimizer = torch.optim.AdamW(weights, lr=1e-2)
        optimizer.step()
        policy.adapters.copy("current", "ema", decay=0.75)
        policy.adapters.copy("current", "old")
        moments = {f"{i}": state["exp_avg_sq"] for i, state in optimizer.state_dict()["state"].items()}
        after.append([*whole_on_host(moments, is_kept=True).values()])
        given = inputs(policy, ranks.rank)
        for name in ("current", "ema", "old", "off"):
            with policy.adapters.use(name), torch.no_grad():  # what was gathered before the step is not used again
                after[-1].append(policy.velocity(*given))
            if name != "off":
                after[-1] += whole_on_host(policy.adapters.state(name), is_kept=True).values()
    assert_equal_bits(*after)
    assert all(isinstance(weight, DTensor) for weight in parameters[0])
    assert 0.4 < sum(w.to_local().numel() for w in parameters[0]) / sum(w.numel() for w in parameters[1]) < 0.6  # pyright: ignore[reportAttributeAccessIssue]


CHECKS: dict[str, Callable[[Place], None]] = {
    **{f"lora_{base}": partial(check_lora, base=base) for base in ("float32", "bfloat16", "float8")},
    "compiled": check_compiled,
    "full_float32": partial(check_full, base="float32"),
    "full_bfloat16_targets": partial(check_full, base="bfloat16", targets=("attn.to_q", "proj_out", "norm.linear")),
}


def run_checks(folder: Path, wanted: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    ranks = Ranks(rank=dist.get_rank(), world_size=dist.get_world_size(), device=torch.device("cpu"))
    results: dict[str, str] = {}
    for name, check in CHECKS.items():
        if wanted not in name:
            continue
        (folder / name).mkdir(exist_ok=True)
        problem, start = "", time.process_time()
        try:
            check(Place(ranks=ranks, folder=folder, scratch=folder / name))
        except Exception:
            problem = f"rank {ranks.rank}: {traceback.format_exc()}"
            print(name, problem, file=sys.stderr)
        print(name, time.process_time() - start, file=sys.stderr)
        problems: list[Any] = [None] * ranks.world_size
        dist.all_gather_object(problems, problem)
        results[name] = "\n".join(filter(None, problems))
        if ranks.is_main:
            (folder / "results.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"], os.environ["MTEDITFLOW_CACHE"] = "1", ""
    run_checks(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "")
