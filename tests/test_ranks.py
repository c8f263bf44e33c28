"""One, two and four ranks give the same numbers: to the bit what is made and scored, to rounding what is summed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forked_ranks
import pytest
import safetensors.torch
import torch
from near import ROUNDING
from torch import Tensor
from train_runs import Arguments, metrics

from mteditflow.config import Config, cli
from mteditflow.config.command import train as main
from mteditflow.data import training_tasks
from mteditflow.distributed import alone
from mteditflow.objective import build_objective
from mteditflow.policy import build_policy
from mteditflow.reward import Judged, build_reward
from mteditflow.rollout import sample_rollout
from mteditflow.update import Microbatches

NUMBERS = (1, 2, 4)
U = ROUNDING[torch.float32]
# Two groups of four, of which four ranks have halves, in chunks of two; a step that no picture shows.
SIZE = {
    "rollout__num_tasks": 2, "evaluation__every": 1, "run__num_iterations": 2, "optimizer__max_grad_norm": 1e6,
    "optimizer__learning_rate": 1e-7, "optimizer__schedule": "constant", "optimizer__num_updates": 1,
    "evaluation__num_sessions": 5, "run__num_judged": 16, "rollout__wave_size": 4,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "grpo": {"optimizer__num_updates": 2, "advantage__consistency_weight": 0.1},  # std group: by group where whole
    "nft": {"objective__name": "nft", "objective__nft_num_times": 2, "advantage__std": "global"},
    "sharded": {"objective__name": "nft", "objective__nft_num_times": 2, "advantage__std": "global"},
}
Runs = dict[tuple[str, int], Path]


@pytest.fixture(scope="module")
def runs(arguments: Arguments, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The run folder of every case on each number of ranks; nothing is cut on one."""
    parent = tmp_path_factory.mktemp("ranks")
    made = {(name, num): parent / f"{name}-{num}" for name in CASES for num in NUMBERS}
    for (name, num), folder in made.items():
        words = arguments(folder, **(SIZE | CASES[name]))
        if num == 1:
            main([*words, "--reward.overlap", "off", "--rollout.wave_size", "8"])  # in one wave, the judge after it
            continue
        cut = ["--distributed.shard", "full"] if name == "sharded" else []
        log = parent / f"{name}-{num}.log"
        code = forked_ranks.start(log, [*words, *cut], num_ranks=num).wait()
        assert code == 0, log.read_text()
        assert "\r" not in log.read_text()  # piped: no progress bar
    return made


@pytest.mark.parametrize("num", NUMBERS[1:])
@pytest.mark.parametrize("name", CASES)
def test_metrics_do_not_depend_on_the_number_of_ranks(runs: Runs, name: str, num: int) -> None:
    """What is made and scored to the bit; what is summed over rows to 1e-5, hundreds of roundings."""
    one, many = metrics(runs[name, 1]), metrics(runs[name, num])
    assert len(one) == len(many) == 2
    for line, expected in zip(many, one, strict=True):
        assert line.keys() == expected.keys()
        for key, value in expected.items():
            if key.startswith("update/"):
                assert line[key] == pytest.approx(value, rel=1e-5, abs=1e-9), key
            else:
                assert line[key] == value, key
    first, second = ((runs[name, n] / "evaluation_before.json").read_text() for n in (1, num))
    assert first == second
    first, second = (runs[name, n] / "judge" for n in (1, num))  # of sessions that other ranks made, too
    assert (first / "training.jsonl").read_text() == (second / "training.jsonl").read_text()
    strips = [path.name for path in first.rglob("*.png")]
    assert len(strips) > 4 and all(
        one.read_bytes() == (second / one.relative_to(first)).read_bytes() for one in first.rglob("*.png")
    )


@pytest.mark.parametrize("num", NUMBERS[1:])
@pytest.mark.parametrize("name", ["nft", "sharded"])
def test_the_gradient_is_the_sum_in_another_order(runs: Runs, name: str, num: int) -> None:
    """n numbers g added up in any order are off by at most (n - 1) u sum |g|, u a rounding: two orders by twice that.
    Adam's first moment is a tenth of the first gradient, in two roundings.
    """
    bound = 2 * spread(runs[name, 1])
    first, second = (moment(runs[name, n]) for n in (1, num))
    assert bool(first.any()) and bool(((second - first).abs() <= 0.1 * bound + 2 * U * first.abs()).all())
    assert not torch.equal(first, second)  # else the bound is never put to the test


def moment(folder: Path) -> Tensor:
    """Adam's first moment of all parameters in a row, after the first iteration."""
    state = safetensors.torch.load_file(folder / "checkpoints" / "iteration-000001" / "optimizer.safetensors")
    keys = sorted((key for key in state if key.endswith(".exp_avg")), key=lambda key: int(key.split(".")[0]))
    return torch.cat([state[key].flatten() for key in keys])


def spread(folder: Path) -> Tensor:
    """(n - 1) u sum |g| of the n microbatches' gradients in the first iteration, for every element."""
    config = cli.from_yaml(folder / "config.yaml")
    gradients = list(microbatch_gradients(config))
    assert len(gradients) > 4
    return (len(gradients) - 1) * U * torch.stack(gradients).abs().sum(0)


def microbatch_gradients(config: Config) -> Iterator[Tensor]:
    """The gradient of every microbatch of the first iteration, all parameters in a row."""
    objective = build_objective(config)
    policy = build_policy(config.model, config.lora, config.run.seed, has_old=objective.has_old)
    rollout = sample_rollout(policy, objective, training_tasks(config, 0, alone()), config, 0)
    judged = Judged([build_reward(config)(rollout)], config, alone())
    microbatches = Microbatches(rollout, objective, config, alone())
    for _, microbatch in microbatches(judged):
        loss, _ = objective.loss(policy, rollout, microbatches.advantages, microbatch, is_first_update=True)
        weights = [weight for _, weight in policy.adapters.trainable]
        gradients = torch.autograd.grad(loss, weights)
        yield torch.cat([gradient.flatten() for gradient in gradients])
