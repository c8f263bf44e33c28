"""Published data as they are: MagicBrush's rows, Pico-Banana-400K's sessions, imagefolder's metadata, parquet in
shards, folders of `save_to_disk`, gzipped JSONL.
"""

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from photos import PHOTOS, copy_photos, photo

from mteditflow.data.formats import read_sessions
from mteditflow.data.images import read_picture
from mteditflow.data.published import group_turns
from mteditflow.data.sessions import Sessions


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def texts(sessions: Sessions) -> dict[str, tuple[str, ...]]:
    """The instructions of each session, by its image."""
    return {session.image: session.instructions for session in sessions.found}


TURNS = [  # MagicBrush's rows of three images; those of one lie apart and in another order
    ("242679", 2, "coffee.png", "remove the spoon"),
    ("327701", 1, "chelsea.png", "give the cat a hat"),
    ("242679", 1, "astronaut.png", "let the woman smile"),
    ("5583", 1, "rocket.jpg", "have there be a bird"),
    ("242679", 3, "china.jpg", "make it night"),
]
EXPECTED = {
    "242679": ("let the woman smile", "remove the spoon", "make it night"), "327701": ("give the cat a hat",),
    "5583": ("have there be a bird",),
}  # fmt: skip


def magicbrush(turns: list[tuple[Any, Any, str, Any]]) -> datasets.Dataset:
    """A table with the columns and types of the hub's osunlp/MagicBrush."""
    files = [{"bytes": photo(name).read_bytes(), "path": name} for *_, name, _ in turns]  # as on the hub
    columns = {
        "img_id": [it[0] for it in turns], "turn_index": [it[1] for it in turns], "source_img": files,
        "mask_img": files, "instruction": [it[3] for it in turns], "target_img": files,
    }  # fmt: skip
    table = datasets.Dataset.from_dict(columns).cast_column("turn_index", datasets.Value("int32"))
    for name in ("source_img", "mask_img", "target_img"):
        table = table.cast_column(name, datasets.Image())
    return table


def check_magicbrush(sessions: Sessions) -> None:
    assert texts(sessions) == EXPECTED and sessions.faults == []
    assert sessions.unused == ("mask_img", "target_img")
    (session,) = [it for it in sessions.found if it.image == "242679"]
    assert np.array_equal(np.asarray(session.read()), np.asarray(read_picture(photo("astronaut.png"))))


def test_magicbrush_in_one_file_in_shards_saved_and_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row a turn, grouped by image and turn; the picture is the first turn's source."""
    table, dev = magicbrush(TURNS), magicbrush([("9", 1, "flower.jpg", "a")])
    table.to_parquet(tmp_path / "a.parquet")
    check_magicbrush(read_sessions(str(tmp_path / "a.parquet")))

    data = tmp_path / "MagicBrush" / "data"
    data.mkdir(parents=True)
    for i, rows in enumerate((range(2), range(2, 5))):
        table.select(rows).to_parquet(data / f"train-0000{i}-of-00002-453c1a9ccc53b253.parquet")
    check_magicbrush(read_sessions(str(data.parent)))
    dev.to_parquet(data / "dev-00000-of-00001-ba9dc8be0d8c83a3.parquet")
    check_magicbrush(read_sessions(str(data.parent)))  # train, where there are several
    assert texts(read_sessions(f"{data.parent}:dev")) == {"9": ("a",)}
    with pytest.raises(ValueError, match="has no split test: it has dev, train; add the one you mean"):
        read_sessions(f"{data.parent}:test")

    table.save_to_disk(tmp_path / "saved")
    check_magicbrush(read_sessions(str(tmp_path / "saved")))
    datasets.DatasetDict({"train": table, "dev": dev}).save_to_disk(tmp_path / "splits")
    check_magicbrush(read_sessions(str(tmp_path / "splits")))
    assert texts(read_sessions(f"{tmp_path / 'splits'}:dev")) == {"9": ("a",)}
    with pytest.raises(ValueError, match="has no split nothing: it has dev, train"):
        read_sessions(f"{tmp_path / 'splits'}:nothing")
    (tmp_path / "saved" / "state.json").write_text("{}")
    with pytest.raises(ValueError, match="is no folder of save_to_disk that can be read"):
        read_sessions(str(tmp_path / "saved"))

    monkeypatch.setattr("datasets.load_dataset", lambda name, split: {"train": table, "dev": dev}[split])
    assert texts(read_sessions("osunlp/MagicBrush")) == EXPECTED
    assert texts(read_sessions("osunlp/MagicBrush:dev")) == {"9": ("a",)}


