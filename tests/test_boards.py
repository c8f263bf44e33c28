"""Boards: TensorBoard in any case; wandb and trackio offline, by their own clients, where these are installed."""

import json
import sqlite3
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from train_runs import Arguments, metrics, refused

from mteditflow.config import Config, RunConfig
from mteditflow.config.command import train as main
from mteditflow.record.metrics import read_lines
from mteditflow.watch.boards import TensorBoard, check_boards, open_boards


def text_of(board: EventAccumulator, name: str) -> str:
    return board.Tensors(f"{name}/text_summary")[0].tensor_proto.string_val[0].decode()


def test_tensorboard_has_curves_strips_and_tables(arguments: Arguments, tmp_path: Path) -> None:
    """Of a run: sessions as the judge saw them, and the figures of the held-out sessions, as its files have them."""
    main(arguments(tmp_path, run__num_iterations=2, evaluation__every=1, run__num_judged=2))
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert board.Tags()["images"] == ["strips"] and len(board.Images("strips")) == 2
    assert len(board.Scalars("reward/mean")) == 2
    held_out, judged = text_of(board, "held out").splitlines(), text_of(board, "judged").splitlines()
    assert held_out[0] == "| metric | turn | before | after | gain |" and len(held_out) == 2 + 4 * 2
    before = json.loads((tmp_path / "evaluation_before.json").read_text())["turns"][0]["O"]
    assert held_out[2].startswith(f"| O | 1 | {before:.1f} | ")
    assert judged[0].startswith("| task | trajectory | why | instructions | instruction |")
    assert len(judged) == 2 + len(read_lines(tmp_path / "judge" / "evaluation.jsonl")[0]["sessions"])


def test_a_cell_is_one_cell(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path, 0)
    board.table("t", 3, [{"words": "a | b\nc", "score": -0.0, "none": None, "picture": Image.new("RGB", (2, 2))}])
    board.close()
    read = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert text_of(read, "t").splitlines()[2] == "| a \\| b c | 0 |  |"


def test_what_is_no_board_or_not_installed_is_one_line(
    arguments: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for boards in ("[mlflow]", "[wandb, wandb]"):
        assert "must be a list of some of wandb, trackio" in refused(capsys, arguments(tmp_path, run__log_to=boards))
    monkeypatch.setattr("mteditflow.watch.boards.find_spec", lambda _: None)
    assert "pip install 'mteditflow[trackio]'" in refused(capsys, arguments(tmp_path, run__log_to="[trackio]"))
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_folder_of_its_name_is_no_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As wandb leaves one where it was run."""
    (tmp_path / "no_such_client").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"run\.log_to is 'no_such_client': its client is not installed"):
        check_boards(["no_such_client"])


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the clients keep what they have, on this machine alone."""
    for name in ("wandb", "trackio"):
        pytest.importorskip(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for module in [name for name in sys.modules if name.split(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, module)  # it reads its folder once
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    return tmp_path


def rows_of(folder: Path) -> list[tuple[str, int, dict[str, Any]]]:
    with sqlite3.connect(folder / "trackio" / "mteditflow.db") as base:
        found = base.execute("select run_name, step, metrics from metrics order by id").fetchall()
    return [(name, step, json.loads(values)) for name, step, values in found]


def test_boards_show_a_run(arguments: Arguments, offline: Path) -> None:
    """Killed after an iteration, it goes on as the same run; curves, strips and tables are there."""
    run, boards = offline / "run", {"run__log_to": "[wandb, trackio]", "run__num_judged": 2, "evaluation__every": 1}
    for num in (1, 2):
        main(arguments(run, run__num_iterations=num, optimizer__schedule="constant", **boards))
    rows, lines = rows_of(offline), metrics(run)
    assert len({name for name, *_ in rows}) == 1 and rows[0][0].startswith("run-")
    means = {step: values["reward/mean"] for _, step, values in rows if "reward/mean" in values}
    assert means == {line["iteration"]: line["reward/mean"] for line in lines} and len(means) == 2
    shown = {name: value for _, _, values in rows for name, value in values.items() if isinstance(value, dict)}
    assert shown["strips"]["_type"] == "trackio.image"
    assert (offline / "trackio" / "media" / shown["strips"]["file_path"]).is_file()
    judged, held_out = shown["judged"]["_value"], shown["held out"]["_value"]
    assert judged[0]["pictures"]["_type"] == "trackio.image" and "instructions" in judged[0]
    assert [row["metric"] for row in held_out] == [name for name in ("O", "IF", "CC", "MT") for _ in range(2)]
    (identity,) = {path.name.split("-")[-1] for path in (run / "wandb").glob("offline-run-*")}
    assert identity == (run / "board_id").read_text() and len([*(run / "wandb").glob("offline-run-*")]) == 2
    files = {path.name.split("_")[0] for path in (run / "wandb").rglob("media/*/*")}
    assert files >= {"strips", "judged"} and any(name.startswith("held") for name in files)
    content = b"".join(path.read_bytes() for path in (run / "wandb").rglob("*.wandb"))
    assert all(json.dumps(line["reward/mean"]).encode()[:8] in content for line in lines)
    table = json.loads(next((run / "wandb").rglob("judged*.table.json")).read_text())
    assert table["columns"][:3] == ["task", "trajectory", "why"]
    assert len(table["data"]) in {len(line["sessions"]) for line in read_lines(run / "judge" / "evaluation.jsonl")}


def test_wandb_without_a_login_is_one_line(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb  # pyright: ignore[reportMissingImports]

    def init(**_: Any) -> None:
        raise wandb.errors.UsageError("No API key configured.\nUse `wandb login`")

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(ValueError, match=r"run.log_to is 'wandb': No API key configured.*WANDB_MODE=offline"):
        open_boards(offline, 0, ["wandb"], {})
    assert Config(run=RunConfig(log_to=("wandb", "trackio"))).run.log_to == ("wandb", "trackio")
