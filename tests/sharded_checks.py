"""What test_sharded.py runs on several ranks: a policy that is cut over two beside one that each rank has whole, and
what 4 ranks save and 2, 1 and 8 read (sharded_state.py).

    python sharded_checks.py FOLDER [PART OF A NAME]

Each check is a function; what it raised on any rank is written to FOLDER/results.json under its name. Ranks are forks
of one process that has imported everything, which takes longer than most checks.
"""

import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny_qwen
import torch
import torch.distributed as dist
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from flux2_parts import MAX_TEXT_TOKENS, save_tiny
from mixed_sizes import SQUARE, TALL, WIDE, evaluated, of_sizes
from sharded_parts import assert_equal_bits, inputs, perturb, velocities_and_gradients
from sharded_state import (
    check_best,
    check_damaged,
    check_faults,
    check_other_model,
    check_resumed,
    check_saved,
    check_trained,
)
from torch.distributed.tensor import DTensor

from mteditflow import policy as policies
from mteditflow.config import (
    Config,
    DataConfig,
    EvaluationConfig,
    LoraConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RolloutConfig,
    RunConfig,
)
from mteditflow.config.distributed import DistributedConfig
from mteditflow.data import training_tasks
from mteditflow.distributed import Ranks, alone
from mteditflow.objective import build_objective
from mteditflow.policy import Policy, build_policy
from mteditflow.policy.optimizer import build_optimizer
from mteditflow.policy.pipelines import load_pipeline
from mteditflow.record.metrics import read_lines
from mteditflow.reward.overlap import join
from mteditflow.rollout import sample_waves
from mteditflow.train import train
from mteditflow.transformer import compiled
from mteditflow.transformer.sharded import clip_, cut_like, make_mesh, whole_on_host
from mteditflow.update import update

LORA, FULL = LoraConfig(rank=4, alpha=16), LoraConfig(is_full=True, targets=())
SIZE, NUM_ROWS = 64, 2
DEADLINE = 120  # seconds after which a rank that waits for another counts as hung
CUTS = ("full", "hybrid")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a check runs."""

    ranks: Ranks
    folder: Path  # of the test, with the pipelines
    scratch: Path  # of the check, seen by all ranks

    def model(self, **fields: Any) -> ModelConfig:
        """The tiny FLUX.1-Kontext."""
        return ModelConfig(path=str(self.folder / "kontext"), max_text_tokens=8, **fields)


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
    """Bits of a base that is not cut, with blocks run again for the backward pass too, and replayed."""
    cut, whole = both(place, place.model(base=base), LORA)
    rank = place.ranks.rank

    def checkpoint(policy: Policy) -> None:
        policy.pipeline.transformer.enable_gradient_checkpointing()

    for change in (None, checkpoint, *([Policy.replay] if base == "float32" else ())):
        for policy in (cut, whole):
            if change:
                change(policy)
            for _, weight in policy.adapters.trainable:
                weight.grad = None
        assert_equal_bits(velocities_and_gradients(cut, rank), velocities_and_gradients(whole, rank))
    # shards of rows that two does not divide are padded: a row of some small weights
    assert 0.4 < share_of_weights(cut) < 0.6
    assert not any(isinstance(weight, DTensor) for weight in cut.adapters.parameters())


def check_family(place: Place, folder: str, **fields: Any) -> None:
    """Bits of another family's editor, in bfloat16."""
    model = ModelConfig(path=str(place.folder / folder), base="bfloat16", **fields)
    cut, whole = both(place, model, LORA)
    rank = place.ranks.rank
    assert_equal_bits(velocities_and_gradients(cut, rank), velocities_and_gradients(whole, rank))
    assert 0.4 < share_of_weights(cut) < 0.6


def small_run(place: Place, shard: Any, **fields: Any) -> Config:
    """One iteration of four trajectories on two ranks, a row at a time."""
    return Config(
        model=place.model(**fields), lora=LORA, data=DataConfig(num_turns=1),
        rollout=RolloutConfig(num_tasks=2, group_size=2, num_steps=2, window_size=1, microbatch_size=1),
        objective=ObjectiveConfig(name="grpo"), optimizer=OptimizerConfig(microbatch_size=1),
        evaluation=EvaluationConfig(num_sessions=3, num_sessions_short=3, num_strips=1, num_steps=1, every=0),
        distributed=DistributedConfig(shard=shard), run=RunConfig(folder=str(place.scratch / shard), num_iterations=1),
    )  # fmt: skip


