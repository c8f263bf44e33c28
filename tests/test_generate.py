"""The generator of sessions: the pool's invariants over hundreds of sessions, English, and the COCO file."""

import json
import re
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from photos import copy_photos
from PIL import Image

from mteditflow.config.command import data as main
from mteditflow.data.formats import read_sessions
from mteditflow.data.generate import (
    COLORS,
    MATERIALS,
    NEW_OBJECTS,
    TEMPLATES,
    Step,
    Thing,
    Words,
    generate,
    plural,
    untouched_regions,
    with_article,
)
from mteditflow.world import edits

KINDS = ("person", "dog", "traffic light", "bus", "knife", "sky", "umbrella", "cat")


def things_of(random: Random) -> list[Thing]:
    """Up to five kinds, with one to four boxes each."""

    def box() -> tuple[float, float, float, float]:
        x, y = random.random() * 0.6, random.random() * 0.6
        return (x, y, x + 0.3, y + 0.3)

    kinds = random.sample(KINDS, random.randint(1, 5))
    counts = [random.choice((1, 1, 1, 2, 4)) for _ in kinds]
    return [
        Thing(kind=kind, count=n, boxes=tuple(box() for _ in range(n)), is_foreground=kind != "sky")
        for kind, n in zip(kinds, counts, strict=True)
    ]


def sessions(num: int, num_turns: int) -> list[tuple[list[Thing], list[Step]]]:
    made = []
    for i in range(num):
        random = Random(f"test/{i}")
        things = things_of(random)
        made.append((things, generate(things, num_turns, random)))
    return made


@pytest.mark.parametrize("num_turns", [3, 10])
def test_the_pool_is_kept(num_turns: int) -> None:
    """What an instruction names is there; what it makes is new; what is removed is gone; each type once in nine."""
    for things, steps in sessions(400, num_turns):
        before = {thing.kind: thing for thing in things}
        ever, text = set(before), ""
        for step in steps:
            assert all(kind in before for kind in step.touched), step.instruction
            for kind in step.touched:
                names = (before[kind].called, before[kind].plural, before[kind].name)
                assert any(name in step.instruction for name in names), step.instruction
            gone, made = set(before) - set(step.pool), set(step.pool) - set(before)
            match step.edit_type:
                case "subject_add":
                    assert not gone and len(made) == 1 and not made & ever
                case "subject_remove":
                    assert gone == set(step.touched) and not made and not any(before[kind].is_new for kind in gone)
                case "subject_replace":
                    assert gone == set(step.touched) and len(made) == 1 and not made & ever
                    assert not any(before[kind].is_new for kind in gone)
                    assert step.pool[made.copy().pop()].count == before[gone.copy().pop()].count
                case "background_change":
                    assert {kind for kind in gone} == {kind for kind, it in before.items() if not it.is_foreground}
                    assert step.pool and all(it.called in step.instruction for it in step.pool.values())
                case "text_change":
                    assert step.pool == before and step.text != text and (not text or text in step.instruction)
                case _:
                    assert not gone and not made
                    (target, *_) = step.touched
                    old, new = before[target], step.pool[target]
                    changed = {"color_alter": old.color != new.color, "material_alter": old.material != new.material,
                               "count_change": old.count != new.count, "position_change": old.boxes != new.boxes or
                               not old.boxes}  # fmt: skip
                    assert changed[step.edit_type]
            before, ever, text = step.pool, ever | set(step.pool), step.text
        counts = Counter(step.edit_type for step in steps)
        assert counts["background_change"] <= 1 and (num_turns > 3 or max(counts.values()) == 1)


def test_untouched_objects_only_shrink_and_are_never_named_as_a_target() -> None:
    num_boxes = 0
    for things, steps in sessions(400, 3):
        kept = untouched_regions(things, steps)
        boxes = {thing.kind: thing.boxes for thing in things}
        touched: set[str] = set()
        for turn, step in enumerate(steps):
            touched |= set(step.touched)
            names = {region.name for region in kept[turn]}
            assert names == {kind for kind in boxes if kind not in touched and kind in step.pool}
            assert Counter(region.name for region in kept[turn]) == {name: len(boxes[name]) for name in names}
            assert all(region.box in boxes[region.name] for region in kept[turn])
            assert turn == 0 or set(kept[turn]) <= set(kept[turn - 1])
            num_boxes += len(kept[turn])
    assert num_boxes > 1000


