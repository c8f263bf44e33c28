"""Object lists to sessions: `mteditflow data generate COCO.json --images FOLDER --out FILE.jsonl`, or, of Open Images,
`mteditflow data generate --open_images BOXES.csv --images FOLDER --out FILE.jsonl`.

Of COCO's format is read: images (id, file_name, width, height), annotations (image_id, category_id, bbox [x, y, width,
height] in pixels; iscrowd), categories (id, name; isthing 0 is background, as in COCO's panoptic files). Boxes are of
the picture as it is shown; a file of another size than its entry says is left out. Of Open Images: ImageID, LabelName,
XMin, XMax, YMin, YMax in shares of the picture (IsGroupOf, IsDepiction, IsInside), and the names of its classes.

Left out, too, are categories of which nothing is large enough to be edited, and those that an image has in a number
that is not known: iscrowd, IsGroupOf, a box that is none. An entry that cannot be read is left out, and counted.
"""

import difflib
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import yaml

from mteditflow.config.errors import suggest
from mteditflow.config.ranges import require
from mteditflow.data.generate import SHARES, Thing, Words, generate, untouched_regions
from mteditflow.data.images import SUFFIXES, is_turned, read_size
from mteditflow.data.rows import csv_body
from mteditflow.data.sessions import Folder, check_text, digest
from mteditflow.types import Box

MIN_AREA = 0.005  # of the image: a box of 36 x 36 pixels at 512 x 512
MAX_TURNS, MAX_PER_IMAGE, MAX_IMAGES = 10, 1000, 10_000_000
NUM_IMAGES = 2319  # of the paper's training set, taken from Open Images
# twelve, as in the paper; which ones is ours, frequent in Open Images and unlike one another
CATEGORIES = ("Woman", "Man", "Dog", "Cat", "Bird", "Horse", "Car", "Bicycle", "Chair", "Flower", "Boat", "Bottle")
CLASSES = ("class-descriptions-boxable.csv", "oidv7-class-descriptions-boxable.csv")  # beside the boxes
BOXES = "oidv6-train-annotations-bbox.csv"
BOX_COLUMNS = ("ImageID", "LabelName", "XMin", "XMax", "YMin", "YMax")
UNCOUNTED = ("IsGroupOf", "IsDepiction", "IsInside")
BAD_ENTRY = "an entry without a field that it must have, or with a wrong one"
LeftOut = Counter[tuple[str, str]]
"""How many were left out, by what they are and why."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """An image's file name, its (width, height) where the list says it, and the things in it."""

    name: str
    size: tuple[int, int] | None
    things: list[Thing]


@dataclass
class Boxes:
    """The boxes of an image so far, by kind, and the kinds that cannot be counted."""

    by_kind: dict[str, list[Box]] = field(default_factory=dict)
    uncounted: set[str] = field(default_factory=set)

    def add(self, kind: str, sides: Sequence[float], *, is_counted: bool = True) -> None:
        """Add a box (left, top, right, bottom) in shares of the picture; what is beyond its edges is cut off."""
        is_box = all(map(math.isfinite, sides))
        left, top, right, bottom = (min(1.0, max(0.0, side)) if is_box else 0.0 for side in sides)
        if not is_counted or left >= right or top >= bottom:
            self.uncounted.add(kind)
        box = (round(left, 5), round(top, 5), round(right, 5), round(bottom, 5))
        self.by_kind.setdefault(kind, []).append(box)

    def things(self, is_foreground: dict[str, bool]) -> list[Thing]:
        """Make the things that can be edited."""
        return [
            Thing(kind=kind, count=len(found), boxes=tuple(found), is_foreground=is_foreground.get(kind, True))
            for kind, found in sorted(self.by_kind.items())
            if kind not in self.uncounted and max(map(_area, found)) >= MIN_AREA
        ]


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


