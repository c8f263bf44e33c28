"""What `pytest bench/` does with a GPU, on the CPU as far as it goes: every part at small size, and the true shape on
fake CUDA tensors; the arithmetic, the file.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import measure
import pytest
import test_blocks
import test_iteration
import test_judge
import test_pairs
import torch
from fake_cuda import DEVICE, fake_cuda, walk
from kernel_cases import BLOCK_BYTES, BYTES, CASES, OWN, SHAPES, Case, Ops, Rows, rows_for
from mteditflow_kernels import use_backend
from mteditflow_kernels.static import BLOCK_VARIANTS, VARIANTS
from near import draw
from rich.console import Console
from test_kernels import assert_parity, time_case
from tiny_judge import small_processor, without_video
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorDeviceMismatchError
from torch.utils.checkpoint import checkpoint

from mteditflow import policy as policy_room
from mteditflow.data import training_tasks
from mteditflow.distributed import Ranks
from mteditflow.flow import sigma_schedule
from mteditflow.noise import NoiseSource
from mteditflow.objective import build_objective
from mteditflow.policy import Policy
from mteditflow.policy.published import FLUX_KONTEXT
from mteditflow.profile import random_kontext
from mteditflow.reward.decode import Decoder, gumbel
from mteditflow.reward.qwen3_vl import Picture, make_prompt
from mteditflow.rollout import roll_out
from mteditflow.types import Microbatch

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
ROW = measure.Row(
    case="step, noisy", shape=(16, 4096, 64), dtype="bfloat16", num_bytes=6 * 2**22, us=10.0, eager_us=120.0,
    compiled_us=15.0, launches=1, eager_launches=105, syncs=0, eager_syncs=0, goal_us=12,
)  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "WORKING_SET_BYTES", 4096)
    monkeypatch.setattr(measure, "MIN_REPLAYS", 1)
    monkeypatch.setattr(measure, "MAX_REPLAYS", 1)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_runs(case: Case) -> None:
    row = time_case(case, (2, 16, 8), CPU, None)
    assert (row.case, row.shape, row.compiled_us, row.syncs) == (case.name, (2, 16, 8), None, 0)
    assert row.us > 0 and row.eager_us > 0


def test_parity_sees_a_wrong_op() -> None:
    """A gradient off by 2 percent: bfloat16 rounds by 0.2."""
    case = next(case for case in CASES if case.name == "NFT, backward")
    latents = torch.randn(case.num_latents, 2, 16, 8).bfloat16()

    def prepare(ops: Ops, x: Sequence[Tensor], rows: Rows) -> Callable[[], Tensor]:
        return lambda: case.prepare(ops, x, rows)() * (1.02 if ops is OWN else 1.0)

    wrong = replace(case, prepare=prepare)
    assert_parity(case, latents, rows_for(latents))
    with pytest.raises(AssertionError):
        assert_parity(wrong, latents, rows_for(latents))


@pytest.fixture(scope="module")
def plain() -> Policy:
    return test_blocks.build_policy(test_blocks.PLAIN, test_blocks.SMALL, CPU)


@pytest.mark.parametrize("variant", test_blocks.VARIANTS, ids=lambda variant: variant.name)
def test_a_variant_at_small_size(variant: test_blocks.Variant, plain: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the compiler, which is test_compiled.py's; what needs a GPU is refused in one line."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    if variant.needs_gpu:
        with pytest.raises(ValueError, match=r"^model\.\w+ is '\w+': "):
            test_blocks.build_policy(variant, test_blocks.SMALL, CPU)
        return
    row = test_blocks.time_variant(variant, plain, test_blocks.SMALL, {"bfloat16_tflop_per_s": 1.0})
    assert row["is_equal_with_gradient"] and min(row["ms"].values()) > 0


ONE = replace(test_blocks.TRUE, rows=1, transformer=FLUX_KONTEXT | {"num_layers": 1, "num_single_layers": 1})
FAKEABLE = [  # each costs seconds; peft cannot adapt a fake model, and torch.compile has fake tensors of its own
    variant
    for variant in test_blocks.VARIANTS
    if variant.name in ("eager", "cuDNN's attention", "float8", "checkpointed")
]


@pytest.mark.parametrize("variant", FAKEABLE, ids=lambda variant: variant.name)
def test_a_variant_at_true_shape(variant: test_blocks.Variant) -> None:
    """Forward and backward on fake CUDA tensors: no device is mixed, and no number read."""
    with fake_cuda() as device:
        policy = test_blocks.build_policy(variant, ONE, device)
        calls = test_blocks.calls_of(policy, ONE)
        for kind in ("forward", "both"):
            velocity = calls[f"{kind} 1+1"]()
            assert (velocity.shape, velocity.device, velocity.dtype) == ((1, 1024, 64), device, torch.float32)
        for name, weight in policy.adapters.trainable:
            assert weight.grad is not None and weight.grad.device == device, name


def test_the_whole_model_from_its_blocks() -> None:
    """Blocks of 2 and 3 s and 5 s around them: 19 and 38 of them take 157; 165.4 TFLOP of them at 1024 px."""
    seconds = {f"both {name}": 5 + 2 * double + 3 * single for name, (double, single) in test_blocks.SLICES.items()}
    assert test_blocks.whole_seconds(seconds, "both") == 5 + 2 * 19 + 3 * 38


@pytest.mark.parametrize("iteration", test_iteration.ITERATIONS, ids=lambda iteration: iteration.name)
def test_an_iteration_at_small_size(iteration: test_iteration.Iteration, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy_room, "rows_at_a_time", lambda *_: 2)  # bfloat16 convolutions are slow on a CPU
    row = test_iteration.time_iteration(iteration, test_iteration.SMALL)
    assert row["ratio_error"] == 0 and 0 < row["outside_percent"] < 100 and row["planned_gib"] > 0
    assert (
        set(iteration.goals) <= set(row)
        and row["base"] in ("float32", iteration.name)
        and row["speed/rollout_images_per_second"] > 0
    )


def test_the_iteration_fits_its_card() -> None:
    """By the dry run, an H100 and an H200."""
    for gib in (79.0, 139.0):
        config = test_iteration.fitting(test_iteration.TRUE, gib)
        assert test_iteration.planned_gib(config) < gib
        assert config.rollout.microbatch_size == config.optimizer.microbatch_size >= 1


def test_an_iteration_at_true_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """A turn of a rollout and a microbatch of its update on fake CUDA tensors: text encoders, autoencoder, two blocks.
    No number is read between them.
    """
    monkeypatch.setattr(random_kontext, "FLUX_KONTEXT", ONE.transformer)
    monkeypatch.setattr(random_kontext, "local_device", lambda: DEVICE)
    monkeypatch.setattr(random_kontext, "free_gib", lambda: 80.0)
    scheduler = random_kontext.flux_scheduler()
    monkeypatch.setattr(random_kontext, "flux_scheduler", lambda: scheduler)
    config = test_iteration.with_rows(test_iteration.TRUE, 2)
    config = replace(config, rollout=replace(config.rollout, group_size=2, num_steps=2, window_size=1))
    config = replace(
        config, data=replace(config.data, num_turns=1), model=replace(config.model, compile="off", base="float8")
    )
    objective, ranks = build_objective(config), Ranks(rank=0, world_size=1, device=CPU)
    schedule = objective.schedule(sigma_schedule(2, 1024), 0)
    tasks = [replace(task, source=torch.zeros(3, 512, 512)) for task in training_tasks(config, 0, ranks)]
    part = Microbatch(turn=0, draw=schedule.trained_steps[0], rows=torch.arange(2), weight=torch.ones(2))
    use_backend("reference")
    with fake_cuda() as device:
        policy = random_kontext.random_kontext(config, has_old=False)
        noise = NoiseSource(seed=0, step=0)
        rollout = roll_out(policy, tasks, schedule, noise, config.rollout, num_turns=1, group_size=2)
        loss, _ = objective.loss(policy, rollout, torch.ones(2, 1), part, is_first_update=True)
        loss.backward()
        assert rollout.turns[0].image.shape == (2, 3, 512, 512) and loss.device == device
        for name, weight in policy.adapters.trainable:
            assert weight.grad is not None and weight.grad.device == device, name


def test_fake_cuda_finds_what_a_gpu_would() -> None:
    """A sync, a mix of devices forwards and backwards, a layout; and its gradients have every contribution."""

    scaled_mm: Any = torch.ops.aten._scaled_mm

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            return torch.zeros(grad.shape)  # on the CPU

    with fake_cuda() as device:
        x = torch.randn(16, 32, device=device, requires_grad=True)
        with pytest.raises(DataDependentOutputException):
            x[0, 0].item()
        with pytest.raises(FakeTensorDeviceMismatchError):
            x.add(torch.zeros(16, 32))
        with pytest.raises(AssertionError, match="a gradient on cpu of a tensor on cuda:0"):
            Wrong.apply(x).sum().backward()
        rows, one = x.detach().to(torch.float8_e4m3fn), torch.ones(16, 1, device=device)
        with pytest.raises(RuntimeError, match="col_major"):
            scaled_mm(rows, rows.t().contiguous(), scale_a=one, scale_b=one.t(), out_dtype=torch.bfloat16)
        scaled_mm(rows, rows.t(), scale_a=one, scale_b=one.t(), out_dtype=torch.bfloat16)


def test_the_walk_gives_the_gradients_of_the_engine() -> None:
    """On numbers: a leaf used twice, broadcasting, a change in place of a view, two roots, a checkpoint."""

    def roots(x: Tensor, b: Tensor) -> list[Tensor]:
        y = x * b + x.square()
        y.flatten(0, -2).addmm_(x, b.outer(b))
        both = checkpoint(lambda z: z.unbind(0), y.sin(), use_reentrant=False)
        return [both[0].sum(), both[1] @ b]

    leaves = [(draw(0, 3, 4).requires_grad_(), draw(1, 4).requires_grad_()) for _ in range(2)]
    torch.autograd.backward(roots(*leaves[0]))
    walk(roots(*leaves[1]))
    for expected, found in zip(*leaves, strict=True):
        torch.testing.assert_close(found.grad, expected.grad)


@pytest.mark.parametrize("pair", test_pairs.PAIRS, ids=lambda pair: pair.name)
def test_a_pair_at_small_size(pair: test_pairs.Pair) -> None:
    if pair.needs_gpu:  # its settings at least
        test_pairs.changed(test_pairs.TRUE, pair.on)
        return
    row = test_pairs.time_pair(pair, test_pairs.SMALL)
    assert row["pair"] == pair.name and row["times_off_rollout"] > 0 and row["times_off_update"] > 0


def test_denoising_has_no_sync() -> None:
    test_pairs.test_denoising_has_no_sync()


def test_the_judge_at_small_size() -> None:
    row = test_judge.time_judge(test_judge.SMALL)
    assert row["expected_s"] > 0 and row["eager_token_ms"] > 0 and row["judgements"] == 4


def test_the_judge_at_true_shape() -> None:
    """Two groups and one alone, read and followed by a token, on a GPU as far as devices, shapes and syncs go."""
    with pytest.MonkeyPatch.context() as patch:
        without_video(patch)
        tokenizer = small_processor(16, (64, 4096)).tokenizer
    config = test_judge.build_model(test_judge.TRUE, tokenizer, torch.device("meta"), torch.bfloat16)
    grid, image = torch.tensor([1, 32, 32]), config.config.image_token_id

    def picture(device: torch.device | str) -> Picture:
        features = [torch.zeros(256, 4096, device=device, dtype=torch.bfloat16) for _ in range(4)]
        return Picture(grid=grid, features=features[0], deep=tuple(features[1:]))

    sources, ids = [picture("meta") for _ in range(3)], [*[5] * 99, image, 7, image, 7, image, *[7] * 50, image, 7]
    pictures = [(sources[row // 2], *(picture("meta") for _ in range(3))) for row in range(5)]
    prompts = [make_prompt([*ids, *[7] * row], of_row, config) for row, of_row in enumerate(pictures)]
    use_backend("reference")
    with torch.no_grad(), fake_cuda() as device:
        model = test_judge.build_model(test_judge.TRUE, tokenizer, device, torch.bfloat16)
        prompts = [replace(prompt, pictures=tuple(picture(device) for _ in range(4))) for prompt in prompts]
        decoder = Decoder(model, 0.7)
        logits = decoder._start(prompts, 200)
        assert decoder._buffers and logits.shape == (5, 151936) and logits.device == device
        chance = gumbel(torch.zeros(5, 5, dtype=torch.int64, device=device), 1, 8)
        decoder._buffers.chance[:, :5] = chance
        decoder._step(8, 1536)
        assert decoder._buffers.cache.keys[35].shape == (8, 8, 1536, 128)


def test_bytes_of_the_algorithm() -> None:
    """GRPO forward and backward: 14 bytes per element, so 58.7 MB at 1024 px; every kernel has its bytes."""
    both = next(case for case in CASES if case.name == "GRPO, both")
    assert both.num_bytes(SHAPES[0]) == 14 * 16 * 4096 * 64
    assert BYTES.keys() == VARIANTS.keys() and BLOCK_BYTES.keys() == BLOCK_VARIANTS.keys()
    assert {name for case in CASES for name in case.kernels} <= set(VARIANTS | BLOCK_VARIANTS)


def test_sets_fill_the_working_set() -> None:
    assert [measure.num_sets(size) for size in (4096 * 2, 4096, 2048, 1500, 1)] == [2, 2, 2, 3, 4096]


def test_replays_are_worth_a_median(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "MIN_REPLAYS", 5)
    monkeypatch.setattr(measure, "MAX_REPLAYS", 50)
    assert [measure.num_replays(seconds) for seconds in (1e-4, 0.02, 10.0)] == [50, 15, 5]


def test_medians_are_of_replays_in_turn() -> None:
    order: list[str] = []
    found = measure.medians({name: lambda name=name: order.append(name) for name in ("a", "b")}, CPU)
    assert found.keys() == {"a", "b"} and order == ["a", "b"] * (measure.MIN_REPLAYS + 1)


def test_figures_of_a_row() -> None:
    """25.2 MB in 10 us are 2517 GB/s, of a copy at 4300."""
    figures = ROW.figures(4300)
    assert figures["gb_per_s"] == pytest.approx(2516.58, abs=0.01)
    assert figures["percent_of_copy"] == pytest.approx(100 * 2516.58 / 4300, abs=0.01)
    assert (figures["times_eager"], figures["times_compiled"]) == (12.0, 1.5)


def test_file_and_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is whole after every row, and says which goals are met."""
    monkeypatch.setattr(measure, "COPY_BYTES", 2**16)
    monkeypatch.setattr(measure, "PRODUCT_SIZE", 32)
    facts = measure.session(CPU)
    assert min(facts["ceilings"].values()) > 0 and len(facts["ceilings"]) == 3 and facts["clocks"] == {}
    facts |= {"date": "2026-01-02T03:04:05+00:00", "device": "NVIDIA H200", "ceilings": {"copy_gb_per_s": 4300.0}}
    rows, record = [ROW, replace(ROW, us=20.0, compiled_us=None)], measure.Record(tmp_path / "results", facts)
    assert record.path.name == "2026-01-02T030405-nvidia-h200.json"
    read: dict[str, Any] = {}
    for number, row in enumerate(rows):
        record.add("kernels", row.figures(4300.0), {"us": measure.Goal(value=12)})
        read = json.loads(record.path.read_text())
        assert len(read["kernels"]) == number + 1
    assert [row["goals"]["us"] for row in read["kernels"]] == [
        {"goal": 12, "is_met": True},
        {"goal": 12, "is_met": False},
    ]
    assert read["versions"]["torch"] == torch.__version__ and read["kernels"][1]["times_compiled"] is None
    record.add("iterations", {"rate": 1.4}, {"rate": measure.Goal(value=1.35, is_least=True)})
    assert record.found["iterations"][0]["goals"]["rate"]["is_met"]
    text = StringIO()
    console = Console(width=160, file=text)
    console.print(measure.table(facts, rows))
    first, second = (line for line in text.getvalue().splitlines() if "step, noisy" in line)
    assert [cell.strip() for cell in first.split("│")[3:-1]] == [
        *("10.0", "12", "2517", "59", "12.0", "1.5", "1 (105)", "0 (0)")
    ]
    assert "missed 12" in second


def test_what_is_missing_is_one_line() -> None:
    """On a machine without a package, and with an old torch; on this one nothing is missing."""
    code = (
        "import importlib.metadata as metadata, pytest\n"
        "found = metadata.version\n"
        "def version(name):\n"
        "    if name == 'jsonargparse':\n"
        "        raise metadata.PackageNotFoundError(name)\n"
        "    return '2.10.0' if name == 'torch' else found(name)\n"
        "metadata.version = version\n"
        "raise SystemExit(pytest.main(['-q', '-p', 'no:cacheprovider', 'bench/test_pairs.py']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    (line,) = [line for line in (done.stdout + done.stderr).splitlines() if "missing" in line]
    assert done.returncode == 2
    assert "jsonargparse>=4.44 (absent)" in line and "(here: 2.10.0)" in line and "bench/README.md" in line
    assert line.count("(") == 2
