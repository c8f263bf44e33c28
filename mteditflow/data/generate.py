"""K-turn sessions from the objects of an image, after EdiVal-Agent (arXiv 2509.13399, section 3) and its public code.

A pool holds the objects that are in the image after the turns so far. Each turn draws an edit type that the session has
not had, an object of the pool, and what becomes of it, and then updates the pool; after a change of background only
foreground objects are left in it. Untouched are the objects of the source that no instruction so far names as its
target (or as the place that something is moved to) and that are still in the pool.

Departures: no language model writes the instructions, they are templates; an edit type that cannot be done is not drawn
at all (there: it becomes subject_add); background_change comes at most once; what a session has created it neither
removes nor replaces, since a model whose creation failed would then pass for nothing; only what there is exactly one of
is a place to put things; and nothing is moved to where its box already is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random

from mteditflow.types import Box, Region

NEW_OBJECTS = (
    *("wooden bench", "potted plant", "red balloon", "straw hat", "paper lantern", "street lamp", "garden gnome"),
    *("fire hydrant", "bicycle", "cat", "dog", "rabbit", "owl", "pumpkin", "suitcase", "umbrella", "guitar"),
    *("teddy bear", "picnic basket", "watering can", "vase of flowers", "stack of books", "rubber duck", "telescope"),
)
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
MATERIALS = ("wood", "glass", "marble", "copper", "knitted wool", "paper", "leather", "ice", "clay", "gold")
BACKGROUNDS = (
    *("sandy beach", "snowy mountain", "pine forest", "city street at night", "desert", "meadow of flowers"),
    *("library", "harbour", "stone castle", "train station", "vineyard", "autumn park"),
)
TEXTS = ("HELLO", "OPEN", "SALE", "WELCOME", "SUMMER", "NORTH", "2026", "THANK YOU", "EXIT", "COFFEE")
POSITIONS = ("to the left of", "to the right of", "above", "below")
MAX_COUNT = 5
IRREGULAR = {
    "person": "people", "man": "men", "woman": "women", "child": "children", "mouse": "mice", "sheep": "sheep",
    "knife": "knives", "skis": "skis", "scissors": "scissors", "fish": "fish", "leaf": "leaves", "deer": "deer",
    "broccoli": "broccoli", "wine glass": "wine glasses",
}  # fmt: skip
TEMPLATES: dict[str, tuple[str, ...]] = {
    "subject_add": ("Add {new} {place}", "Put {new} {place}", "Place {new} {place}"),
    "subject_remove": ("Remove {old}", "Erase {old} from the image", "Take {old} out of the image"),
    "subject_replace": ("Replace {old} with {new}", "Swap {old} for {new}", "Turn {old} into {new}"),
    "color_alter": ("Change the color of {old} to {value}", "Make {old} {value}", "Paint {old} {value}"),
    "material_alter": ("Change the material of {old} to {value}", "Make {old} look as if made of {value}"),
    "position_change": ("Move {old} {place}", "Change the position of {old} to {place}"),
    "count_change": ("Change the number of {plural} to {value}", "Show {value} {counted} in all"),
    "background_change": (
        "Change the background to a {value}, keep {kept} unchanged",
        "Set the scene in a {value} and leave {kept} as before",
    ),
    "text_change": ("Replace the text '{old}' with '{value}'", "Change the text '{old}' to '{value}'"),
}
FIRST_TEXT = ("Add the text '{value}' to the image", "Write '{value}' on the image")  # where there is none to change


@dataclass(frozen=True, kw_only=True)
class Thing:
    """All objects of one kind in an image. `kind` names what they were in the source or were made as, and is theirs
    alone in a session; `name` is what they are called now.
    """

    kind: str
    count: int = 1
    color: str = ""
    material: str = ""
    boxes: tuple[Box, ...] = ()  # of the source
    is_foreground: bool = True
    is_new: bool = False

    @property
    def name(self) -> str:
        """Name one of them, as in 'red wood chair'."""
        return " ".join(word for word in (self.color, self.material, self.kind) if word)

    @property
    def plural(self) -> str:
        """Name several of them."""
        return self.name.removesuffix(self.kind) + plural(self.kind)

    @property
    def called(self) -> str:
        """Name them in a sentence: 'the dog', 'the 3 dogs'."""
        return f"the {self.name}" if self.count == 1 else f"the {self.count} {self.plural}"


Pool = dict[str, Thing]
"""What is in an image, by kind."""
Edit = tuple[dict[str, str], tuple[str, ...], Pool]
"""The words of an instruction, the kinds that it touches, and the pool after it."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """A turn: its instruction, the kinds that it touches, and the pool after it."""

    edit_type: str
    instruction: str
    touched: tuple[str, ...]
    pool: Pool
    text: str  # that is written on the image; '' for none


def plural(kind: str) -> str:
    """Form the English plural of a noun, of its last word where the noun has no 'of'."""
    head, of, tail = kind.partition(" of ")
    before, space, word = ("", "", head) if head in IRREGULAR else head.rpartition(" ")
    if word in IRREGULAR:
        word = IRREGULAR[word]
    elif word.endswith(("s", "x", "z", "ch", "sh")):
        word += "es"
    elif word.endswith("y") and word[-2:-1] not in "aeiou":
        word = word[:-1] + "ies"
    else:
        word += "s"
    return before + space + word + of + tail


def with_article(noun: str) -> str:
    """Put the article before a noun: 'a dog', 'an owl'."""
    return f"{'an' if noun[0] in 'aeiou' and not noun.startswith('uni') else 'a'} {noun}"


def generate(things: Sequence[Thing], num_turns: int, random: Random) -> list[Step]:
    """Draw the K steps of a session on an image with these things."""
    pool, text = {thing.kind: thing for thing in things}, ""
    steps, unused, seen = list[Step](), list(TEMPLATES), set(pool)
    for _ in range(num_turns):
        fresh = [kind for kind in NEW_OBJECTS if kind not in seen]  # what never was in the image
        if not any(is_feasible(edit_type, pool, fresh, steps) for edit_type in unused):
            unused = list(TEMPLATES)
        edit_type = random.choice([name for name in unused if is_feasible(name, pool, fresh, steps)])
        unused.remove(edit_type)
        steps.append(make_step(edit_type, pool, text, fresh, random))
        pool, text = steps[-1].pool, steps[-1].text
        seen |= set(pool)
    return steps


def make_step(edit_type: str, pool: Pool, text: str, fresh: Sequence[str], random: Random) -> Step:
    """Draw a feasible edit of this type, and its instruction."""
    forms = TEMPLATES[edit_type]
    if edit_type == "text_change":
        words, touched = {"old": text, "value": random.choice([other for other in TEXTS if other != text])}, ()
        forms, text = forms if text else FIRST_TEXT, words["value"]
    else:
        words, touched, pool = EDITS[edit_type](pool, fresh, random)
    instruction = random.choice(forms).format(**words)
    return Step(edit_type=edit_type, instruction=instruction, touched=touched, pool=pool, text=text)


def untouched_regions(things: Sequence[Thing], steps: Sequence[Step]) -> list[list[Region]]:
    """List for each step the objects of the source that no step so far touches and that are in its pool."""
    turns, touched = [], set[str]()
    for step in steps:
        touched |= set(step.touched)
        kept = [thing for thing in things if thing.kind not in touched and thing.kind in step.pool]
        turns.append([Region(name=thing.kind, box=box) for thing in kept for box in thing.boxes or (None,)])
    return turns


def is_feasible(edit_type: str, pool: Pool, fresh: Sequence[str], steps: Sequence[Step]) -> bool:
    """Say whether an edit of this type can be asked for after the steps; text_change always can."""
    match edit_type:
        case "text_change":
            return True
        case "subject_add":
            return bool(fresh)
        case "subject_remove":
            return bool(_from_source(pool))
        case "subject_replace":
            return bool(_from_source(pool) and fresh)
        case "background_change":
            is_first = all(step.edit_type != edit_type for step in steps)
            return is_first and any(thing.is_foreground for thing in pool.values())
        case "position_change":
            return bool(_moves(pool))
        case _:
            return bool(pool)


def _from_source(pool: Pool) -> list[Thing]:
    return [thing for thing in pool.values() if not thing.is_new]


def _singles(pool: Pool) -> list[Thing]:
    return [thing for thing in pool.values() if thing.count == 1]


def _add(pool: Pool, fresh: Sequence[str], random: Random) -> Edit:
    kind, singles = random.choice(fresh), _singles(pool)
    place = f"{random.choice(POSITIONS)} {random.choice(singles).called}" if singles else "in the image"
    return {"new": with_article(kind), "place": place}, (), {**pool, kind: Thing(kind=kind, is_new=True)}


def _remove(pool: Pool, _fresh: Sequence[str], random: Random) -> Edit:
    old = random.choice(_from_source(pool))
    return {"old": old.called}, (old.kind,), {kind: thing for kind, thing in pool.items() if kind != old.kind}


def _replace(pool: Pool, fresh: Sequence[str], random: Random) -> Edit:
    words, touched, after = _remove(pool, fresh, random)
    kind, count = random.choice(fresh), pool[touched[0]].count
    words["new"] = with_article(kind) if count == 1 else f"{count} {plural(kind)}"
    return words, touched, {**after, kind: Thing(kind=kind, count=count, is_new=True)}


def _color(pool: Pool, _fresh: Sequence[str], random: Random) -> Edit:
    old = random.choice(list(pool.values()))
    value = random.choice([color for color in COLORS if color not in (old.color, *old.kind.split())])
    return {"old": old.called, "value": value}, (old.kind,), {**pool, old.kind: replace(old, color=value)}


def _material(pool: Pool, _fresh: Sequence[str], random: Random) -> Edit:
    old = random.choice(list(pool.values()))
    value = random.choice([material for material in MATERIALS if material != old.material])
    return {"old": old.called, "value": value}, (old.kind,), {**pool, old.kind: replace(old, material=value)}


def _moves(pool: Pool) -> list[tuple[Thing, str, Thing]]:
    """List what can be moved where: single things, to a side of another where they are not already."""
    pairs = [(old, at) for old in _singles(pool) for at in _singles(pool) if old.kind != at.kind]
    return [(old, place, at) for old, at in pairs for place in POSITIONS if not _is_there(old, place, at)]


def _is_there(old: Thing, place: str, at: Thing) -> bool:
    """Say whether the boxes, where both are known, put `old` at that side of `at` already, by their centres."""
    if not old.boxes or not at.boxes:
        return False
    axis = 0 if place in POSITIONS[:2] else 1
    here, there = (box[axis] + box[axis + 2] for box in (old.boxes[0], at.boxes[0]))
    return here < there if place in (POSITIONS[0], POSITIONS[2]) else here > there


def _position(pool: Pool, _fresh: Sequence[str], random: Random) -> Edit:
    old, place, at = random.choice(_moves(pool))
    after = {**pool, old.kind: replace(old, boxes=())}  # where it is now is not known
    return {"old": old.called, "place": f"{place} {at.called}"}, (old.kind, at.kind), after


def _count(pool: Pool, _fresh: Sequence[str], random: Random) -> Edit:
    old = random.choice(list(pool.values()))
    count = random.choice([number for number in range(1, MAX_COUNT + 1) if number != old.count])
    words = {"plural": old.plural, "counted": old.name if count == 1 else old.plural, "value": str(count)}
    return words, (old.kind,), {**pool, old.kind: replace(old, count=count, boxes=())}


def _background(pool: Pool, _fresh: Sequence[str], random: Random) -> Edit:
    after = {kind: thing for kind, thing in pool.items() if thing.is_foreground}
    *names, last = (thing.called for thing in after.values())
    kept = f"{', '.join(names)} and {last}" if names else last
    return {"value": random.choice(BACKGROUNDS), "kept": kept}, (), after


EDITS: dict[str, Callable[[Pool, Sequence[str], Random], Edit]] = {
    "subject_add": _add, "subject_remove": _remove, "subject_replace": _replace, "color_alter": _color,
    "material_alter": _material, "position_change": _position, "count_change": _count, "background_change": _background,
}  # fmt: skip