def check_unequal(place: Place) -> None:
    """One rank has nothing to learn from, and makes as many forward passes as the other: else they wait for each other
    until the deadline. The step is the one of a base that is not cut.
    """
    after, ranks = [], place.ranks
    for shard in ("full", "none"):
        config = small_run(place, shard)
        mesh, objective = make_mesh(config.distributed, ranks), build_objective(config)
        policy = build_policy(config.model, config.lora, 0, has_old=False, mesh=mesh)
        perturb(policy, "current")
        waves = sample_waves(policy, objective, training_tasks(config, 0, ranks), config, 0, ranks)
        rollout = join(waves)
        advantages = torch.tensor([[1.0], [-1.0]]) * (ranks.rank == 0)
        optimizer = build_optimizer(policy, config)
        figures = update(policy, optimizer, objective, rollout, advantages, config, ranks)
        assert figures["update/grad_norm"] > 0 and figures["update/num_transitions"] == 2
        after.append([*policy.adapters.state("current").values()])
    assert_equal_bits(*after)


def check_sizes(place: Place) -> None:
    """Ranks whose pictures have other sizes make as many forward passes, in rollout, update and evaluation, with the
    bits of a base that is not cut.
    """
    after, ranks = [], place.ranks
    for shard in ("full", "none"):
        config = small_run(place, shard)
        mesh, objective = make_mesh(config.distributed, ranks), build_objective(config)
        policy = build_policy(config.model, config.lora, 0, has_old=False, mesh=mesh)
        perturb(policy, "current")
        tasks = of_sizes(training_tasks(config, 0, ranks), [[WIDE], [SQUARE]][ranks.rank])
        rollout = join(sample_waves(policy, objective, tasks, config, 0, ranks))
        advantages = torch.tensor([[1.0], [-1.0]])
        update(policy, build_optimizer(policy, config), objective, rollout, advantages, config, ranks)
        many = replace(config, rollout=replace(config.rollout, num_tasks=5))
        sessions = of_sizes(training_tasks(many, 0, alone()), [WIDE, SQUARE, SQUARE, TALL, WIDE])
        found = evaluated(policy, many, sessions, ranks)
        after.append([*policy.adapters.state("current").values(), found.consistency, found.images])
    assert_equal_bits(*after)


def check_run(place: Place, objective: Any, lora: LoraConfig, tolerance: float, **fields: Any) -> None:
    """A whole run, its evaluations, the base's error, checkpoint and export, has the metrics of one that is not cut."""
    lines, evaluations = [], []
    for shard in ("none", "full"):
        config = small_run(place, shard, **fields)
        train(replace(config, objective=ObjectiveConfig(name=objective), lora=lora), place.ranks)
        place.ranks.barrier()
        folder = Path(config.run.folder)
        lines += read_lines(folder / "metrics.jsonl")
        evaluations.append([(folder / f"evaluation_{when}.json").read_text() for when in ("before", "after")])
    whole, cut = lines
    assert whole.keys() == cut.keys() and whole["update/num_transitions"] > 0
    assert any(name.startswith("base/") for name in whole) == ("base" in fields)
    for name, value in whole.items():
        is_of_training = name.split("/")[0] in ("update", "reward", "drift", "alarm", "base")
        if is_of_training and not name.endswith(("_s", "_efficiency")):
            assert cut[name] == pytest.approx(value, rel=tolerance, abs=tolerance, nan_ok=True), name
    assert evaluations[0][0] == evaluations[1][0] and (tolerance > 0 or evaluations[0] == evaluations[1])
    if lora.is_full:
        mine, other = (
            FluxTransformer2DModel.from_pretrained(
                place.scratch / name / "weights", subfolder="transformer"
            ).state_dict()
            for name in ("full", "none")
        )
        # AdamW's first step is as large as the learning rate, 3e-4, where a gradient is rounding alone
        assert mine.keys() == other.keys() and all((mine[key] - other[key]).abs().max() <= 6e-4 for key in mine)


def check_compiled(place: Place) -> None:
    """Blocks that were compiled before they were cut are compiled still, and can be run eagerly after all."""
    compiled.BACKEND, compiled.OPTIONS = "eager", {}
    rank, before = place.ranks.rank, compiled.count_graphs()[0]
    cut, whole = both(place, place.model(compile="blocks"), LORA)
    mine = velocities_and_gradients(cut, rank)
    found = compiled.count_graphs()[0]
    assert found >= before + 4  # two classes of block, with gradients and without
    assert_equal_bits(mine, velocities_and_gradients(whole, rank))
    found = compiled.count_graphs()[0]
    for policy in (cut, whole):
        policy.run_eagerly()
        for _, weight in policy.adapters.trainable:
            weight.grad = None
    assert_equal_bits(velocities_and_gradients(cut, rank), velocities_and_gradients(whole, rank))
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


Check = Callable[[Place], None]
MODELS: dict[str, Check] = {
    "unequal": check_unequal,
    "sizes": check_sizes,
    "klein": partial(check_family, folder="klein", max_text_tokens=MAX_TEXT_TOKENS["klein"]),
    "qwen": partial(check_family, folder="qwen", vision_pixels=4096, max_text_tokens=5, cfg_scale=4.0),
    "run_lora": partial(check_run, objective="grpo", lora=LORA, tolerance=0.0, base="float8"),
    "run_full": partial(check_run, objective="nft", lora=FULL, tolerance=1e-5),
    **{f"lora_{base}": partial(check_lora, base=base) for base in ("float32", "bfloat16", "float8")},
    "compiled": check_compiled,
    "full_float32": partial(check_full, base="float32"),
    "full_bfloat16_targets": partial(check_full, base="bfloat16", targets=("attn.to_q", "proj_out", "norm.linear")),
}