def test_every_type_comes_and_nothing_is_moved_to_where_it_is() -> None:
    assert set(TEMPLATES) == set(edits.EDIT_TYPES)  # EdiVal's nine
    counts: Counter[str] = Counter()
    for things, steps in sessions(600, 3):
        counts.update(step.edit_type for step in steps)
        first, boxes = steps[0], {thing.kind: thing.boxes for thing in things}
        if first.edit_type == "position_change":
            (old, at), words = first.touched, first.instruction
            (l0, t0, r0, b0), (l1, t1, r1, b1) = boxes[old][0], boxes[at][0]
            is_there = {"left": l0 + r0 < l1 + r1, "right": l0 + r0 > l1 + r1, "above": t0 + b0 < t1 + b1,
                        "below": t0 + b0 > t1 + b1}  # fmt: skip
            side = re.search(r"(left|right|above|below)", words)
            assert side and not is_there[side[1]], words
    assert min(counts.values()) > 100 and len(counts) == 9  # 200 each, were all feasible


def test_what_an_edit_has_done_is_not_asked_for_again() -> None:
    """Nothing is put where an edit has put it, and nothing made of what its name says; of two values there is one."""
    opposite = {"left": "right", "right": "left", "above": "below", "below": "above"}
    words = Words(shares={"subject_add": 1.0, "position_change": 1.0})
    num_moves = 0
    for i in range(300):
        beside: dict[str, tuple[str, str]] = {}
        for step in generate([Thing(kind=kind) for kind in ("dog", "cup")], 10, Random(f"again/{i}"), words):
            side = re.search(r"(left|right|above|below)", step.instruction)
            assert side
            if step.edit_type == "position_change":
                old, at = step.touched
                num_moves += 1
                there = beside.get(old) == (side[1], at) or beside.get(at) == (opposite[side[1]], old)
                assert not there, step.instruction
            else:
                old = next(reversed(step.pool))
                at = next(kind for kind in step.pool if step.instruction.endswith(f" {kind}"))
            beside[old] = side[1], at
    assert num_moves > 1000
    shares = {"color_alter": 1.0, "material_alter": 1.0}
    two = Words(colors=("red", "blue"), materials=("wood", "paper"), shares=shares)
    for i in range(100):
        steps = generate([Thing(kind="wooden bench"), Thing(kind="red balloon")], 10, Random(i), two)
        first = {step.touched[0] + step.edit_type: step.pool[step.touched[0]] for step in reversed(steps)}
        assert len(steps) == 10
        assert first.get("wooden benchmaterial_alter", Thing(kind="", material="paper")).material == "paper"
        assert first.get("red ballooncolor_alter", Thing(kind="", color="blue")).color == "blue"


def test_a_pool_can_run_empty_and_new_names_can_run_out() -> None:
    for i in range(50):
        steps = generate([Thing(kind="sky", is_foreground=False)], 10, Random(i))
        assert len(steps) == 10
        full = [Thing(kind=kind) for kind in NEW_OBJECTS]
        types = {step.edit_type for step in generate(full, 10, Random(i))}
        assert not types & {"subject_add", "subject_replace"}


def test_sessions_read_well() -> None:
    """What is part of a place is neither counted, moved nor taken away; people are not painted; articles fit."""
    scenery, mass = ("sky", "grass"), ("broccoli", "long hair")
    kinds = [*scenery, *mass, "woman", "dog", "scissors", "umbrella", "hour glass"]
    seen: Counter[str] = Counter()
    for i in range(2000):
        random = Random(f"read/{i}")
        things = [
            Thing(
                kind=kind, count=random.choice((1, 2, 5)), is_foreground=kind != "grass", boxes=((0.1, 0.1, 0.5, 0.5),)
            )
            for kind in random.sample(kinds, 4)
        ]
        for step in generate(things, 3, random):
            text, touched = step.instruction, step.touched
            assert not re.search(
                r"\ba [aeio]|\ban [^aeiouh]|\bto to\b|\bthe the\b|\b(skies|grasses|hairs|broccolis)\b", text
            ), text
            assert not re.search(r"\d (sky|grass|broccoli|long hair)|scissorses|\b1 \w+s\b|a scissors", text), text
            if step.edit_type in ("subject_remove", "subject_replace", "position_change", "material_alter"):
                assert not set(touched) & {*scenery}, text
            if step.edit_type in ("count_change", "position_change"):
                assert not set(touched) & {*scenery, *mass}, text
            if step.edit_type in ("color_alter", "material_alter"):
                assert "woman" not in touched, text
            seen.update(
                re.findall(r"an autumn park|only one|the 2 pairs of scissors|the sky|the 5 women|to the image", text)
            )
    assert len(seen) == 6, seen


