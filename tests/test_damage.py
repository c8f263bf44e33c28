"""What is wrong with a row is that row's fault: for every kind of damage, check and run skip the same rows, and no
other; paths do not leave their folder, and nothing is printed that a terminal would act on.
"""

import csv
import gzip
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from photos import PHOTOS, photo
from PIL import Image

from mteditflow.config import Config, DataConfig, EvaluationConfig, RolloutConfig
from mteditflow.config.command import check
from mteditflow.data import check_data, held_out_tasks, training_tasks, userdata
from mteditflow.data.formats import read_sessions
from mteditflow.data.sessions import MAX_LETTERS
from mteditflow.distributed import Ranks

RANKS = Ranks(rank=0, world_size=1, device=torch.device("cpu"))
LONG = "a" * 5000
RIGHT = [{"image": f"photos/{name}", "prompt": f"edit {i}"} for i, name in enumerate(PHOTOS)]
DEEP = "[" * 100_000


def line(**fields: Any) -> bytes:
    return json.dumps({"image": "photos/coffee.png", "prompt": "a"} | fields).encode()


LINES = {
    "no JSON": b"{not json",
    "one latin-1 byte": '{"image": "photos/coffee.png", "prompt": "caf\xe9"}'.encode("latin-1"),
    "deep JSON": b'{"image": "photos/coffee.png", "prompt": "a", "objects": ' + DEEP.encode(),
    "a number of 5,000 digits": b'{"image": "photos/coffee.png", "prompt": "a", "objects": [' + b"9" * 5000 + b"]}",
    "a field twice": b'{"image": "photos/coffee.png", "image": "photos/china.jpg", "prompt": "a"}',
    "no object": b"[1]",
    "a lone surrogate in a text": line(prompt="a\ud800b"),
    "a lone surrogate in a name": line(image="photos/\udc80.png"),
    "a lone surrogate in an object": line(objects=["\ud800"]),
    "a lone surrogate in a type": line(edit_types=["\ud800"]),
    "a zero in a name": line(image="photos/\0.png"),
    "a zero in a text": line(prompt="a\0"),
    "an image name of 5,000 letters": line(image=f"{LONG}.png"),
    "a folder name of 5,000 letters": line(image=f"{LONG}/a.png"),
    "a text of 200 kB": line(prompt="b" * 200_000),
    "an object with a name of 200 kB": line(objects=["b" * 200_000]),
    "a box with NaN": line(objects=[{"name": "a", "box": [float("nan"), 0, 1, 1]}]),
    "a box of truths": line(objects=[{"name": "a", "box": [False, False, True, True]}]),
    "a box without an end": line(objects=[{"name": "a", "box": [0, 0, 1, float("inf")]}]),
    "no image": line(image="photos/gone.png"),
    "an image that is a folder": line(image="photos"),
    "an image that is a point": line(image="."),
    "an address": line(image="https://example.com/a.png"),
    "a path that leaves the folder": line(image="../secret.png"),
    "a path from the root": line(image="/etc/hostname"),
    "a link that leaves the folder": line(image="photos/link.png"),
    "a torn picture": line(image="photos/torn.jpg"),
    "an empty picture": line(image="photos/empty.png"),
    "a page for a picture": line(image="photos/page.jpg"),
    "a picture without its middle": line(image="photos/holed.png"),
    "a picture of floating-point numbers": line(image="photos/float.tif"),
}  # fmt: skip