def of_state(check: Callable[..., None], **options: Any) -> Check:
    return lambda place: check(place.ranks, place.scratch, **options)


def resumed(kind: str, *sources: str) -> dict[str, Check]:
    """Checks that read what four ranks have written, into what is cut so."""
    return {
        f"from_{source}_to_{kind}": lambda place, source=source: check_resumed(
            place.ranks, place.folder / f"saved_{source}", kind
        )
        for source in sources
    }


def other_model(place: Place) -> None:
    check_other_model(place.ranks, place.folder / "saved_full")


PHASES: list[tuple[int, dict[str, Check]]] = [
    (
        4,
        {
            **{f"trained_{kind}": lambda place, kind=kind: check_trained(place.ranks, kind) for kind in CUTS},
            **{f"saved_{kind}": of_state(check_saved, kind=kind) for kind in ("full", "hybrid", "none")},
            **{f"best_{kind}": of_state(check_best, kind=kind) for kind in ("full", "none")},
            "damaged": of_state(check_damaged),
            "faults": of_state(check_faults),
        },
    ),
    (1, resumed("none", "full", "hybrid")),
    (8, resumed("full", "full", "none") | resumed("hybrid", "hybrid")),
    (2, resumed("full", "full", "hybrid", "none") | resumed("none", "full") | {"other_model": other_model} | MODELS),
]


def run_checks(folder: Path, checks: dict[str, Check], ranks: Ranks) -> None:
    """Run checks on a rank, one after the other, and gather what was raised."""
    for name, check in checks.items():
        (folder / name).mkdir(exist_ok=True)
        problem, start = "", time.process_time()
        try:
            check(Place(ranks=ranks, folder=folder, scratch=folder / name))
        except Exception:
            problem = traceback.format_exc()
        if ranks.is_main:
            print(f"{name}: {time.process_time() - start:.1f} s", file=sys.stderr)
        problems = ranks.gather_objects(problem)
        if ranks.is_main:
            said = "\n".join(f"rank {rank}: {problem}" for rank, problem in enumerate(problems) if problem)
            (folder / f"{name}-{ranks.world_size}.txt").write_text(said)


def be_rank(rank: int, world_size: int, port: int, folder: Path, names: list[str], more: dict[str, Check]) -> None:
    """Be one of the ranks, two of which make a node. more: checks besides those of PHASES."""
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank % 2), "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "HF_HUB_OFFLINE": "1", "MTEDITFLOW_CACHE": "",
    }  # fmt: skip
    torch.set_num_threads(1)
    checks = dict(PHASES)[world_size] | more
    if world_size > 1:
        dist.init_process_group("gloo", timeout=timedelta(seconds=DEADLINE))
    with pytest.MonkeyPatch.context() as patch:
        tiny_qwen.without_torchvision(patch)
        patch.setattr(policies, "load_pipeline", load_aligned)
        ranks = Ranks(rank=rank, world_size=world_size, device=torch.device("cpu"))
        run_checks(folder, {name: checks[name] for name in names}, ranks)
    if world_size > 1:
        dist.destroy_process_group()


def start(world_size: int, folder: Path, names: list[str], more: dict[str, Check] | None = None) -> None:
    """Run checks on so many ranks, of PHASES or `more`, and wait for them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    # a fork of torch for CUDA (2.11) ended without a word, of which the cause is not known
    context: Any = multiprocessing.get_context("spawn" if torch.version.cuda else "fork")
    given = world_size, port, folder, names, more or {}
    processes = [context.Process(target=be_rank, args=(rank, *given)) for rank in range(world_size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


def load_aligned(config: ModelConfig, packages: tuple[str, ...] = ()) -> Any:
    """Load a pipeline, with weights that begin at 64 bytes, as what is gathered does. A file's do not, by which a
    matrix product on a CPU takes sums in another order.
    """
    pipeline = load_pipeline(config, packages)
    for weight in pipeline.transformer.parameters():
        weight.data = weight.data.clone()
    return pipeline


def main(folder: Path, wanted: str) -> None:
    """Run the checks whose names have a part that is wanted, one of several between commas."""
    save_tiny(folder / "klein", "klein")
    with pytest.MonkeyPatch.context() as patch:
        tiny_qwen.without_torchvision(patch)
        tiny_qwen.save("edit", tiny_qwen.PROMPTS, folder / "qwen")
    for world_size, checks in PHASES:
        chosen = [name for name in checks if any(part in name for part in wanted.split(","))]
        if chosen:
            start(world_size, folder, chosen)


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"], os.environ["MTEDITFLOW_CACHE"] = "1", ""
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "")
