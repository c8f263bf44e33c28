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

from mteditflow.config.ranges import require
from mteditflow.data.generate import Thing, generate, untouched_regions
from mteditflow.data.images import read_size
from mteditflow.types import Box

MIN_AREA = 0.005  # of the image: a box of 36 x 36 pixels at 512 x 512
MAX_TURNS, MAX_PER_IMAGE = 10, 1000
Entry = tuple[str, tuple[int, int], list[Thing]]
"""An image's file name, its (width, height), and the things in it."""


def write_sessions(coco: str, *, images: str, out: str, num_turns: int, seed: int, per_image: int) -> str:
    """Write the JSONL that data.path reads, whole or not at all; returns the sentence that says what was done.

    The same file, seed and image name give the same session, whatever other images there are. ValueError in one line.
    """
    target, folder = Path(out), Path(images)
    _check_arguments(target, folder, num_turns, per_image)
    lines, left_out = [], Counter[str]()
    for name, size, things in read_coco(Path(coco)):
        reason = _reason_to_skip(folder / name, size, things)
        if reason:
            left_out[reason] += 1
            continue
        path = Path(os.path.relpath(folder / name, target.parent)).as_posix()
        for copy in range(per_image):
            record = make_record(path, things, num_turns, Random(f"{seed}/{name}/{copy}"))
            lines.append(f"{json.dumps(record)}\n")
    skipped = "".join(f"; {count} images left out: {reason}" for reason, count in sorted(left_out.items()))
    if not lines:
        raise ValueError(f"{coco!r}: no session{skipped}")
    temporary = target.with_name(f".{target.name}")
    temporary.write_text("".join(lines), encoding="utf-8")
    temporary.replace(target)
    return f"{len(lines)} sessions of {num_turns} turns in {out}{skipped}"


def _check_arguments(target: Path, folder: Path, num_turns: int, per_image: int) -> None:
    """Raise ValueError for an argument that cannot be followed."""
    require(1 <= num_turns <= MAX_TURNS, "--turns", num_turns, f"must lie in 1 to {MAX_TURNS}")
    require(1 <= per_image <= MAX_PER_IMAGE, "--per_image", per_image, f"must lie in 1 to {MAX_PER_IMAGE}")
    require(target.suffix == ".jsonl", "--out", str(target), "must end in .jsonl")
    require(not target.exists(), "--out", str(target), "is there already, remove it or choose another")
    require(target.parent.is_dir(), "--out", str(target), f"there is no folder {target.parent}, make it")
    require(folder.is_dir(), "--images", str(folder), "no such folder, give that of the images")


def make_record(image: str, things: list[Thing], num_turns: int, random: Random) -> dict[str, Any]:
    """Draw a session on an image: a record of the JSONL."""
    steps = generate(things, num_turns, random)
    untouched = untouched_regions(things, steps)
    return {
        "image": image,
        "instructions": [step.instruction for step in steps],
        "edit_types": [step.edit_type for step in steps],
        "objects": [{"name": thing.kind, "box": box} for thing in things for box in thing.boxes],
        "untouched_objects": [[{"name": region.name, "box": region.box} for region in turn] for turn in untouched],
    }


def _reason_to_skip(path: Path, size: tuple[int, int], things: list[Thing]) -> str:
    """Say why an image gives no session; '' where it gives one."""
    if not things:
        return "no object that can be edited"
    try:
        return "" if read_size(path) == size else "the file is of another size than its entry says"
    except ValueError as error:
        return str(error)


def read_coco(path: Path) -> list[Entry]:
    """Read the images of a COCO file, sorted by file name. ValueError in one line."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{str(path)!r} cannot be read ({error.strerror}): give a COCO JSON file") from None
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, or nested too deep
        raise ValueError(f"{str(path)!r} is not JSON ({error}): give a COCO JSON file") from None
    lists = ("images", "annotations", "categories")
    if not isinstance(tree, dict) or not all(isinstance(tree.get(name), list) for name in lists):
        raise ValueError(f"{str(path)!r} is no COCO file: must have the lists {', '.join(lists)}")
    try:
        return _entries(tree)
    except (KeyError, TypeError, ValueError, ZeroDivisionError, AttributeError) as error:
        raise ValueError(
            f"{str(path)!r} has an entry without a field that it must have, or with a wrong one: {error!r}"
        ) from None


def _entries(tree: dict[str, Any]) -> list[Entry]:
    names = {category["id"]: " ".join(category["name"].split()) for category in tree["categories"]}
    is_foreground = {names[category["id"]]: bool(category.get("isthing", 1)) for category in tree["categories"]}
    sizes = {image["id"]: (int(image["width"]), int(image["height"])) for image in tree["images"]}
    boxes: dict[Any, dict[str, list[Box]]] = {image_id: {} for image_id in sizes}
    crowded: set[tuple[Any, str]] = set()
    for annotation in tree["annotations"]:
        image_id, name = annotation["image_id"], names[annotation["category_id"]]
        width, height = sizes[image_id]
        x, y, w, h = map(float, annotation["bbox"])
        left, top = max(0.0, x / width), max(0.0, y / height)
        right, bottom = min(1.0, (x + w) / width), min(1.0, (y + h) / height)
        if annotation.get("iscrowd") or left >= right or top >= bottom:
            crowded.add((image_id, name))
        box = (round(left, 5), round(top, 5), round(right, 5), round(bottom, 5))
        boxes[image_id].setdefault(name, []).append(box)
    entries = []
    for image in tree["images"]:
        things = [
            Thing(kind=name, count=len(found), boxes=tuple(found), is_foreground=is_foreground[name])
            for name, found in sorted(boxes[image["id"]].items())
            if (image["id"], name) not in crowded and max(map(_area, found)) >= MIN_AREA
        ]
        entries.append((image["file_name"], sizes[image["id"]], things))
    return sorted(entries, key=lambda entry: entry[0])


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
