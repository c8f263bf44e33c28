"""Every format of users' data gives the same sessions; what is wrong is named with its line."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from photos import PHOTOS, copy_photos, photo

from mteditflow.config.command import data as main
from mteditflow.data.formats import read_sessions
from mteditflow.data.images import read_picture
from mteditflow.data.published import EDIVAL_COLUMNS
from mteditflow.data.sessions import Sessions
from mteditflow.types import Region

CAT = {"name": "cat", "box": [0.25, 0.0, 1.0, 1.0]}
RECORDS: list[dict[str, Any]] = [
    {
        "image": "photos/chelsea.png",
        "instructions": ["Add a hat", "Change the background to a beach"],
        "edit_types": ["subject_add", "background_change"],
        "objects": [CAT],
        "untouched_objects": [["cat", {"name": "sofa"}], [CAT]],
    },
    {"image": "photos/coffee.png", "instructions": ["Remove the spoon", "Make the cup red"]},
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` keeps its tables beside the test's files."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    copy_photos(tmp_path / "photos")


def write(path: Path, records: list[Any]) -> str:
    path.write_text("".join(f"{record if isinstance(record, str) else json.dumps(record)}\n" for record in records))
    return str(path)


def plain(sessions: Sessions) -> list[tuple[Any, ...]]:
    return [(it.instructions, it.edit_types, it.untouched) for it in sessions.found]


BOX = (0.25, 0.0, 1.0, 1.0)
EXPECTED = [
    (
        ("Add a hat", "Change the background to a beach"),
        ("subject_add", "background_change"),
        ((Region(name="cat", box=BOX), Region(name="sofa")), (Region(name="cat", box=BOX),)),
    ),
    (("Remove the spoon", "Make the cup red"), ("unspecified", "unspecified"), ()),
]


def test_jsonl(tmp_path: Path) -> None:
    sessions = read_sessions(write(tmp_path / "a.jsonl", [RECORDS[0], "", RECORDS[1]]))
    assert plain(sessions) == EXPECTED and sessions.faults == [] and sessions.unused == ()
    assert [it.place for it in sessions.found] == ["a.jsonl:1", "a.jsonl:3"]
    assert sessions.found[0].file == tmp_path / "photos" / "chelsea.png"


def test_prompt_is_one_turn_and_other_fields_are_named(tmp_path: Path) -> None:
    sessions = read_sessions(
        write(tmp_path / "a.jsonl", [{"prompt": "Add a\nhat", "image": "photos/coffee.png", "id": 3}])
    )
    assert plain(sessions) == [(("Add a hat",), ("unspecified",), ())] and sessions.unused == ("id",)


def test_folder_of_texts_and_of_metadata(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    for record in RECORDS:
        (tmp_path / record["image"]).with_suffix(".txt").write_text("\n".join(record["instructions"]) + "\n\n")
    sessions = read_sessions(str(folder))
    assert plain(sessions) == [(it[0], ("unspecified",) * 2, ()) for it in EXPECTED]
    assert sessions.faults[0].text == "there is no astronaut.txt beside it"
    assert [it.place for it in sessions.faults] == sorted(set(PHOTOS) - {"chelsea.png", "coffee.png"})
    moved = [{**it, "file_name": Path(it["image"]).name} for it in RECORDS]
    write(folder / "metadata.jsonl", [{k: v for k, v in it.items() if k != "image"} for it in moved])
    assert plain(read_sessions(str(folder))) == EXPECTED


@pytest.mark.parametrize("kind", ["picture", "struct", "bytes", "path"])
def test_parquet(kind: str, tmp_path: Path) -> None:
    def image(record: dict[str, Any]) -> Any:
        path = tmp_path / record["image"]
        content = path.read_bytes()
        return {"picture": str(path), "struct": {"bytes": content, "path": None}, "bytes": content,
                "path": record["image"]}[kind]  # fmt: skip

    columns: dict[str, list[Any]] = {
        "image": [image(it) for it in RECORDS],
        "instructions": [it["instructions"] for it in RECORDS],
        "edit_types": [it.get("edit_types") for it in RECORDS],
        "untouched_objects": [[[CAT, {"name": "sofa", "box": None}], [CAT]], None],
        "license": ["CC0", "CC0"],
    }
    table = datasets.Dataset.from_dict(columns)
    if kind == "picture":
        table = table.cast_column("image", datasets.Image())
    table.to_parquet(tmp_path / "a.parquet")
    sessions = read_sessions(str(tmp_path / "a.parquet"))
    assert plain(sessions) == EXPECTED and sessions.unused == ("license",)
    for record, session in zip(RECORDS, sessions.found, strict=True):
        shown = read_picture(tmp_path / record["image"])
        assert np.array_equal(np.asarray(session.read()), np.asarray(shown))
    assert len({it.image for it in sessions.found}) == 2


def test_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load_dataset(name: str, split: str) -> datasets.Dataset:
        calls.append((name, split))
        picture = {"bytes": photo("chelsea.png").read_bytes(), "path": None}
        return datasets.Dataset.from_dict({"image": [picture], "prompt": ["Add a hat"]})

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    for name in ("someone/edits", "someone/edits:test"):
        assert plain(read_sessions(name)) == [(("Add a hat",), ("unspecified",), ())]
    assert calls == [("someone/edits", "train"), ("someone/edits", "test")]


EDIVAL_ROWS = [
    # as in the public file: lists grow with the turn, some instructions are wrapped in quotes of their own
    (0, 1, ["subject_add"], ["Add bench"], True, ["white leaf"]),
    (0, 2, ["subject_add", "count_change"], ["Add bench", '"Change the count of leaf to 4"'], True, []),
    (7, 2, ["subject_remove", "text_change"], ["Remove sheep", "Add text 'LAMB'"], True, ["fence"]),
    (7, 1, ["subject_remove"], ["Remove sheep"], True, ["fence"]),
    (9, 1, ["color_alter"], 'Make it "red"', True, ["a [b]"]),  # a cell that is no list
]


def write_edival(path: Path, rows: list[tuple[Any, ...]]) -> str:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(EDIVAL_COLUMNS)
        for index, turn, types, instructions, background, unchanged in rows:
            writer.writerow([index, turn, types, instructions, instructions, background, unchanged, [], []])
    return str(path)


def test_edival(tmp_path: Path) -> None:
    (tmp_path / "input_images_resize_512").mkdir()
    for index, name in ((0, "flower.jpg"), (7, "china.jpg")):
        (tmp_path / "input_images_resize_512" / f"{index}_input_raw.jpg").write_bytes(photo(name).read_bytes())
    (tmp_path / "9.png").write_bytes(photo("coffee.png").read_bytes())
    sessions = read_sessions(write_edival(tmp_path / "edival.csv", EDIVAL_ROWS))
    assert sessions.faults == []
    assert plain(sessions) == [
        (("Add bench", "Change the count of leaf to 4"), ("subject_add", "count_change"),
         ((Region(name="white leaf"),), ())),
        (("Remove sheep", "Add text 'LAMB'"), ("subject_remove", "text_change"), ((Region(name="fence"),),) * 2),
        (('Make it "red"',), ("color_alter",), ((Region(name="a [b]"),),)),
    ]  # fmt: skip
    assert sessions.found[2].file == tmp_path / "9.png"
    rows = [*EDIVAL_ROWS, (11, 2, ["x"], ["y"], True, []), (12, 1, ["x"], ["unclosed", "["], True, [])]
    sessions = read_sessions(write_edival(tmp_path / "edival.csv", rows))
    assert [(it.place, it.kind, it.text.split(":")[0]) for it in sessions.faults] == [
        ("edival.csv:7", "fields", "turns are 2"),
        ("edival.csv:8", "image", "no such file"),
    ]


FAULTS = {
    "{not json": ("line", "is not JSON"),
    "[1]": ("fields", "must be an object"),
    '{"image": "a.png"}': ("fields", "must have either instructions"),
    '{"image": "a.png", "prompt": "a", "instructions": ["b"]}': ("fields", "must have either instructions"),
    '{"prompt": "a"}': ("fields", "must have image"),
    '{"image": 3, "prompt": "a"}': ("fields", "must have image"),
    '{"image": "a.png", "instructions": "make it red"}': ("fields", "instructions must be a list of texts"),
    '{"image": "a.png", "instructions": []}': ("fields", "instructions must be a list of texts"),
    '{"image": "a.png", "instructions": ["a", " "]}': ("fields", "instructions must be a list of texts, none"),
    '{"image": "a.png", "prompt": ""}': ("fields", "prompt must be a text"),
    '{"image": "a.png", "instruction": ["a"]}': ("fields", "instruction is no field: did you mean instructions?"),
    '{"image": "a.png", "prompt": "a", "edit_types": ["b", "c"]}': ("fields", "edit_types has 2: must have 1"),
    '{"image": "a.png", "prompt": "a", "untouched_objects": ["c"]}': ("fields", "untouched_objects must be 1 lists"),
    '{"image": "a.png", "prompt": "a", "objects": [{"box": [0, 0, 1, 1]}]}': ("fields", "objects has {'box'"),
    '{"image": "a.png", "prompt": "a", "objects": [{"name": "b", "box": [0, 0, 9, 1]}]}': ("fields", "objects has box"),
    '{"image": "nowhere.png", "prompt": "a"}': ("image", "no such file"),
}  # fmt: skip


@pytest.mark.parametrize(("line", "expected"), FAULTS.items())
def test_a_wrong_line_is_one_fault(line: str, expected: tuple[str, str], tmp_path: Path) -> None:
    sessions = read_sessions(write(tmp_path / "a.jsonl", [RECORDS[1], line]))
    (fault,) = sessions.faults
    assert len(sessions.found) == 1 and sessions.total == 2
    assert (fault.place, fault.kind) == ("a.jsonl:2", expected[0])
    assert fault.text.startswith(expected[1]) and "\n" not in fault.text


def test_data_that_cannot_be_read_at_all(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "words.txt").write_text("a")
    (tmp_path / "bad.parquet").write_text("a")
    (tmp_path / "bad.csv").write_text("image_index,turn\n0,1\n")
    (tmp_path / "empty").mkdir()
    datasets.Dataset.from_dict({"picture": ["a"], "text": ["b"]}).to_parquet(tmp_path / "columns.parquet")
    datasets.Dataset.from_dict({"image": ["a"], "prompts": ["b"]}).to_parquet(tmp_path / "near.parquet")
    cases = {
        "empty.jsonl": "holds no session",
        "binary.jsonl": "is not text in UTF-8",
        "words.txt": "format .txt is not known",
        "nowhere.jsonl": "cannot be read (No such file or directory)",
        "no/where/at all": "no such file or folder",
        "bad.parquet": "is no parquet file",
        "columns.parquet": "has columns picture, text: needs image",
        "near.parquet": "prompts is no column: did you mean prompt?",
        "bad.csv": "has no column turns: EdiVal's are image_index",
        "empty": "folder without metadata.jsonl and without images",
    }
    for name, message in cases.items():
        with pytest.raises(ValueError) as error:
            read_sessions(str(tmp_path / name))
        assert message in str(error.value) and "\n" not in str(error.value), name
    with pytest.raises(ValueError, match=r"the hub has no such data set"):
        read_sessions("nobody/nothing")


HEADERS = {
    "image;prompt\nphotos/coffee.png;a\n": "has columns image;prompt: give image, and instructions or prompt",
    "image\tprompt\nphotos/coffee.png\ta\n": "has columns image prompt: give image",
    "photos/coffee.png,a\n": "has columns photos/coffee.png, a: give image",
    "image,Instructions\nphotos/coffee.png,a\n": "Instructions is no column: did you mean instructions?",
    "image,prompt,prompt\nphotos/coffee.png,a,b\n": "has column prompt twice: give it once",
    "": "holds no session",
}


@pytest.mark.parametrize("text", HEADERS)
def test_the_first_line_of_a_csv_that_names_no_fields(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ValueError) as error:
        read_sessions(str(tmp_path / "a.csv"))
    assert " ".join(str(error.value).split()).startswith(HEADERS[text])


def test_a_csv_of_several_images_and_of_a_quote_that_is_not_closed(tmp_path: Path) -> None:
    """A list of images in a cell; names of columns after blanks. An open quote takes in what follows: no session."""
    several = '"[""photos/coffee.png"", ""photos/chelsea.png""]"'
    (tmp_path / "a.csv").write_text(f'images, prompt\n{several},a\n"[""photos/coffee.png""]","open\n[],b\n')
    sessions = read_sessions(str(tmp_path / "a.csv"))
    (found,), (fault,) = sessions.found, sessions.faults
    assert (found.image, [name for name, _ in found.references]) == ("photos/coffee.png", ["photos/chelsea.png"])
    assert found.instructions == ("a",) and fault.text == "is no CSV: unexpected end of data"


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    datasets.Dataset.from_dict({"image": ["a"], "prompt": ["b"]}).to_parquet(folder / "train-00000-of-00002.parquet")
    (folder / "train-00001-of-00002.parquet").write_text("a")
    with pytest.raises(ValueError, match=r"^has train-00001-of-00002.parquet, which is no parquet file"):
        read_sessions(str(folder))


def test_without_the_library_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_text("a")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ValueError, match=r"needs the datasets library: pip install 'mteditflow\[data\]'"):
        read_sessions(str(tmp_path / "a.parquet"))


def test_check_counts_and_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cut = photo("china.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(cut[: len(cut) // 3])
    bad = ['{"image": ', {"image": "cut.jpg", "prompt": "a"}, {"image": "photos/flower.jpg", "prompt": "a", "id": 1}]
    path = write(tmp_path / "a.jsonl", [*RECORDS, *bad])
    assert main(["check", path, "--num_turns", "2"]) == 1  # 2 of 5 are damaged
    out = capsys.readouterr().out
    for text in (
        "a.jsonl:3: is not JSON", "a.jsonl:4: cut.jpg: damaged: image file is truncated",
        "lines that cannot be read: 1",
        "missing or damaged images: 1", "fields that are not used: id", "too short", "3:2", "451x300", "640x427",
        "not fit for data.num_turns 2: 2 of 5 sessions usable, 2 damaged (40.0 %, at most 5.0 %)",
    ):  # fmt: skip
        assert text in out, text
    words = {tuple(line.replace("│", " ").split()) for line in out.splitlines()}
    assert {("subject_add", "1", "1"), ("unspecified", "3", "0"), ("2", "2", "whole")} <= words
    assert main(["check", path, "--num_turns", "2", "--max_bad_share", "0.4"]) == 0
    assert main(["check", path, "--num_turns", "3", "--max_bad_share", "0.4"]) == 1  # none is that long
    assert "0 of 5 sessions usable" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [["nowhere.jsonl"], ["mteditflow/train.py"], ["mteditflow/gone.py"], ["a.jsonl", "--num_turns", "0"]],
)
def test_check_of_bad_input_is_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["check", *arguments])
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.startswith("mteditflow: ") and err.count("\n") == 1


def test_a_key_is_the_session_wherever_it_lies(tmp_path: Path) -> None:
    one, two = read_sessions(write(tmp_path / "a.jsonl", RECORDS)).found
    copy_photos(tmp_path / "b" / "photos")
    moved = read_sessions(write(tmp_path / "b" / "c.jsonl", [RECORDS[1], RECORDS[0]])).found
    assert [it.key for it in moved] == [two.key, one.key] and one.key != two.key
    assert replace(one, instructions=("a",)).key != one.key
