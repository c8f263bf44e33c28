"""What test_traffic.py runs on two and on four ranks: an iteration of the trainer, whose collectives are counted.

python traffic_ranks.py FOLDER
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from sharded_checks import Place, start
from torch import Tensor

from mteditflow.config import Config
from mteditflow.config.cli import from_overrides
from mteditflow.data import training_tasks
from mteditflow.distributed import alone
from mteditflow.objective import build_objective
from mteditflow.policy import build_policy
from mteditflow.policy.optimizer import build_optimizer
from mteditflow.record.alarms import rollout_figures
from mteditflow.reward import Judged, build_reward
from mteditflow.rollout import sample_waves
from mteditflow.transformer.sharded import make_mesh
from mteditflow.update import update

SETTINGS: dict[str, Any] = {
    "rollout.num_tasks": 2, "rollout.group_size": 4, "rollout.num_steps": 3, "rollout.microbatch_size": 2,
    "optimizer.microbatch_size": 2, "lora.rank": 4, "lora.alpha": 4, "data.num_turns": 2, "model.compile": "off",
}  # fmt: skip
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "whole": (2, {}),
    "two updates": (4, {"optimizer.num_updates": 2}),
    "cut": (4, {"distributed.shard": "full"}),
    "cut by node": (4, {"distributed.shard": "hybrid", "model.base": "int8"}),
    "all trained": (2, {"distributed.shard": "full", "lora.is_full": True}),
    "all trained, by node": (4, {"distributed.shard": "hybrid", "lora.is_full": True}),
}
KINDS = {
    "sum": ("all_reduce",),
    "gather": ("all_gather", "all_gather_into_tensor", "all_gather_single"),
    "scatter": ("reduce_scatter_tensor", "reduce_scatter_single"),
}


def config_of(folder: Path, case: str) -> Config:
    """The config of a case, on a tiny pipeline."""
    num_ranks, fields = CASES[case]
    model = {"model.path": str(folder / "kontext"), "model.max_text_tokens": 8, "run.num_gpus": num_ranks}
    return from_overrides(SETTINGS | model | fields)


def count_collectives(counted: Counter[str], calls: Counter[str]) -> None:
    """Have torch's collectives count the bytes of all ranks that they gather or scatter, of one that they sum."""
    for kind, names in KINDS.items():
        for name in names:
            if hasattr(dist, name):
                setattr(dist, name, _counting(getattr(dist, name), kind, counted, calls))


def _counting(plain: Callable[..., Any], kind: str, counted: Counter[str], calls: Counter[str]) -> Callable[..., Any]:
    def counting(*args: Any, **rest: Any) -> Any:
        tensors = [*args, *rest.values()]
        is_figure = any(isinstance(v, Tensor) and (v.dtype == torch.float64 or v.numel() == 1) for v in tensors)
        counted["figures" if is_figure else kind] += max(_size(value) for value in tensors)
        calls[kind] += not is_figure
        return plain(*args, **rest)

    return counting


def _size(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(_size, value)) if isinstance(value, list) else 0


def count_iteration(case: str, place: Place) -> None:
    """Write what an iteration sends, by kind of collective."""
    config, ranks, counted, calls = config_of(place.folder, case), place.ranks, Counter[str](), Counter[str]()
    objective = build_objective(config)
    mesh = make_mesh(config.distributed, ranks)
    policy = build_policy(config.model, config.lora, 0, has_old=objective.has_old, mesh=mesh)
    optimizer, rewards = build_optimizer(policy, config), build_reward(config)
    count_collectives(counted, calls)
    tasks = training_tasks(config, 0, ranks)
    (rollout,) = sample_waves(policy, objective, tasks, config, 0, ranks)
    judged = Judged([rewards(rollout)], config, ranks)
    update(policy, optimizer, objective, rollout, everybody(judged), config, ranks)
    rollout_figures(rollout, judged.scores, ranks)
    if ranks.is_main:
        (place.folder / f"{case}.json").write_text(json.dumps({"bytes": counted, "calls": calls}))


def everybody(judged: Judged) -> Any:
    """Advantages of which none is 0, so that all is trained on."""
    return [torch.where(part >= 0, 1.0, -1.0) for part in judged]


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"], os.environ["MTEDITFLOW_CACHE"] = "1", ""
    torch.set_num_threads(1)
    config = config_of(Path(sys.argv[1]), "whole")
    policy = build_policy(config.model, config.lora, 0, has_old=True)
    tasks = training_tasks(config, 0, alone())
    next(sample_waves(policy, build_objective(config), tasks, config, 0, alone()))  # what this imports, ranks need not
    for num_ranks in (2, 4):
        checks = {name: partial(count_iteration, name) for name, (number, _) in CASES.items() if number == num_ranks}
        start(num_ranks, Path(sys.argv[1]), list(checks), checks)