@dataclass(frozen=True, kw_only=True)
class Order:
    """The arguments of `data generate`."""

    coco: str
    open_images: str
    classes: str
    categories: str
    num_images: int | None
    images: str
    out: str
    turns: int
    per_image: int
    seed: int
    words: str
    edit_types: str

    def __post_init__(self) -> None:
        is_one = bool(self.coco) != bool(self.open_images)
        require(is_one, "--open_images", self.open_images, "give either it or a COCO file")
        require(1 <= self.turns <= MAX_TURNS, "--turns", self.turns, f"must lie in 1 to {MAX_TURNS}")
        is_right = 1 <= self.per_image <= MAX_PER_IMAGE
        require(is_right, "--per_image", self.per_image, f"must lie in 1 to {MAX_PER_IMAGE}")
        for name in () if self.open_images else ("classes", "categories", "num_images"):
            require(not getattr(self, name), f"--{name}", getattr(self, name), "is of --open_images: leave it out")
        is_right = self.num_images is None or 1 <= self.num_images <= MAX_IMAGES
        require(is_right, "--num_images", self.num_images, f"must lie in 1 to {MAX_IMAGES}")
        target = Path(self.out)
        require(target.suffix == ".jsonl", "--out", self.out, "must end in .jsonl")
        require(not target.exists(), "--out", self.out, "is there already, remove it or choose another")
        require(target.parent.is_dir(), "--out", self.out, f"there is no folder {target.parent}, make it")
        require(Path(self.images).is_dir(), "--images", self.images, "no such folder")
        is_there = not self.open_images or Path(self.open_images).is_file()
        require(is_there, "--open_images", self.open_images, f"no such file; take Open Images' {BOXES}")

    @property
    def folder(self) -> Folder:
        """The folder of the images, which none of them leaves."""
        root = Path(os.path.realpath(self.images))
        return Folder(root=root, allowed=root)


def write_sessions(order: Order) -> str:
    """Write the JSONL that data.path reads, whole or not at all; returns the sentence that says what was done.

    The same list, seed and image name give the same session, whatever other images there are. ValueError in one line.
    """
    words, left_out = read_words(order.words, order.edit_types), LeftOut()
    if order.coco:
        entries, ending = _usable(read_coco(Path(order.coco), left_out), order.folder, left_out), ""
    else:
        categories = [name.strip() for name in order.categories.split(",")] if order.categories else [*CATEGORIES]
        boxes, wanted = Path(order.open_images), order.num_images or NUM_IMAGES
        found = read_open_images(boxes, _classes_file(boxes, order.classes), order.folder, categories, left_out)
        entries = choose(_by_hash(found, order, left_out), [name.lower() for name in categories], wanted)
        ending = f"; --num_images is {wanted}: there are no more" if len(entries) < wanted else ""
    lines, edit_types = _make_lines(entries, order, words, left_out)
    skipped = "".join(f"; {count} {what} left out: {reason}" for (what, reason), count in sorted(left_out.items()))
    if not lines:
        raise ValueError(f"{order.coco or order.open_images!r}: no session{skipped}")
    target = Path(order.out)
    temporary = target.with_name(f".{target.name}")
    temporary.write_text("".join(lines), encoding="utf-8")
    temporary.replace(target)
    num = len(lines) * order.turns
    shares = ", ".join(f"{name} {100 * count / num:.1f} %" for name, count in edit_types.most_common())
    is_inside = order.folder.root.is_relative_to(os.path.realpath(target.parent))
    remedy = "" if is_inside else f"; a run needs data.allowed_folder {order.folder.root}, where the pictures are"
    return f"{len(lines)} sessions of {order.turns} turns in {order.out} ({shares}){ending}{remedy}{skipped}"


def _make_lines(
    entries: Iterable[Entry], order: Order, words: Words, left_out: LeftOut
) -> tuple[list[str], Counter[str]]:
    """Draw the sessions of the entries, a line each; count what they ask for."""
    lines, edit_types, folder = list[str](), Counter[str](), os.path.realpath(Path(order.out).parent)
    for entry in entries:
        path = Path(os.path.relpath(order.folder.file(entry.name), folder)).as_posix()
        for copy in range(order.per_image):
            record = make_record(path, entry.things, order.turns, Random(f"{order.seed}/{entry.name}/{copy}"), words)
            if len(record["instructions"]) < order.turns:
                left_out["images", "the edit types cannot be asked for as often"] += 1
                break
            edit_types.update(record["edit_types"])
            lines.append(f"{json.dumps(record)}\n")
    return lines, edit_types


def _classes_file(boxes: Path, classes: str) -> Path:
    """Find the file of class names: the one that is told, or one of Open Images' beside the boxes."""
    there = [boxes.parent / name for name in CLASSES if (boxes.parent / name).is_file()]
    path = Path(classes) if classes else (there or [boxes.parent / CLASSES[0]])[0]
    require(
        path.is_file(), "--classes", str(path), "no such file: Open Images has it as class-descriptions-boxable.csv"
    )
    return path


