"""What `pytest bench/` does with a GPU, on the CPU as far as it goes: every case, the arithmetic, the file."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path

import measure
import pytest
import torch
from kernel_cases import BYTES, CASES, OWN, SHAPES, Case, Ops, Rows, rows_for
from mteditflow_kernels.static import VARIANTS
from rich.console import Console
from test_kernels import assert_parity, denoise_without_sync, time_case, time_rollout
from torch import Tensor

from mteditflow.config import Config, DataConfig
from mteditflow.data import training_tasks
from mteditflow.distributed import Ranks
from mteditflow.objective import build_objective
from mteditflow.policy import build_policy
from mteditflow.rollout import denoise, sample_rollout

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


def test_a_rollout_runs(tiny_config: Config) -> None:
    config = replace(tiny_config, data=DataConfig(num_turns=1))
    policy = build_policy(config.model, config.lora, seed=0, has_old=False)
    seconds = time_rollout(policy, config, ("auto", "off"))
    assert seconds.keys() == {"auto", "off"} and min(seconds.values()) > 0
    tasks = training_tasks(config, 0, Ranks(rank=0, world_size=1, device=CPU))
    rollout = sample_rollout(policy, build_objective(config), tasks, config, 0)
    denoise_without_sync(policy, rollout, denoise)


def test_bytes_of_the_algorithm() -> None:
    """GRPO forward and backward: 14 bytes per element, so 58.7 MB at 1024 px; every kernel has its bytes."""
    both = next(case for case in CASES if case.name == "GRPO, both")
    assert both.num_bytes(SHAPES[0]) == 14 * 16 * 4096 * 64
    assert {name for case in CASES for name in case.kernels} <= set(VARIANTS) and BYTES.keys() == VARIANTS.keys()


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
    monkeypatch.setattr(measure, "COPY_BYTES", 2**16)
    facts = measure.session(CPU)
    assert facts["ceilings"]["copy_gb_per_s"] > 0
    facts |= {"date": "2026-01-02T03:04:05+00:00", "device": "NVIDIA H200", "ceilings": {"copy_gb_per_s": 4300.0}}
    rows = [ROW, replace(ROW, us=20.0, compiled_us=None)]
    path = measure.write(tmp_path / "results", facts, rows, {"on": 0.5, "off": 0.75})
    assert path.name == "2026-01-02T030405-nvidia-h200.json"
    read = json.loads(path.read_text())
    assert read["rollout_s"] == {"on": 0.5, "off": 0.75}
    assert read["versions"]["torch"] == torch.__version__ and read["kernels"][1]["times_compiled"] is None
    text = StringIO()
    console = Console(width=160, file=text)
    console.print(measure.table(facts, rows))
    first, second = (line for line in text.getvalue().splitlines() if "step, noisy" in line)
    assert [cell.strip() for cell in first.split("│")[3:-1]] == [
        *("10.0", "12", "2517", "59", "12.0", "1.5", "1 (105)", "0 (0)")
    ]
    assert "missed 12" in second
