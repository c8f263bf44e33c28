"""On a GPU: the bits of a row whatever runs beside it, and the trainer with Triton against the trainer without."""

from collections.abc import Callable
from pathlib import Path

import measure
import pytest
import torch
from mteditflow_kernels import grpo_loss, nft_loss, sde_log_prob, sde_step, use_backend
from near import make_keys
from torch import Tensor

from mteditflow.config.command import train as main
from mteditflow.flow import sigma_schedule, step_table
from mteditflow.record.metrics import read_lines

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA GPU: only static figures and eager CPU times"
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPE = (16, 1024, 64)
NUM_LAUNCHES = 100
STEP = 5


def inputs(shape: tuple[int, ...] = SHAPE) -> Tensor:
    """(5, *shape) bfloat16."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    return torch.randn(5, *shape, device=DEVICE, generator=generator).bfloat16()


def outputs(x: Tensor, keys: Tensor, table: Tensor) -> dict[str, Tensor]:
    """Of latents (5, B, L, C): what every kernel that sums by arrival writes, and the gradients behind it."""
    velocity, ones = x[0].detach().requires_grad_(), torch.ones(x.shape[1], device=x.device)
    made, log_prob = sde_step(x[0], x[1], table, STEP, keys)
    replayed = sde_log_prob(velocity, x[1], made, table, STEP)
    (log_prob_grad,) = torch.autograd.grad(replayed.sum(), velocity)
    policy, _ = grpo_loss(
        velocity, x[1], made, log_prob - 1e-4, ones, table, STEP, clip_range=1e-3, kl_beta=0.1, ref_velocity=x[2],
        weight=ones,
    )  # fmt: skip
    (grpo_grad,) = torch.autograd.grad(policy, velocity)
    fit, _ = nft_loss(
        velocity, x[2], x[3], x[4], 0.7 * ones, 0.3 * ones, beta=1.0, kl_beta=0.1, ref_velocity=x[1], weight=ones
    )
    (nft_grad,) = torch.autograd.grad(fit, velocity)
    found = {"made": made, "log_prob": log_prob, "replayed": replayed.detach(), "log_prob_grad": log_prob_grad}
    return found | {"grpo_grad": grpo_grad, "nft_grad": nft_grad, "grpo": policy.detach(), "nft": fit.detach()}


def differ(found: dict[str, Tensor], expected: dict[str, Tensor]) -> Tensor:
    """0-d bool, without a sync."""
    return torch.stack([(found[name] != expected[name]).any() for name in expected]).any()


def the_table() -> Tensor:
    return step_table(sigma_schedule(12, 1024), noise_level=0.9).to(DEVICE)


def test_a_row_has_the_same_bits_alone() -> None:
    x, keys, table = inputs(), make_keys(16).to(DEVICE), the_table()
    together = outputs(x, keys, table)
    assert all(value.isfinite().all() for value in together.values())
    for row in range(16):
        own = slice(row, row + 1)
        expected = {name: value[own] for name, value in together.items() if value.ndim}  # the losses are of all rows
        assert not differ(outputs(x[:, own].contiguous(), keys[own], table), expected), row


@pytest.mark.parametrize("shape", [(16, 4096, 64), (1, 1024, 64), (3, 1000, 7)], ids=str)
def test_repeated_launches_have_the_same_bits(shape: tuple[int, ...]) -> None:
    """The program that arrives last changes from launch to launch; what it sums must not. The replayed log-prob is the
    sampled one.
    """
    x, keys, table = inputs(shape), make_keys(shape[0]).to(DEVICE), the_table()
    first = outputs(x, keys, table)
    assert torch.equal(first["log_prob"], first["replayed"])
    assert not torch.stack([differ(outputs(x, keys, table), first) for _ in range(NUM_LAUNCHES)]).any()


def test_two_streams_at_once() -> None:
    """Each stream has tickets of its own. Two graphs, so that the host does not keep the streams apart."""
    x, keys, table = inputs(), make_keys(16).to(DEVICE), the_table()
    expected = outputs(x, keys, table)
    num_wrong = [torch.zeros((), dtype=torch.int64, device=DEVICE) for _ in range(2)]

    def calls(wrong: Tensor) -> list[measure.Call]:
        return [lambda: wrong.add_(differ(outputs(x, keys, table), expected))] * 10

    replays = [measure.replay_of(lambda wrong=wrong: calls(wrong), DEVICE) for wrong in num_wrong]
    streams = [torch.cuda.Stream() for _ in replays]
    torch.cuda.synchronize()
    for _ in range(NUM_LAUNCHES // 10):
        for stream, replay in zip(streams, replays, strict=True):
            with torch.cuda.stream(stream):
                replay()
    torch.cuda.synchronize()
    assert [wrong.item() for wrong in num_wrong] == [0, 0]


@pytest.fixture
def trained(tmp_path: Path) -> Callable[[str, str], list[dict[str, float]]]:
    """The metrics of two iterations of the default run by an objective and a backend."""

    def train(objective: str, backend: str) -> list[dict[str, float]]:
        values = {
            "objective.name": objective,
            "rollout.num_tasks": 2,
            "evaluation.num_sessions": 4,
            "evaluation.num_sessions_short": 2,
            "evaluation.num_strips": 1,
            "run.num_iterations": 2,
            "run.folder": tmp_path / f"{objective}-{backend}",
            "run.backend": backend,
        }
        try:
            main([word for name, value in values.items() for word in (f"--{name}", str(value))])
        finally:
            use_backend("auto")
        return read_lines(tmp_path / f"{objective}-{backend}" / "metrics.jsonl")

    return train


@pytest.mark.parametrize("objective", ["grpo", "nft"])
def test_training(objective: str, trained: Callable[[str, str], list[dict[str, float]]]) -> None:
    """Both backends see the same world; their noise differs by NORMAL_ERROR (3e-6), which an 8-bit picture rounds away
    but for a few pixels: a grade may cross its threshold, so scores agree to 2 of 96 verdicts, and gradients to what
    those do to the advantages. (Under the interpreter the scores were equal and the first gradient 6e-7 apart.)
    """
    triton, eager = trained(objective, "triton"), trained(objective, "reference")
    for line in triton + eager:
        assert objective == "nft" or line["update/first_ratio_error"] == 0
    for own, other in zip(triton, eager, strict=True):
        assert own.keys() == other.keys()
        assert own["reward/instruction"] == pytest.approx(other["reward/instruction"], abs=2 / 96)
        assert own["update/grad_norm"] == pytest.approx(other["update/grad_norm"], rel=0.1)