@pytest.fixture(scope="module")
def thumbnails(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The photographs in small, which many tests read many times."""
    path = tmp_path_factory.mktemp("small")
    for name in PHOTOS:
        Image.open(photo(name)).resize((90, 60)).save(path / name)
    return path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, thumbnails: Path) -> Path:
    """Photographs, damaged ones, and a picture beside the folder that nobody is to see."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(userdata, "MAX_BAD_SHARE", 1.0)
    data = tmp_path / "data"
    shutil.copytree(thumbnails, data / "photos")
    whole = (thumbnails / "astronaut.png").read_bytes()
    (tmp_path / "secret.png").write_bytes(whole)
    os.symlink(tmp_path / "secret.png", data / "photos" / "link.png")
    (data / "photos" / "torn.jpg").write_bytes((thumbnails / "china.jpg").read_bytes()[:1500])
    (data / "photos" / "empty.png").write_bytes(b"")
    (data / "photos" / "page.jpg").write_bytes(b"<html>404</html>")
    (data / "photos" / "holed.png").write_bytes(whole[:4000] + b"\0" * 2000 + whole[6000:])
    Image.open(photo("coins.png")).convert("F").save(data / "photos" / "float.tif")
    return data


def run_all(path: Path, num_images: int) -> tuple[set[str], set[str]]:
    """Read everything as a run does: the places that it skips, and the instructions that it is left with."""
    for function in (userdata.read_named, userdata.training_source, userdata.held_out_source):
        function.cache_clear()
    config = Config(
        data=DataConfig(path=str(path), num_turns=1, held_out_share=0.5), rollout=RolloutConfig(num_tasks=2),
        evaluation=EvaluationConfig(num_sessions=2, num_sessions_short=1, num_strips=1),
    )  # fmt: skip
    check_data(config, is_speaking=False)
    held_out = userdata.held_out_source(config.data, config.num_held_out_turns)
    seen = {task.instructions[0] for task in held_out_tasks(config)}
    for session in held_out.sessions:
        task = held_out.task(session, 0, config)
        seen |= {task.instructions[0]} if task else set()
    for i in range(num_images):
        seen |= {task.instructions[0] for task in training_tasks(config, i, RANKS)}
    training = userdata.training_source(config.data)
    faults = {fault.place for fault in training.everything.faults}
    return faults | training._damaged.keys() | held_out._damaged.keys(), seen


def checked(path: Path, capsys: pytest.CaptureFixture[str]) -> set[str]:
    """The places that the check names."""
    capsys.readouterr()
    check([str(path), "--num_turns", "1", "--max_bad_share", "1"])
    out = capsys.readouterr().out
    assert "\x1b" not in out and max(map(len, out.splitlines())) < 600
    return {*re.findall(rf"^  ({re.escape(path.name)}:\d+): ", out, re.M)}


@pytest.mark.parametrize("kind", LINES)
def test_a_damaged_line_is_that_lines_fault(kind: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Alone between rows that are right, of which none is lost."""
    lines = [json.dumps(record).encode() for record in RIGHT]
    path = folder / "a.jsonl"
    path.write_bytes(b"\n".join([*lines[:3], LINES[kind], *lines[3:]]) + b"\n")
    skipped, seen = run_all(path, 2 * len(RIGHT))
    assert skipped == checked(path, capsys) == {"a.jsonl:4"}
    assert seen == {record["prompt"] for record in RIGHT}


def test_all_kinds_at_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "a.jsonl.gz"
    with gzip.open(path, "wb") as file:
        file.write(b"\n".join([*(json.dumps(record).encode() for record in RIGHT), *LINES.values()]))
    skipped, seen = run_all(path, 40)
    assert skipped == {f"a.jsonl.gz:{i}" for i in range(8, 8 + len(LINES))}
    assert seen == {record["prompt"] for record in RIGHT}
    cut = folder / "cut.jsonl.gz"
    cut.write_bytes(path.read_bytes()[:-400])
    assert any(fault.text.startswith("the file breaks off") for fault in read_sessions(str(cut)).faults)


ROWS = {
    "a cell of 200 kB": ["photos/coffee.png", "b" * 200_000],
    "a byte that is no text": ["photos/coffee.png", "caf\udce9"],
    "a cell too many": ["photos/coffee.png", "a", "b"],
    "a cell too few": ["photos/coffee.png"],
    "a path that leaves the folder": ["../secret.png", "a"],
    "a zero": ["photos/coffee.png\0", "a"],
}


@pytest.mark.parametrize("kind", ROWS)
def test_a_damaged_row_of_a_csv_is_that_rows_fault(kind: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "a.csv"
    rows = [list(record.values()) for record in RIGHT]
    with path.open("w", newline="", errors="surrogateescape") as file:
        csv.writer(file).writerows([["file_name", "prompt"], *rows[:3], ROWS[kind], *rows[3:]])
    skipped, seen = run_all(path, 2 * len(RIGHT))
    assert skipped == checked(path, capsys) == {"a.csv:5"}
    assert seen == {record["prompt"] for record in RIGHT}


def test_a_damaged_row_of_a_table_is_that_rows_fault(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import pyarrow
    from pyarrow import parquet

    pictures = [{"bytes": (folder / "photos" / name).read_bytes(), "path": name} for name in PHOTOS]
    texts = [record["prompt"].encode() for record in RIGHT]
    pictures += [{"bytes": None, "path": path} for path in ("../secret.png", "/etc/hostname", "gone.png", None)]
    pictures += [{"bytes": b"torn", "path": None}, *pictures[:3]]
    texts += [b"a", b"b", b"c", b"d", b"e", b"caf\xe9", b"", b"f" * 200_000]
    columns = {
        "image": pyarrow.array(pictures, pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])),
        "prompt": pyarrow.array(texts, pyarrow.binary()).view(pyarrow.string()),
    }
    path = folder / "a.parquet"
    parquet.write_table(pyarrow.table(columns), path)
    skipped, seen = run_all(path, 40)
    assert skipped == checked(path, capsys) == {f"a.parquet:{i}" for i in range(8, 16)}
    assert seen == {record["prompt"] for record in RIGHT}


def test_a_path_that_leaves_the_folder_is_refused_unless_allowed(folder: Path, tmp_path: Path) -> None:
    names = ("../secret.png", str(tmp_path / "secret.png"), "photos/link.png", "photos/../../secret.png")
    (folder / "a.jsonl").write_bytes(b"\n".join(line(image=name) for name in names))
    refused = read_sessions(str(folder / "a.jsonl"))
    assert refused.found == [] and {fault.kind for fault in refused.faults} == {"path"}
    assert all("move it there, or set data.allowed_folder" in fault.text for fault in refused.faults)
    allowed = read_sessions(str(folder / "a.jsonl"), str(tmp_path))
    assert {session.image for session in allowed.found} == {"../secret.png"} and len(allowed.found) == 4
    with pytest.raises(ValueError, match=r"data.allowed_folder is 'nowhere', which is no folder"):
        read_sessions(str(folder / "a.jsonl"), "nowhere")
    config = Config(data=DataConfig(path=str(folder / "a.jsonl"), allowed_folder=str(tmp_path)))
    assert len(userdata.read_named("data.path", config.data.path, config.data.allowed_folder).found) == 4


def test_edival_and_folders_do_not_leave_theirs(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret_input_raw.jpg").write_bytes(photo("china.jpg").read_bytes())
    with (folder / "e.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["image_index", "turns", "instructions"], ["../secret", 1, "['a']"]])
    (fault,) = read_sessions(str(folder / "e.csv")).faults
    assert fault.kind == "path"
    (folder / "photos" / "link.txt").write_text("a\n")
    faults = {fault.place: fault.kind for fault in read_sessions(str(folder / "photos")).faults}
    assert faults["link.png"] == "path"


def test_a_hub_set_names_no_file_of_this_machine(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = str(tmp_path / "secret.png")
    tables = [
        datasets.Dataset.from_dict({"image": [secret], "prompt": ["a"]}),
        datasets.Dataset.from_dict({"image": [secret], "prompt": ["a"]}).cast_column("image", datasets.Image()),
    ]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.load_dataset", lambda name, split: tables[0])
    with pytest.raises(ValueError, match="has texts in its column image: pictures of a hub"):
        read_sessions("someone/edits")
    monkeypatch.setattr("datasets.load_dataset", lambda name, split: tables[1])
    (session,) = read_sessions("someone/edits").found
    with pytest.raises(ValueError, match="is outside of"):
        session.read()
    (tmp_path / "cache").mkdir(exist_ok=True)
    (tmp_path / "cache" / "a.png").write_bytes(photo("chelsea.png").read_bytes())  # as imagefolder sets are kept
    kept = {"image": [str(tmp_path / "cache" / "a.png")], "prompt": ["a"]}
    inside = datasets.Dataset.from_dict(kept).cast_column("image", datasets.Image())
    monkeypatch.setattr("datasets.load_dataset", lambda name, split: inside)
    assert read_sessions("someone/edits").found[0].read().size == (451, 300)


def test_a_picture_is_one_however_it_is_spelt(folder: Path) -> None:
    """So that it is on one side of the split."""
    os.link(folder / "photos" / "coffee.png", folder / "photos" / "zz.png")
    os.symlink("coffee.png", folder / "photos" / "y.png")
    names = ("photos/coffee.png", "photos//coffee.png", "./photos/coffee.png", "photos/../photos/coffee.png",
             str(folder / "photos" / "coffee.png"), "photos/zz.png", "photos/y.png")  # fmt: skip
    (folder / "a.jsonl").write_bytes(b"\n".join(line(image=name, prompt=name) for name in names))
    sessions = read_sessions(str(folder / "a.jsonl"))
    assert {session.image for session in sessions.found} == {"photos/coffee.png"} and len(sessions.found) == 7
    composed, split = "photos/caf\u00e9.png", "photos/cafe\u0301.png"  # as Linux and as a Mac write it
    for name in (composed, split):
        (folder / name).write_bytes(photo("coffee.png").read_bytes())
    (folder / "b.jsonl").write_bytes(b"\n".join(line(image=name) for name in (composed, split)))
    assert len({session.image for session in read_sessions(str(folder / "b.jsonl")).found}) == 1


def test_what_systems_leave_in_folders_is_passed_over(folder: Path) -> None:
    here = folder / "mac"
    for name in ("a.JPG", "._a.JPG", "__MACOSX/._a.jpg", "__MACOSX/a.jpg", ".DS_Store", ".thumbs/a.jpg", "Thumbs.db"):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_bytes(photo("china.jpg").read_bytes() if name == "a.JPG" else b"\0\5\26\7")
    for name in ("a.TXT", "._a.txt", "README.txt", "b.txt", "c.txt"):
        (here / name).write_text("Add a hat\n")
    (here / "b.jfif").write_bytes(photo("china.jpg").read_bytes())
    (here / "c.nef").write_bytes(b"II*\0")
    (here / "notes.md").write_text("a")
    sessions = read_sessions(str(here))
    assert [session.image for session in sessions.found] == ["a.JPG", "b.jfif"]
    assert [(fault.place, fault.kind) for fault in sessions.faults] == [("c.txt", "image")]
    assert "c.nef is no picture that can be read: save it as PNG or JPEG" in sessions.faults[0].text
    assert sessions.passed_over == ("README.txt", "notes.md")
    (here / "A.JSONL").write_bytes(line(image="a.JPG"))
    assert len(read_sessions(str(here / "A.JSONL")).found) == 1


def test_nothing_is_printed_that_a_terminal_acts_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Escapes in names, fields and types; rich's markup in a type is a text."""
    (folder / "photos" / "\x1b[31mred.png").write_bytes(b"torn")
    records = [
        line(image="photos/\x1b[31mred.png"), line(image="photos/\x1b]0;title\x07.png"),
        line(**{"\x1b[2Jid": 1}, edit_types=["[/x]"]), line(edit_types=["\x1b[5mloud"]), line(edit_types=["[bold]a"]),
    ]  # fmt: skip
    path = folder / "a.jsonl"
    path.write_bytes(b"\n".join(records))
    check([str(path), "--num_turns", "1"])
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\x07" not in out
    for text in ("\\x1b[31mred.png", "[/x]", "\\x1b[5mloud", "[bold]a", "\\x1b[2Jid"):
        assert text in out, text
    for function in (userdata.read_named, userdata.training_source, userdata.held_out_source):
        function.cache_clear()
    config = Config(data=DataConfig(path=str(path), num_turns=1), evaluation=EvaluationConfig(
        num_sessions=2, num_sessions_short=1, num_strips=1))  # fmt: skip
    check_data(config, is_speaking=True)
    with pytest.raises(SystemExit):
        check([f"{tmp_path}/\x1b[31m.jsonl"])
    assert "\x1b" not in capsys.readouterr().err


def test_a_text_may_be_long_but_not_a_file() -> None:
    assert MAX_LETTERS == 10_000


def test_the_split_of_few_images_is_balanced(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As many as fit into the share, at least one, not all; of many, those whose hash lies below it, which adding
    images does not move.
    """
    choose: Callable[..., frozenset[str]] = userdata.held_out_images
    for num in range(1, userdata.MANY_IMAGES):
        names = [f"{i}.jpg" for i in range(num)]
        for share in (0.1, 0.29, 0.5, 0.99):
            expected = min(max(1, int(round(share * num, 9))), num - 1)
            assert len(choose(names, share)) == expected, (num, share)
    many = [f"{i}.jpg" for i in range(1000)]
    assert choose(many, 0.2) == {name for name in many if userdata.is_held_out_image(name, 0.2)}
    assert choose(many[:600], 0.2) == choose(many, 0.2) & {*many[:600]}
    (folder / "a.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in RIGHT))
    config = Config(
        data=DataConfig(path=str(folder / "a.jsonl"), num_turns=1, held_out_share=0.3),
        evaluation=EvaluationConfig(num_sessions=2, num_sessions_short=1, num_strips=1),
    )  # fmt: skip
    check_data(config, is_speaking=True)
    said = capsys.readouterr().err
    assert "5 sessions" in said and "2 of 7 images are held out (data.held_out_share 0.3): photos/coffee.png" in said
