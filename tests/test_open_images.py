"""A set of the paper's kind from Open Images' boxes: 2,319 sessions of 3 turns, nine edit types, twelve categories."""

import csv
import json
import os
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from photos import photo
from PIL import Image

from mteditflow.config.command import data as main
from mteditflow.data.coco import CATEGORIES
from mteditflow.data.formats import read_sessions
from mteditflow.world.edits import EDIT_TYPES

COLUMNS = (  # of oidv6-train-annotations-bbox.csv, without the clicks at its end
    *("ImageID", "Source", "LabelName", "Confidence", "XMin", "XMax", "YMin", "YMax"),
    *("IsOccluded", "IsTruncated", "IsGroupOf", "IsDepiction", "IsInside"),
)
LABELS = {name: f"/m/0{i:03}" for i, name in enumerate((*CATEGORIES, "Tree", "Human face"))}


def row(image: str, kind: str, box: tuple[object, ...] = (0.1, 0.5, 0.1, 0.6), **flags: int) -> list[object]:
    """A line of the boxes: XMin, XMax, YMin, YMax."""
    named = {"IsOccluded": 0, "IsTruncated": 0, "IsGroupOf": 0, "IsDepiction": 0, "IsInside": 0} | flags
    return [image, "xclick", LABELS[kind], 1, *box, *named.values()]


def write(folder: Path, rows: list[list[object]], images: set[str]) -> list[str]:
    """Open Images' files, with one photograph under all names; returns the arguments."""
    pictures = folder / "train_0"
    pictures.mkdir(parents=True)
    Image.open(photo("china.jpg")).resize((96, 64)).save(folder / "one.jpg")
    for name in images:
        os.link(folder / "one.jpg", pictures / f"{name}.jpg")
    with (folder / "boxes.csv").open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    with (folder / "class-descriptions-boxable.csv").open("w", newline="") as file:
        csv.writer(file).writerows([[label, name] for name, label in LABELS.items()])
    return ["generate", "--open_images", str(folder / "boxes.csv"), "--images", str(pictures)]


def test_a_set_of_the_papers_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random, rows, images = Random(0), list[list[object]](), [f"{i:016x}" for i in range(2600)]
    for i, image in enumerate(images):
        for kind in {CATEGORIES[i % 12], *random.sample([*LABELS], 2)}:
            for _ in range(random.choice((1, 1, 2))):
                x, y = random.random() * 0.6, random.random() * 0.6
                rows.append(row(image, kind, (round(x, 6), round(x + 0.3, 6), round(y, 6), round(y + 0.35, 6))))
    arguments = write(tmp_path, [*rows, row("f" * 16, "Dog")], {*images})
    assert main([*arguments, "--out", str(tmp_path / "train.jsonl")]) == 0
    said = capsys.readouterr().out
    assert said.startswith("2319 sessions of 3 turns") and "left out" not in said and "there are no more" not in said
    records = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert len(records) == 2319 and {len(record["instructions"]) for record in records} == {3}
    types = Counter(name for record in records for name in record["edit_types"])
    assert set(types) == {*EDIT_TYPES} and min(types.values()) > 3 * 2319 / 9 / 2
    kinds = Counter(kind for record in records for kind in {it["name"] for it in record["objects"]})
    assert set(kinds) == {name.lower() for name in CATEGORIES} and min(kinds.values()) >= 2319 // 12
    assert len({record["image"] for record in records}) == 2319 and records[0]["image"].startswith("train_0/")
    sessions = read_sessions(str(tmp_path / "train.jsonl"))
    assert len(sessions.found) == 2319 and sessions.faults == []


def test_what_is_left_out_and_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        row("a", "Dog"), row("a", "Cat", IsGroupOf=1), row("a", "Car", IsDepiction=1), row("a", "Boat", IsInside=1),
        row("a", "Chair", ("nan", 0.5, 0.1, 0.6)), row("a", "Horse", ("x", 0.5, 0.1, 0.6)), row("a", "Tree"),
        row("a", "Bird", (0.1, 0.11, 0.1, 0.11)), row("b", "Cat", IsGroupOf=1), ["b", "xclick"],
        row("turned", "Dog"), row("torn", "Dog"), row("gone", "Dog"),
    ]  # fmt: skip
    arguments = write(tmp_path, rows, {"a", "b"})
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(tmp_path / "one.jpg").save(tmp_path / "train_0" / "turned.jpg", exif=exif)
    (tmp_path / "train_0" / "torn.jpg").write_bytes(b"torn")
    assert main([*arguments, "--out", str(tmp_path / "a.jsonl"), "--num_images", "4", "--categories",
                 "dog, Cat,Car,Boat,Chair,Horse,Bird"]) == 0  # fmt: skip
    said = capsys.readouterr().out
    for text in ("1 sessions of 3 turns", "--num_images is 4: there are no more", "1 rows left out: no row of boxes",
                 "1 images left out: no object that can be edited", "1 images left out: turned by its EXIF data",
                 "1 images left out: no picture in a format"):  # fmt: skip
        assert text in said, text
    (session,) = read_sessions(str(tmp_path / "a.jsonl")).found
    assert [(it.name, it.box) for it in session.objects] == [("dog", (0.1, 0.1, 0.5, 0.6))]


def test_open_images_of_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = write(tmp_path, [row("a", "Dog")], {"a"})
    (tmp_path / "no.csv").write_text("ImageID,LabelName\na,/m/1\n")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "boxes.csv").write_text("")
    for changed, message in (
        (["--open_images", "gone.csv"], "--open_images is 'gone.csv': no such file"),
        (["--open_images", str(tmp_path / "no.csv")], "has no column XMin"),
        (["--open_images", str(tmp_path / "elsewhere" / "boxes.csv")], "--classes is"),
        (["--categories", "Dogg"], "did you mean Dog?"),
        (["--categories", "dog,,cat"], "--categories is ''"),
        (["--num_images", "0"], "--num_images is 0: must lie in 1 to"),
        (["coco.json"], "give either it or a COCO file"),
        (["--classes", str(tmp_path / "gone.csv")], "--classes is"),
        (["--categories", "Cat"], "no session"),
    ):
        with pytest.raises(SystemExit) as stop:
            main([*arguments, "--out", str(tmp_path / "a.jsonl"), *changed])
        out, err = capsys.readouterr()
        assert stop.value.code == 2 and out == "" and err.count("\n") == 1 and message in err, err
    with pytest.raises(SystemExit):
        main(["generate", "coco.json", "--images", str(tmp_path), "--out", str(tmp_path / "a.jsonl"), "--classes", "a"])
    assert "--classes is 'a': is of --open_images" in capsys.readouterr().err
