"""One line per iteration whatever happens, and pictures that are what they say."""

import errno
import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mteditflow.distributed import Ranks
from mteditflow.record.metrics import Reporter, Tally, read_lines, summary, used_memory

VALUES = {
    "reward/mean": 0.1 + 0.2,
    "reward/instruction": 0.5,
    "reward/consistency": math.nan,
    "update/grad_norm": math.inf,
    "time/denoise_s": 2.0,
    "time/other_s": 1.5,
}


def open_reporter(folder: Path, iteration: int = 0) -> Reporter:
    return Reporter(folder, iteration=iteration, num_iterations=10)


def test_a_line_per_iteration(tmp_path: Path) -> None:
    reporter = open_reporter(tmp_path)
    reporter.write(0, VALUES)
    written = (tmp_path / "metrics.jsonl").read_text()  # before close: nothing is held back
    reporter.image("strip", 0, torch.zeros(3, 4, 4))
    reporter.close()
    assert written.count("\n") == 1 and "NaN" not in written and "Infinity" not in written
    line = json.loads(written)
    assert line["iteration"] == 0 and line["reward/mean"] == 0.1 + 0.2
    assert line["reward/consistency"] is None and line["update/grad_norm"] is None
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert board.Scalars("reward/mean")[0].value == pytest.approx(0.3, abs=2**-24)  # float32
    assert board.Tags()["images"] == ["strip"]


@pytest.mark.parametrize("tail", ["", '{"iteration": 4, "rew', '{"iteration": 4}', "\x00\x00\n", "[1]\n"])
def test_resume_cuts_back_to_the_checkpoint(tmp_path: Path, tail: str) -> None:
    reporter = open_reporter(tmp_path)
    for iteration in range(4):
        reporter.write(iteration, {"reward/mean": iteration / 7})
    reporter.close()
    path = tmp_path / "metrics.jsonl"
    first = path.read_text().splitlines(keepends=True)
    path.write_text("".join(first) + tail)
    assert [line["iteration"] for line in read_lines(path)] == [0, 1, 2, 3]
    reporter = open_reporter(tmp_path, 3)
    assert path.read_text() == "".join(first[:3])
    reporter.write(3, {"reward/mean": 3 / 7})
    reporter.close()
    assert path.read_text() == "".join(first)


def test_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reporter = open_reporter(tmp_path)

    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ValueError, match=r"no room on the disk to write .*metrics\.jsonl"):
        reporter.write(0, VALUES)
    reporter.close()


def test_plain_lines_when_piped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reporter = open_reporter(tmp_path, 2)
    reporter.write(2, VALUES | {"heldout/O_1": 80.0, "heldout/O_3": 41.25})
    reporter.say("saved")
    reporter.close()
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("iteration 3/10  reward 0.300  instruction 0.500  consistency nan  ")
    assert "held-out O at turn 3 41.2 %  3.5 s" in first and first.endswith(" s left")
    assert second == "saved"


def test_bar_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "140")
    reporter = open_reporter(tmp_path)
    reporter.write(0, VALUES)
    reporter.close()
    shown = capsys.readouterr().err
    assert "\x1b[" in shown and "1/10" in shown and "reward 0.300" in shown and "3.5 s" in shown


def test_summary_leaves_out_what_is_not_there() -> None:
    assert summary({"reward/mean": 1.0}) == "reward 1.000"


def test_memory_of_this_process() -> None:
    """Python with torch takes more than 50 MiB; 128 MiB of ones show, within 20 % for what else moves."""
    name, before = used_memory()
    ones = torch.ones(2**25)  # 128 MiB
    assert name == "memory/rss_gib" and before > 0.05
    assert used_memory()[1] - before == pytest.approx(ones.nbytes / 2**30, rel=0.2)


def test_memory_on_a_gpu_goes_by_another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**29)
    assert used_memory() == ("memory/cuda_peak_gib", 1.5)


def count(rank: int, file: str, results: str) -> None:
    """What `ROWS` has for a rank, in the microbatches that it has there."""
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    ranks, tally = Ranks(rank=rank, world_size=2, device=torch.device("cpu")), Tally(["a"], ["b", "c", "d"])
    for values in ROWS[rank]:
        rows = torch.tensor(values)
        tally.add({"a": rows.mean() if values else rows.sum(), "b": rows.abs().sum()}, len(values))
    kept = tally.keep_largest("b", "c", ranks)
    tensors = [torch.full((2,), 1.0 + rank), torch.tensor(10 * rank), torch.tensor([[0.5]])]
    ranks.sum_(tensors)
    made = {
        "figures": tally.read(ranks), "kept": kept, "sums": [tensor.tolist() for tensor in tensors],
        "rows": ranks.gather(torch.tensor([[rank, 7]])).tolist(), "objects": ranks.gather_objects({"rank": rank}),
        "main": ranks.from_main(f"of {rank}"), "share": list(ranks.share(6)),
    }  # fmt: skip
    Path(f"{results}{rank}").write_text(json.dumps(made))
    dist.destroy_process_group()


ROWS = [[[1.0, 2.0, 6.0], []], [[5.0]]]


def test_figures_over_ranks(tmp_path: Path) -> None:
    """The mean of all rows is 3.5, that of the microbatches' means 4, and of the ranks' 4; `d` was measured nowhere."""
    results = str(tmp_path / "rank")
    multiprocessing.spawn(count, (str(tmp_path / "store"), results), nprocs=2)  # pyright: ignore[reportPrivateImportUsage]
    first, second = (json.loads(Path(f"{results}{rank}").read_text()) for rank in range(2))
    figures = first["figures"]
    assert math.isnan(figures.pop("d")) and math.isnan(second["figures"].pop("d"))
    assert figures == {"a": 3.5, "b": 9.0, "c": 9.0, "num_transitions": 4.0} and first["kept"] == 9.0
    assert first.pop("share") == [0, 1, 2] and second.pop("share") == [3, 4, 5]
    assert first == second
    assert first["sums"] == [[3.0, 3.0], 10, [[1.0]]] and first["rows"] == [[0, 7], [1, 7]]
    assert first["objects"] == [{"rank": 0}, {"rank": 1}] and first["main"] == "of 0"


def test_one_rank_gets_its_values_back() -> None:
    one, tally = Ranks(rank=0, world_size=1, device=torch.device("cpu")), Tally(["a"], [])
    assert math.isnan(tally.read(one)["a"])
    tally.add({"a": torch.tensor(0.25)}, 3)
    assert tally.read(one) == {"a": 0.25, "num_transitions": 3.0}
    rows = torch.tensor([1.0])
    assert one.gather(rows) is rows and one.from_main(3) == 3 and one.gather_objects("x") == ["x"]