def read_words(path: str, edit_types: str) -> Words:
    """Read a user's words, a YAML file of lists; edit_types: as 'color_alter=2,subject_add', '' for all alike.

    ValueError: field, value, remedy.
    """
    lists: dict[str, tuple[str, ...]] = {}
    if path:
        try:
            tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"--words is {path!r}: cannot be read ({error.strerror})") from None
        except (ValueError, RecursionError, yaml.YAMLError) as error:
            raise ValueError(f"--words is {path!r}: is no YAML file: {' '.join(str(error).split())}") from None
        names = [name for name in Words.__dataclass_fields__ if name != "shares"]
        require(isinstance(tree, dict), "--words", path, f"must be a YAML file with some of {', '.join(names)}")
        for name, value in tree.items():
            require(name in names, f"{path}: a list", name, suggest(str(name), names))
            is_right = isinstance(value, list) and all(isinstance(it, str) and it.strip() for it in value)
            is_right = is_right and len({*value}) > 1  # of one colour there is nothing to change to
            require(is_right, f"{path}: {name}", value, "must be a list of at least two different texts")
            lists[name] = tuple(" ".join(check_text(it, name).split()) for it in value)
    return Words(**lists, shares=_read_shares(edit_types))


def _read_shares(text: str) -> dict[str, float]:
    """Read the edit types that are drawn, and how often relative to each other."""
    shares = dict.fromkeys(SHARES, 0.0) if text else dict(SHARES)
    for part in filter(None, text.split(",")):
        name, _, share = part.strip().partition("=")
        require(name in shares, "--edit_types", name, suggest(name, list(shares)))
        shares[name] = _number(share) if share else 1.0
        require(0 < shares[name] <= 1000, f"--edit_types {name}", share, "must be a number in (0, 1000]")
    return shares


def make_record(image: str, things: list[Thing], num_turns: int, random: Random, words: Words) -> dict[str, Any]:
    """Draw a session on an image: a record of the JSONL."""
    steps = generate(things, num_turns, random, words)
    untouched = untouched_regions(things, steps)
    return {
        "image": image,
        "instructions": [step.instruction for step in steps],
        "edit_types": [step.edit_type for step in steps],
        "objects": [{"name": thing.kind, "box": box} for thing in things for box in thing.boxes],
        "untouched_objects": [[{"name": region.name, "box": region.box} for region in turn] for turn in untouched],
    }


def _usable(entries: Iterable[Entry], folder: Folder, left_out: LeftOut) -> Iterator[Entry]:
    """Pass on the entries that can give a session, and count why the others cannot."""
    for entry in entries:
        if reason := _reason_to_skip(entry, folder):
            left_out["images", reason] += 1
        else:
            yield entry


def _reason_to_skip(entry: Entry, folder: Folder) -> str:
    """Say why an image gives no session; '' where it gives one."""
    if not entry.things:
        return "no object that can be edited"
    try:
        check_text(entry.name, "file_name")
        file = folder.file(entry.name)
        if entry.size is None:
            return "turned by its EXIF data, and whether its boxes are is not known" if is_turned(file) else ""
        return "" if read_size(file) == entry.size else "the file is of another size than its entry says"
    except ValueError as error:
        return str(error).partition(":")[0] if str(error).startswith("no such file") else str(error)


def read_coco(path: Path, left_out: LeftOut) -> list[Entry]:
    """Read the images of a COCO file, sorted by file name; damaged entries are counted. ValueError in one line."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{str(path)!r} cannot be read ({error.strerror}): give a COCO JSON file") from None
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, or nested without end
        raise ValueError(f"{str(path)!r} is not JSON ({error}): give a COCO JSON file") from None
    lists = ("images", "annotations", "categories")
    if not isinstance(tree, dict) or not all(isinstance(tree.get(name), list) for name in lists):
        raise ValueError(f"{str(path)!r} is no COCO file: must have the lists {', '.join(lists)}")
    names, is_foreground = _read_categories(tree["categories"], left_out)
    images = dict[Any, tuple[str, tuple[int, int]]]()
    for image in tree["images"]:
        with _counted(left_out, "images"):
            images[image["id"]] = check_text(image["file_name"], "file_name"), _size_of(image)
    boxes = {image_id: Boxes() for image_id in images}
    for annotation in tree["annotations"]:
        with _counted(left_out, "annotations"):
            image_id, name = annotation["image_id"], names[annotation["category_id"]]
            sides, is_counted = _sides(annotation, images[image_id][1]), not annotation.get("iscrowd")
            boxes[image_id].add(name, sides, is_counted=is_counted)
    entries = [
        Entry(name=name, size=size, things=boxes[image_id].things(is_foreground))
        for image_id, (name, size) in images.items()
    ]
    return sorted(entries, key=lambda entry: entry.name)


@contextmanager
def _counted(left_out: LeftOut, what: str) -> Iterator[None]:
    """Leave out, and count, an entry that is damaged."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        left_out[what, BAD_ENTRY] += 1


def _read_categories(categories: list[Any], left_out: LeftOut) -> tuple[dict[Any, str], dict[str, bool]]:
    """Read the name of each category, by its id, and whether it is in the foreground, by its name."""
    names, is_foreground = dict[Any, str](), dict[str, bool]()
    for category in categories:
        with _counted(left_out, "categories"):
            name = clean_name(check_text(category["name"], "name"))
            names[category["id"]], is_foreground[name] = name, bool(category.get("isthing", 1))
    return names, is_foreground


