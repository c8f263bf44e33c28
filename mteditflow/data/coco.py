"""COCO-style object lists to sessions: `python -m mteditflow.data generate COCO.json --images FOLDER --out FILE.jsonl`.

What is read: images (id, file_name, width, height), annotations (image_id, category_id, bbox [x, y, width, height] in
pixels; iscrowd), categories (id, name; isthing 0 is background, as in COCO's panoptic files). Boxes are of the picture
as it is shown; a file of another size than its entry says is left out. So are categories that cannot be counted
(iscrowd) or of which nothing is large enough to be edited.
"""

import json
import os
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

from mteditflow.data.generate import Thing, generate, untouched
from mteditflow.data.images import read_size

MIN_AREA = 0.005  # of the image: a box of 36 x 36 pixels at 512 x 512
MAX_TURNS = 10
Box = tuple[float, float, float, float]


def write_sessions(coco: str, *, images: str, out: str, num_turns: int, seed: int, per_image: int) -> str:
    """Write the JSONL that data.path reads, whole or not at all; the sentence that says what was done.

    The same file, seed and image name give the same session, whatever other images there are. ValueError in one line.
    """
    target, folder = Path(out), Path(images)
    _check_arguments(target, folder, num_turns, per_image)
    entries = read_coco(Path(coco))
    lines, left_out = [], Counter[str]()
    for name, size, things in entries:
        reason = _why_not(folder / name, size, things)
        if reason:
            left_out[reason] += 1
            continue
        path = Path(os.path.relpath(folder / name, target.parent)).as_posix()
        for copy in range(per_image):
            lines.append(json.dumps(session(path, things, num_turns, Random(f"{seed}/{name}/{copy}"))))
    skipped = "".join(f"; {count} images left out: {reason}" for reason, count in sorted(left_out.items()))
    if not lines:
        raise ValueError(f"{coco!r}: no session{skipped}")
    temporary = target.with_name(f".{target.name}")
    temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    temporary.replace(target)
    return f"{len(lines)} sessions of {num_turns} turns in {out}{skipped}"


def _check_arguments(target: Path, folder: Path, num_turns: int, per_image: int) -> None:
    """ValueError for an argument that cannot be followed."""
    for name, value, most in (("--turns", num_turns, MAX_TURNS), ("--per_image", per_image, 1000)):
        if not 1 <= value <= most:
            raise ValueError(f"{name} is {value}: must lie in 1 to {most}")
    if target.suffix != ".jsonl":
        raise ValueError(f"--out is {str(target)!r}: must end in .jsonl")
    if target.exists():
        raise ValueError(f"--out is {str(target)!r}: is there already, remove it or choose another")
    if not target.parent.is_dir():
        raise ValueError(f"--out is {str(target)!r}: there is no folder {target.parent}, make it")
    if not folder.is_dir():
        raise ValueError(f"--images is {str(folder)!r}: no such folder")


def session(image: str, things: list[Thing], num_turns: int, random: Random) -> dict[str, Any]:
    """A record of the JSONL."""
    steps = generate(things, num_turns, random)
    regions = [[{"name": it.name, "box": it.box} for it in turn] for turn in untouched(things, steps)]
    return {
        "image": image,
        "instructions": [step.instruction for step in steps],
        "edit_types": [step.edit_type for step in steps],
        "objects": [{"name": thing.kind, "box": box} for thing in things for box in thing.boxes],
        "untouched_objects": regions,
    }


def _why_not(path: Path, size: tuple[int, int], things: list[Thing]) -> str:
    """Why an image gives no session, or ''."""
    if not things:
        return "no object that can be edited"
    try:
        found = read_size(path)
    except ValueError as error:
        return str(error)
    return "" if found == size else "the file is of another size than its entry says"


def read_coco(path: Path) -> list[tuple[str, tuple[int, int], list[Thing]]]:
    """File name, (width, height) and things of each image, by file name. ValueError in one line."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{str(path)!r} cannot be read ({error.strerror}): give a COCO JSON file") from None
    except ValueError as error:  # no UTF-8, no JSON
        raise ValueError(f"{str(path)!r} is not JSON ({error}): give a COCO JSON file") from None
    parts = ("images", "annotations", "categories")
    if not isinstance(tree, dict) or not all(isinstance(tree.get(part), list) for part in parts):
        raise ValueError(f"{str(path)!r} is no COCO file: must have the lists {', '.join(parts)}")
    try:
        return _entries(tree)
    except (KeyError, TypeError, ValueError, ZeroDivisionError, AttributeError) as error:
        raise ValueError(
            f"{str(path)!r} has an entry without a field that it must have, or with a wrong one: {error!r}"
        ) from None


def _entries(tree: dict[str, Any]) -> list[tuple[str, tuple[int, int], list[Thing]]]:
    categories = {it["id"]: (" ".join(it["name"].split()), bool(it.get("isthing", 1))) for it in tree["categories"]}
    sizes = {it["id"]: (int(it["width"]), int(it["height"])) for it in tree["images"]}
    boxes: dict[Any, dict[str, list[Box]]] = {}
    crowded: set[tuple[Any, str]] = set()
    for it in tree["annotations"]:
        name, _ = categories[it["category_id"]]
        width, height = sizes[it["image_id"]]
        x, y, w, h = map(float, it["bbox"])
        box = (max(0.0, x / width), max(0.0, y / height), min(1.0, (x + w) / width), min(1.0, (y + h) / height))
        if it.get("iscrowd") or box[0] >= box[2] or box[1] >= box[3]:
            crowded.add((it["image_id"], name))
        boxes.setdefault(it["image_id"], {}).setdefault(name, []).append(_rounded(box))
    foreground = dict(categories.values())
    entries = []
    for it in tree["images"]:
        own = boxes.get(it["id"], {})
        things = [
            Thing(kind=name, count=len(found), boxes=tuple(found), is_foreground=foreground[name])
            for name, found in sorted(own.items())
            if (it["id"], name) not in crowded and max(map(_area, found)) >= MIN_AREA
        ]
        entries.append((it["file_name"], sizes[it["id"]], things))
    return sorted(entries, key=lambda entry: entry[0])


def _rounded(box: Box) -> Box:
    left, top, right, bottom = (round(side, 5) for side in box)
    return (left, top, right, bottom)


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