def test_turns_that_are_missing_are_the_fault_of_their_image(tmp_path: Path) -> None:
    wrong = [("1", 2, "coffee.png", "b"), ("2", 1, "coffee.png", "a"), ("2", 3, "coffee.png", "c"),
             ("3", 1, "coffee.png", " "), (None, 1, "coffee.png", "d"), (None, 1, "coffee.png", "e")]  # fmt: skip
    magicbrush([*TURNS, *wrong]).to_parquet(tmp_path / "a.parquet")
    sessions = read_sessions(str(tmp_path / "a.parquet"))
    assert texts(sessions) == EXPECTED
    assert {fault.place: fault.text.split(":")[0] for fault in sessions.faults} == {
        "a.parquet:6": "turn_index are 2", "a.parquet:7": "turn_index are 1, 3",
        "a.parquet:9": "instructions must be a list of texts, none of them empty",
        "a.parquet:10": "img_id is None", "a.parquet:11": "img_id is None",
    }  # fmt: skip


def test_two_sessions_of_an_image_are_two() -> None:
    rows = [(f"{i}", {"img_id": "a", "turn_index": turn}) for i, turn in enumerate((1, 2, 1, 2, 3))]
    assert [[place for place, _ in session] for session in group_turns(rows)] == [["0", "1"], ["2", "3", "4"]]


