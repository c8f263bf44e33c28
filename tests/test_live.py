"""The page that follows a run: what it says at every stage, to whom it answers, and that it asks for no script."""

import json
import os
import threading
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
import torch
from finished_runs import Page

from mteditflow.config.cli import from_yaml
from mteditflow.config.command import report as command
from mteditflow.pictures import to_pil
from mteditflow.report.live import answer, open_server

LINE = {"reward/mean": 0.5, "heldout/O_1": 40.0, "time/denoise_s": 60.0}


def page_of(folder: Path, path: str = "/") -> Page:
    status, html = answer(folder, path, "localhost:1")
    assert status == 200
    file = folder / "page"
    file.write_text(html)
    page = Page(file)
    file.unlink()
    return page


def begin(run: Path, folder: Path, num_lines: int, **values: float) -> None:
    """A run of 2 iterations of which so many are done."""
    (folder / "config.yaml").write_text((run / "config.yaml").read_text())
    lines = [json.dumps({"iteration": n, **LINE, **values}) + "\n" for n in range(num_lines)]
    (folder / "metrics.jsonl").write_text("".join(lines))


def test_a_run_at_every_stage(lora_run: Path, tmp_path: Path) -> None:
    (tmp_path / "lock").write_text(f"{os.getpid()}\n")
    page = page_of(tmp_path)
    assert f"At work: process {os.getpid()}." in page.text and "No iteration is done yet." in page.text
    assert "Not there yet: strips of images." in page.text and '<meta http-equiv="refresh" content="10">' in page.html
    (tmp_path / "evaluating_before").mkdir()
    (tmp_path / "evaluating_before" / "part-000000.safetensors").write_text("")
    assert "which evaluates the base; parts that are there: 1." in page_of(tmp_path).text
    begin(lora_run, tmp_path, 1, **{"alarm/cast_drift": 0.5, "alarm/no_edit_share": 0.5})
    (tmp_path / "strips").mkdir()
    for n in (0, 1):
        to_pil(torch.full((3, 4, 4), float(n))).save(tmp_path / "strips" / f"iteration-{n:06d}.png")
    page = page_of(tmp_path)
    assert "1 of 2 iterations in 1.0 minutes" in page.text and "about 7 min are left" in page.text
    assert 'style="width: 50.0%"' in page.html and "turn 1, iteration 0: 40</title>" in page.html
    assert len(page.references) == 2 and "After iteration 1" in page.text and "Before training" not in page.text
    assert "Cast drifts more" in page.text and "since iteration 1" in page.text and "No edit" not in page.text
    (tmp_path / "lock").write_text("999999999\n")
    assert "No process of this machine is at work here" in page_of(tmp_path).text


def test_a_finished_run_is_not_asked_for_again(lora_run: Path) -> None:
    page = page_of(lora_run)
    assert "Finished." in page.text and "refresh" not in page.html and "2 of 2 iterations" in page.text
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert page_of(lora_run, "/report").html == (lora_run / "report.html").read_text()


def test_it_answers_this_machine_and_two_paths_alone(lora_run: Path, tmp_path: Path) -> None:
    for host in ("127.0.0.1:8321", "localhost:9000", "[::1]:8321", "localhost"):
        assert answer(lora_run, "/", host)[0] == 200
    for host in ("evil.example:8321", "", "127.0.0.1.evil.example"):
        assert answer(lora_run, "/", host)[0] == 403
    for path in ("/config.yaml", "/../lock", "/report/", "//report", "/?x"):
        assert answer(lora_run, path, "localhost")[0] == 404
    assert answer(tmp_path, "/report", "localhost")[0] == 404  # the run has not begun


@pytest.fixture
def served(lora_run: Path) -> Iterator[int]:
    """The port of a server of a finished run."""
    with open_server(lora_run, 0) as server:
        thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01))
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def test_a_browser_gets_the_page(served: int, lora_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also while another connection is open on which nothing comes, as browsers have them."""
    idle = HTTPConnection("127.0.0.1", served, timeout=30)
    idle.connect()
    asking = HTTPConnection("127.0.0.1", served, timeout=30)
    asking.request("GET", "/")
    got = asking.getresponse()
    assert got.status == 200 and got.read().decode() == answer(lora_run, "/", "localhost")[1]
    assert "default-src 'none'" in (got.getheader("Content-Security-Policy") or "")
    assert got.getheader("Cache-Control") == "no-store"
    idle.close()
    asking.close()
    assert capsys.readouterr().err == ""


def refused(words: list[Any], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit, match="2"):
        command([*map(str, words), "--live"])
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_what_cannot_be_served_is_one_line(
    served: int, lora_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "is no folder" in refused([tmp_path / "none"], capsys)
    assert "is not the folder of a run" in refused([tmp_path], capsys)
    assert f"--port is {served}: it cannot be had" in refused([lora_run, "--port", served], capsys)
    assert "--port is 70000: must lie in [0, 65535]" in refused([lora_run, "--port", 70000], capsys)


def test_a_damaged_file_is_said_on_the_page(lora_run: Path, tmp_path: Path) -> None:
    begin(lora_run, tmp_path, 1)
    assert from_yaml(tmp_path / "config.yaml").run.num_iterations == 2
    (tmp_path / "evaluation_after.json").write_text("{")
    with open_server(tmp_path, 0) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        asking = HTTPConnection("127.0.0.1", server.server_port, timeout=30)
        asking.request("GET", "/report")
        got = asking.getresponse()
        assert got.status == 500 and "evaluation_after.json is not JSON" in got.read().decode()
        thread.join()
        asking.close()