def clean_name(name: str) -> str:
    """Write a category as one says it: COCO's 'wall-brick' is a brick wall, its 'sky-other-merged' is sky."""
    words = " ".join(name.split())
    for ending in ("-merged", "-other"):
        words = words.removesuffix(ending)
    head, dash, what = words.partition("-")
    return f"{what} {head}" if dash and head in ("wall", "floor", "ceiling", "window", "mirror") else words


def _size_of(image: dict[str, Any]) -> tuple[int, int]:
    width, height = int(image["width"]), int(image["height"])
    if width < 1 or height < 1:
        raise ValueError("an image has at least a pixel")
    return width, height


def _sides(annotation: dict[str, Any], size: tuple[int, int]) -> tuple[float, ...]:
    """Take a box, as (left, top, right, bottom) in shares of the picture; NaN where it is none."""
    try:
        x, y, w, h = map(float, annotation["bbox"])
    except (KeyError, TypeError, ValueError, OverflowError):
        return (math.nan,) * 4
    return (x / size[0], y / size[1], (x + w) / size[0], (y + h) / size[1])


def read_open_images(
    boxes: Path, classes: Path, folder: Folder, categories: Sequence[str], left_out: LeftOut
) -> list[Entry]:
    """Read the boxes of these categories on the pictures that are in the folder, named by their ImageIDs."""
    names = _read_classes(classes, categories)
    found = sorted(path.relative_to(folder.root) for path in folder.root.rglob("*"))
    files = {path.stem: path.as_posix() for path in found if path.suffix.lower() in SUFFIXES and path.name[0] != "."}
    rows = csv_body(boxes)
    _, columns = next(rows, (0, ""))
    for name in BOX_COLUMNS:
        if name not in columns:
            raise ValueError(
                f"{str(boxes)!r} has no column {name}: give Open Images' boxes, oidv6-train-annotations-bbox.csv"
            )
    place = {name: columns.index(name) for name in columns}
    by_image: dict[str, Boxes] = {}
    for _, cells in rows:  # of 14 million: no more than needed is done for a row
        if not isinstance(cells, list) or len(cells) < len(columns):
            left_out["rows", "no row of boxes"] += 1
        elif cells[place["ImageID"]] in files and cells[place["LabelName"]] in names:
            sides = [_number(cells[place[name]]) for name in ("XMin", "YMin", "XMax", "YMax")]
            is_counted = not any(cells[place[name]] == "1" for name in UNCOUNTED if name in place)
            image = by_image.setdefault(cells[place["ImageID"]], Boxes())
            image.add(names[cells[place["LabelName"]]], sides, is_counted=is_counted)
    return [
        Entry(name=files[image_id], size=None, things=by_image[image_id].things({})) for image_id in sorted(by_image)
    ]


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return math.nan


def _read_classes(path: Path, categories: Sequence[str]) -> dict[str, str]:
    """Read the names of these categories, in small letters, by their labels. ValueError for one that is not there."""
    pairs = {cells[1].strip(): cells[0] for _, cells in csv_body(path) if isinstance(cells, list) and len(cells) > 1}
    known = {name.lower(): name for name in pairs}
    for category in categories:
        near = difflib.get_close_matches(category.lower(), known, n=1)
        remedy = f"did you mean {known[near[0]]}?" if near else "take names as that file has them"
        require(category.lower() in known, "--categories", category, f"is no class of {path}: {remedy}")
    return {pairs[known[category.lower()]]: category.lower() for category in categories}


def _by_hash(entries: Iterable[Entry], order: Order, left_out: LeftOut) -> Iterator[Entry]:
    """Pass on what is usable in an order of its own: by a hash of seed and name."""
    in_order = sorted(entries, key=lambda entry: digest(f"{order.seed}/{entry.name}"))
    return _usable(in_order, order.folder, left_out)


def choose(entries: Iterable[Entry], categories: Sequence[str], num: int) -> list[Entry]:
    """Choose `num` of the images, the first ones, but about as many of each category: an image counts for the one that
    it has of which there are fewest so far, and is put off where that one has its part.
    """
    counts, chosen, put_off = dict.fromkeys(categories, 0), list[Entry](), list[Entry]()
    for entry in entries:
        kind = min((thing.kind for thing in entry.things), key=lambda kind: (counts[kind], kind))
        if counts[kind] >= math.ceil(num / len(categories)):
            put_off.append(entry)
            continue
        counts[kind] += 1
        chosen.append(entry)
        if len(chosen) == num:
            break
    return [*chosen, *put_off][:num]