def test_turns_in_jsonl_and_csv(tmp_path: Path) -> None:
    copy_photos(tmp_path / "images")
    rows = [
        {"img_id": i, "turn_index": turn, "source_img": f"images/{name}", "instruction": text}
        for i, turn, name, text in TURNS
    ]
    (tmp_path / "a.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    for name in ("a.jsonl", "a.csv"):
        sessions = read_sessions(str(tmp_path / name))
        assert sorted(texts(sessions).values()) == sorted(EXPECTED.values()) and sessions.faults == []
        assert "images/astronaut.png" in texts(sessions)


FLICKR = "https://farm8.staticflickr.com/2915/14573719235_6cfb811e3c_o.jpg"
PROMPTS = ["Shift the colours to a warmer hue", "Zoom in on the car", "Turn the scene into a comic"]


def pico(address: str, prompts: Any = PROMPTS, **more: Any) -> dict[str, Any]:
    """A line of Pico-Banana-400K's multi-turn.jsonl."""
    files = [{"id": f"edit_turn{i}", "url": f"images/multi-turn/101_turn{i}.png"} for i in (1, 2)]
    files += [{"id": "final_image", "url": "images/multi-turn/101_turn3.png"}]
    files += [{"id": "original_input_image", "url": address}]
    return {"files": files, "metadata_edit_turn_prompts": prompts, **more}


def test_pico_banana(tmp_path: Path) -> None:
    """Pictures by the name in the address, by ImageID, by what the set's own script wrote; or one line each."""
    source = tmp_path / "openimages" / "openimage_source_images" / "train_0"
    source.mkdir(parents=True)
    for name, of in ((FLICKR.split("/")[-1], "china.jpg"), ("000002b66c9c498e.jpg", "rocket.jpg")):
        (source / name).write_bytes(photo(of).read_bytes())
    with (tmp_path / "train-images-boxable-with-rotation.csv").open("w", newline="") as file:
        header = ["ImageID", "Subset", "OriginalURL", "OriginalLandingURL", "License", "Rotation"]
        rows = [["000002b66c9c498e", "train", "https://c1.staticflickr.com/b_o.jpg", "", "", "0.0"],
                ["../secret", "train", "https://c1.staticflickr.com/e_o.jpg", "", "", "0.0"]]  # fmt: skip
        csv.writer(file).writerows([header, *rows])
    local = "openimages/openimage_source_images/train_0/000002b66c9c498e.jpg"
    lines = [
        pico(FLICKR), pico("https://c1.staticflickr.com/b_o.jpg"),
        pico("https://c1.staticflickr.com/c_o.jpg", local_input_image=local),
        pico("https://c1.staticflickr.com/c_o.jpg", local_input_image=f"/elsewhere/{local}"),
        pico("https://c1.staticflickr.com/gone_o.jpg", local_input_image=None),
        pico("https://c1.staticflickr.com/e_o.jpg"), pico(FLICKR, prompts="no list"), pico(""),
    ]  # fmt: skip
    (tmp_path / "multi-turn.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in lines))
    sessions = read_sessions(str(tmp_path / "multi-turn.jsonl"))
    assert [(it.place[-1], it.image.split("/")[-1]) for it in sessions.found] == [
        ("1", FLICKR.split("/")[-1]), ("2", "000002b66c9c498e.jpg"), ("3", "000002b66c9c498e.jpg"),
        ("4", "000002b66c9c498e.jpg"),
    ]  # fmt: skip
    assert all(it.instructions == tuple(PROMPTS) for it in sessions.found)
    assert [(it.place[-1], it.kind) for it in sessions.faults] == [
        ("5", "image"), ("6", "image"), ("7", "fields"), ("8", "image")
    ]  # fmt: skip
    assert "gone_o.jpg in" in sessions.faults[0].text and "download it to there" in sessions.faults[0].text


def test_imagefolder(tmp_path: Path) -> None:
    """metadata.csv and .parquet, lists in a cell as JSON, and splits in folders."""
    copy_photos(tmp_path / "one" / "images")
    rows = [["images/coffee.png", json.dumps(["Remove the spoon", "Make it red"]), json.dumps(["a", "b"])],
            ["images/china.jpg", "['Add a bird']", ""], ["images/rocket.jpg", "no list", ""]]  # fmt: skip
    with (tmp_path / "one" / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["file_name", "instructions", "edit_types"], *rows])
    sessions = read_sessions(str(tmp_path / "one"))
    assert texts(sessions) == {
        "images/coffee.png": ("Remove the spoon", "Make it red"), "images/china.jpg": ("Add a bird",)
    }  # fmt: skip
    assert sessions.found[0].edit_types == ("a", "b") and len(sessions.faults) == 1
    assert sessions.faults[0].text.startswith("instructions must be a list")
    for split, name in (("train", "coffee.png"), ("test", "china.jpg")):
        copy_photos(tmp_path / "two" / split, (name,))
        with (tmp_path / "two" / split / "metadata.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["file_name", "prompt"], [name, split]])
    assert texts(read_sessions(str(tmp_path / "two"))) == {"coffee.png": ("train",)}
    assert texts(read_sessions(f"{tmp_path / 'two'}:test")) == {"china.jpg": ("test",)}
    copy_photos(tmp_path / "three", PHOTOS[:2])
    columns = {"file_name": [*PHOTOS[:2]], "prompt": ["a", "b"], "license": ["CC0", "CC0"]}
    datasets.Dataset.from_dict(columns).to_parquet(tmp_path / "three" / "metadata.parquet")
    sessions = read_sessions(str(tmp_path / "three"))
    assert texts(sessions) == {PHOTOS[0]: ("a",), PHOTOS[1]: ("b",)} and sessions.unused == ("license",)


def test_gzip(tmp_path: Path) -> None:
    copy_photos(tmp_path, PHOTOS[:2])
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write("".join(f"{json.dumps({'image': name, 'prompt': name})}\n" for name in PHOTOS[:2]))
    assert texts(read_sessions(str(tmp_path / "a.jsonl.gz"))) == {name: (name,) for name in PHOTOS[:2]}
    (tmp_path / "b.jsonl.gz").write_text("no gzip")
    with pytest.raises(ValueError, match="cannot be read"):
        read_sessions(str(tmp_path / "b.jsonl.gz"))
    (tmp_path / "c.jsonl").write_text(json.dumps({"image": PHOTOS[0], "prompt": "a"}), encoding="utf-16")
    with pytest.raises(ValueError, match="is not text in UTF-8"):
        read_sessions(str(tmp_path / "c.jsonl"))