def test_chosen_edit_types_and_words(coco: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Types that are not named do not come; shares are relative; a user's lists stand for ours."""
    words = Words(colors=("mauve", "teal"), shares={"color_alter": 3.0, "text_change": 1.0, "subject_add": 0.0})
    first = Counter(generate(things_of(Random(i)), 1, Random(i), words)[0].edit_type for i in range(2000))
    assert set(first) == {"color_alter", "text_change"}
    assert abs(first["color_alter"] / 2000 - 0.75) < 4 * (0.75 * 0.25 / 2000) ** 0.5  # four standard deviations
    (coco / "words.yaml").write_text("colors: [mauve, teal]\nbackgrounds: [igloo, orchard]\n")
    chosen = (
        "--words",
        str(coco / "words.yaml"),
        "--edit_types",
        "color_alter=2,background_change",
        "--per_image",
        "9",
    )
    records = [json.loads(line) for line in run(coco, "a.jsonl", "--turns", "2", *chosen)]
    said = " ".join(text for record in records for text in record["instructions"])
    assert {name for record in records for name in record["edit_types"]} == {"color_alter", "background_change"}
    assert re.search("mauve|teal", said) and re.search("an igloo|an orchard", said)
    assert not re.search("|".join((*COLORS, "beach", "forest")), said)
    assert "(color_alter 50.0 %, background_change 50.0 %)" in capsys.readouterr().out
    for given, message in (
        ("--words=nowhere.yaml", "--words is 'nowhere.yaml': cannot be read"),
        ("--edit_types=color_alte", "did you mean color_alter?"),
        ("--edit_types=color_alter=0", "must be a number in (0, 1000]"),
        ("--edit_types=color_alter=nan", "must be a number"),
        ("--edit_types=background_change", "the edit types cannot be asked for as often"),
        (f"--words={coco / 'coco.json'}", "a list is 'images'"),
        (f"--words={coco / 'one.yaml'}", "at least two different"),
        (f"--words={coco / 'photos' / 'china.jpg'}", "is no YAML file"),
    ):
        (coco / "one.yaml").write_text("colors: [mauve]\n")
        with pytest.raises(SystemExit):
            run(coco, "b.jsonl", given)
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1, err


def test_a_damaged_entry_of_a_coco_file_is_left_out(coco: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An image, a category or an annotation; a box that is none leaves its kind out of its image, and nothing else."""
    expected = run(coco, "a.jsonl")
    nan = float("nan")
    wrong: dict[str, list[object]] = {
        "images": [{}, 3, {"id": [], "file_name": "a.png", "width": 1, "height": 1}, {"id": 9, "file_name": "b.png"},
                   {"id": 10, "file_name": "\ud800.png", "width": 3, "height": 3},
                   {"id": 11, "file_name": "c.png", "width": nan, "height": 3}],
        "categories": [{"id": 99}, {"name": "a"}, None, {"id": 98, "name": 3}],
        "annotations": [{}, None, {"image_id": 77, "category_id": 1, "bbox": [0, 0, 9, 9]},
                        {"image_id": 1, "category_id": 77, "bbox": [0, 0, 9, 9]}],
    }  # fmt: skip
    (coco / "coco.json").write_text(json.dumps({name: [*wrong[name], *COCO[name]] for name in wrong}))
    assert run(coco, "b.jsonl") == expected
    said = capsys.readouterr().out
    for count, name in ((6, "images"), (4, "categories"), (4, "annotations")):
        assert f"{count} {name} left out: an entry without a field that it must have" in said
    boxes = [[nan, 0, 9, 9], [0, 0, float("inf"), 9], [0, 0, 9], "box", None, [0, 0, -9, 9]]
    for i, box in enumerate(boxes):
        more = {"image_id": 2, "category_id": 47, "bbox": box}  # of cup, of which a right one is there too
        (coco / "coco.json").write_text(json.dumps({**COCO, "annotations": [*COCO["annotations"], more]}))
        (record,) = [it for it in map(json.loads, run(coco, f"box{i}.jsonl")) if "coffee" in it["image"]]
        assert {it["name"] for it in record["objects"]} == {"spoon"}, box
    (coco / "secret.png").write_bytes((coco / "photos" / "chelsea.png").read_bytes())
    moved = [{**it, "file_name": "../secret.png"} if it["id"] == 1 else it for it in COCO["images"]]
    (coco / "coco.json").write_text(json.dumps({**COCO, "images": moved}))
    assert len(run(coco, "c.jsonl")) == 1 and "is outside of" in capsys.readouterr().out
    (coco / "coco.json").write_text("[" * 100_000)
    with pytest.raises(SystemExit):
        run(coco, "d.jsonl")
    assert "is not JSON" in capsys.readouterr().err


def test_english() -> None:
    many = {"dog": "dogs", "bus": "buses", "person": "people", "wine glass": "wine glasses", "puppy": "puppies",
            "vase of flowers": "vases of flowers", "sheep": "sheep", "traffic light": "traffic lights", "toy": "toys",
            "old man": "old men", "sandwich": "sandwiches"}  # fmt: skip
    assert {word: plural(word) for word in many} == many
    assert [with_article(it) for it in ("dog", "owl", "unicycle", "umbrella")] == [
        "a dog", "an owl", "a unicycle", "an umbrella"
    ]  # fmt: skip
    assert Thing(kind="dog", count=3, color="red").called == "the 3 red dogs"
    assert Thing(kind="dog", color="red", material="glass").called == "the red glass dog"
    assert not set(COLORS) & set(MATERIALS)


COCO = {
    "images": [
        {"id": 1, "file_name": "chelsea.png", "width": 451, "height": 300},
        {"id": 2, "file_name": "coffee.png", "width": 600, "height": 400},
        {"id": 3, "file_name": "rocket.jpg", "width": 640, "height": 427},
        {"id": 4, "file_name": "flower.jpg", "width": 100, "height": 100},
        {"id": 5, "file_name": "nowhere.jpg", "width": 100, "height": 100},
        {"id": 6, "file_name": "china.jpg", "width": 640, "height": 427},
    ],
    "annotations": [
        {"image_id": 1, "category_id": 17, "bbox": [90, 15, 320, 280]},
        {"image_id": 1, "category_id": 63, "bbox": [0, 0, 451, 100]},
        {"image_id": 2, "category_id": 47, "bbox": [150, 60, 280, 270]},
        {"image_id": 2, "category_id": 50, "bbox": [400, 80, 180, 240]},
        {"image_id": 2, "category_id": 50, "bbox": [10, 80, 50, 240]},
        {"image_id": 3, "category_id": 1, "bbox": [0, 0, 5, 5]},
        {"image_id": 3, "category_id": 17, "bbox": [0, 0, 300, 300], "iscrowd": 1},
        {"image_id": 4, "category_id": 1, "bbox": [0, 0, 90, 90]},
        {"image_id": 5, "category_id": 1, "bbox": [0, 0, 90, 90]},
    ],
    "categories": [
        {"id": 1, "name": "person"}, {"id": 17, "name": "cat"}, {"id": 47, "name": "cup"}, {"id": 50, "name": "spoon"},
        {"id": 63, "name": "curtain", "isthing": 0},
    ],
}  # fmt: skip


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    copy_photos(tmp_path / "photos")
    (tmp_path / "coco.json").write_text(json.dumps(COCO))
    (tmp_path / "out").mkdir()
    return tmp_path


def run(folder: Path, name: str, *more: str) -> list[str]:
    out = folder / "out" / name
    arguments = ["generate", str(folder / "coco.json"), "--images", str(folder / "photos"), "--out", str(out), *more]
    assert main(arguments) == 0
    return out.read_text().splitlines()


def test_coco_to_sessions_that_can_be_read(coco: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(coco, "a.jsonl", "--turns", "4", "--per_image", "3")
    said = capsys.readouterr().out
    assert "6 sessions of 4 turns" in said and "2 images left out: no object that can be edited" in said
    assert "1 images left out: no such file" in said and "of another size than its entry says" in said
    sessions = read_sessions(str(coco / "out" / "a.jsonl"), str(coco))
    assert sessions.faults == [] and sessions.unused == () and len(sessions.found) == 6
    assert {len(it.instructions) for it in sessions.found} == {4} == {len(it.untouched) for it in sessions.found}
    assert {it.file.resolve() for it in sessions.found if it.file} == {
        coco / "photos" / "chelsea.png", coco / "photos" / "coffee.png"
    }  # fmt: skip
    record = next(it for it in map(json.loads, lines) if it["image"].endswith("coffee.png"))
    assert record["image"] == "../photos/coffee.png"
    assert record["objects"] == [
        {"name": "cup", "box": [0.25, 0.15, 0.71667, 0.825]},
        {"name": "spoon", "box": [0.66667, 0.2, 0.96667, 0.8]},
        {"name": "spoon", "box": [0.01667, 0.2, 0.1, 0.8]},
    ]
    assert main(["check", str(coco / "out" / "a.jsonl"), "--allowed_folder", str(coco)]) == 0


def test_the_same_seed_gives_the_same_sessions_whatever_else_is_there(coco: Path) -> None:
    one = run(coco, "a.jsonl", "--seed", "3")
    assert run(coco, "b.jsonl", "--seed", "3") == one != run(coco, "c.jsonl", "--seed", "4")
    assert run(coco, "d.jsonl", "--seed", "3", "--per_image", "2")[::2] == one
    fewer = {**COCO, "images": COCO["images"][1:2], "annotations": COCO["annotations"][2:5]}
    (coco / "coco.json").write_text(json.dumps(fewer))
    assert run(coco, "e.jsonl", "--seed", "3") == [line for line in one if "coffee" in line]


def test_boxes_are_of_the_picture_as_it_is_shown(coco: Path) -> None:
    """A photograph that lies on its side in the file has its entry's size once turned."""
    path = coco / "photos" / "chelsea.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(path).convert("RGB").transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    assert any("chelsea" in line for line in run(coco, "a.jsonl"))


def test_generate_of_bad_input_is_one_line(coco: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (coco / "there.jsonl").write_text("mine\n")
    for name, content in (("words", "a"), ("list", "[]"),
                          ("entry", '{"images": [{}], "annotations": [], "categories": []}'),
                          ("empty", '{"images": [], "annotations": [], "categories": []}')):  # fmt: skip
        (coco / f"{name}.json").write_text(content)
    right = {"coco": "coco.json", "images": "photos", "out": "new.jsonl", "turns": "3"}
    for changed, message in (
        ({"coco": "nowhere.json"}, "cannot be read (No such file"), ({"coco": "words.json"}, "is not JSON"),
        ({"coco": "list.json"}, "is no COCO file"), ({"coco": "entry.json"}, "an entry without a field"),
        ({"coco": "empty.json"}, "no session"), ({"images": "nowhere"}, "no such folder"),
        ({"out": "there.jsonl"}, "is there already"), ({"out": "a.json"}, "must end in .jsonl"),
        ({"out": "no/a.jsonl"}, "there is no folder"), ({"turns": "0"}, "--turns is 0: must lie in 1 to 10"),
    ):  # fmt: skip
        own = right | changed
        arguments = ["generate", str(coco / own["coco"]), "--images", str(coco / own["images"])]
        with pytest.raises(SystemExit) as stop:
            main([*arguments, "--out", str(coco / own["out"]), "--turns", own["turns"]])
        out, err = capsys.readouterr()
        assert stop.value.code == 2 and out == "" and err.count("\n") == 1 and message in err, err
    assert (coco / "there.jsonl").read_text() == "mine\n"
