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

from mteditflow.types import Region

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
}
TEXT_ADD = ("Add the text '{value}' to the image", "Write '{value}' on the image")
TEXT_REPLACE = ("Replace the text '{old}' with '{value}'", "Change the text '{old}' to '{value}'")
EDIT_TYPES = (*TEMPLATES, "text_change")


@dataclass(frozen=True, kw_only=True)
class Thing:
    """All objects of one kind in an image. `kind` names what they were in the source or were made as, and is theirs
    alone in a session; `name` is what they are called now.
    """

    kind: str
    count: int = 1
    color: str = ""
    material: str = ""
    boxes: tuple[tuple[float, float, float, float], ...] = ()  # of the source; shares of width and height
    is_foreground: bool = True
    is_new: bool = False

    @property
    def name(self) -> str:
        """Such as 'red wood chair'."""
        return " ".join(word for word in (self.color, self.material, self.kind) if word)

    @property
    def plural(self) -> str:
        """The name of several."""
        return self.name.removesuffix(self.kind) + plural(self.kind)

    @property
    def called(self) -> str:
        """The name in a sentence: 'the dog', 'the 3 dogs'."""
        return f"the {self.name}" if self.count == 1 else f"the {self.count} {self.plural}"


@dataclass(frozen=True, kw_only=True)
class Step:
    """A turn: its instruction, the kinds that it touches, and the pool after it."""

    edit_type: str
    instruction: str
    touched: tuple[str, ...]
    pool: dict[str, Thing]
    text: str  # that is written on the image; '' for none


def plural(kind: str) -> str:
    """English plural of a noun, its last word where the noun has no 'of'."""
    head, of, tail = kind.partition(" of ")
    if head in IRREGULAR:
        return IRREGULAR[head] + of + tail
    before, space, word = head.rpartition(" ")
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
    """'a dog', 'an owl'."""
    return f"{'an' if noun[0] in 'aeiou' and not noun.startswith('uni') else 'a'} {noun}"


def generate(things: Sequence[Thing], num_turns: int, random: Random) -> list[Step]:
    """The K steps of a session on an image with these things."""
    seen = {thing.kind for thing in things}  # whatever was ever in the image is not added as something new
    pool, text, steps = {thing.kind: thing for thing in things}, "", []
    unused = list(EDIT_TYPES)
    for _ in range(num_turns):
        may_be = [name for name in unused if is_feasible(name, pool, seen, steps)]
        if not may_be:
            unused = list(EDIT_TYPES)
            may_be = [name for name in unused if is_feasible(name, pool, seen, steps)]
        edit_type = random.choice(may_be)
        unused.remove(edit_type)
        step = MAKERS[edit_type](pool, text, seen, random)
        pool, text = step.pool, step.text
        seen |= set(pool)
        steps.append(step)
    return steps


def untouched(things: Sequence[Thing], steps: Sequence[Step]) -> list[list[Region]]:
    """For each step the objects of the source that no step so far touches and that are in its pool."""
    turns, touched = [], set[str]()
    for step in steps:
        touched |= set(step.touched)
        kept = [thing for thing in things if thing.kind not in touched and thing.kind in step.pool]
        turns.append([Region(name=thing.kind, box=box) for thing in kept for box in thing.boxes or (None,)])
    return turns


def is_feasible(edit_type: str, pool: dict[str, Thing], seen: set[str], steps: Sequence[Step]) -> bool:
    """Whether an edit of this type can be asked for; text_change always can."""
    has_new = not seen.issuperset(NEW_OBJECTS)
    has_old = any(not thing.is_new for thing in pool.values())
    match edit_type:
        case "text_change":
            return True
        case "subject_add":
            return has_new
        case "subject_remove":
            return has_old
        case "subject_replace":
            return has_old and has_new
        case "background_change":
            is_first = all(step.edit_type != edit_type for step in steps)
            return is_first and any(thing.is_foreground for thing in pool.values())
        case "position_change":
            return bool(_moves(pool))
        case _:
            return bool(pool)


def _draw(names: Sequence[str], without: set[str], random: Random) -> str:
    return random.choice([name for name in names if name not in without])


def _say(edit_type: str, random: Random, **words: str) -> str:
    return random.choice(TEMPLATES[edit_type]).format(**words)


def _add(pool: dict[str, Thing], text: str, seen: set[str], random: Random) -> Step:
    kind = _draw(NEW_OBJECTS, seen, random)
    singles = [thing for thing in pool.values() if thing.count == 1]
    place = f"{random.choice(POSITIONS)} {random.choice(singles).called}" if singles else "in the image"
    after = {**pool, kind: Thing(kind=kind, is_new=True)}
    said = _say("subject_add", random, new=with_article(kind), place=place)
    return Step(edit_type="subject_add", instruction=said, touched=(), pool=after, text=text)


def _remove(pool: dict[str, Thing], text: str, _seen: set[str], random: Random) -> Step:
    old = random.choice([thing for thing in pool.values() if not thing.is_new])
    after = {kind: thing for kind, thing in pool.items() if kind != old.kind}
    said = _say("subject_remove", random, old=old.called)
    return Step(edit_type="subject_remove", instruction=said, touched=(old.kind,), pool=after, text=text)


def _replace(pool: dict[str, Thing], text: str, seen: set[str], random: Random) -> Step:
    old = random.choice([thing for thing in pool.values() if not thing.is_new])
    kind = _draw(NEW_OBJECTS, seen, random)
    new = Thing(kind=kind, count=old.count, is_new=True)
    after = {it: thing for it, thing in pool.items() if it != old.kind} | {kind: new}
    words = with_article(kind) if old.count == 1 else f"{old.count} {plural(kind)}"
    said = _say("subject_replace", random, old=old.called, new=words)
    return Step(edit_type="subject_replace", instruction=said, touched=(old.kind,), pool=after, text=text)


def _color(pool: dict[str, Thing], text: str, _seen: set[str], random: Random) -> Step:
    old = random.choice(list(pool.values()))
    value = _draw(COLORS, {old.color, *old.kind.split()}, random)
    said = _say("color_alter", random, old=old.called, value=value)
    after = {**pool, old.kind: replace(old, color=value)}
    return Step(edit_type="color_alter", instruction=said, touched=(old.kind,), pool=after, text=text)


def _material(pool: dict[str, Thing], text: str, _seen: set[str], random: Random) -> Step:
    old = random.choice(list(pool.values()))
    value = _draw(MATERIALS, {old.material}, random)
    said = _say("material_alter", random, old=old.called, value=value)
    after = {**pool, old.kind: replace(old, material=value)}
    return Step(edit_type="material_alter", instruction=said, touched=(old.kind,), pool=after, text=text)


def _text(pool: dict[str, Thing], text: str, _seen: set[str], random: Random) -> Step:
    value = _draw(TEXTS, {text}, random)
    said = random.choice(TEXT_REPLACE if text else TEXT_ADD).format(old=text, value=value)
    return Step(edit_type="text_change", instruction=said, touched=(), pool=pool, text=value)


def _moves(pool: dict[str, Thing]) -> list[tuple[Thing, str, Thing]]:
    """What can be moved where: single things, to a side of another where they are not already."""
    singles = [thing for thing in pool.values() if thing.count == 1]
    pairs = [(old, at) for old in singles for at in singles if old.kind != at.kind]
    return [(old, place, at) for old, at in pairs for place in POSITIONS if not _is_there(old, place, at)]


def _is_there(old: Thing, place: str, at: Thing) -> bool:
    """Whether the boxes, where both are known, say that `old` is at that side of `at` already, by their centres."""
    if not old.boxes or not at.boxes:
        return False
    axis = 0 if place in POSITIONS[:2] else 1
    here, there = (box[axis] + box[axis + 2] for box in (old.boxes[0], at.boxes[0]))
    return here < there if place in (POSITIONS[0], POSITIONS[2]) else here > there


def _position(pool: dict[str, Thing], text: str, _seen: set[str], random: Random) -> Step:
    old, place, at = random.choice(_moves(pool))
    said = _say("position_change", random, old=old.called, place=f"{place} {at.called}")
    after = {**pool, old.kind: replace(old, boxes=())}  # where it is now is not known
    touched = (old.kind, at.kind)
    return Step(edit_type="position_change", instruction=said, touched=touched, pool=after, text=text)


def _count(pool: dict[str, Thing], text: str, _seen: set[str], random: Random) -> Step:
    old = random.choice(list(pool.values()))
    count = random.choice([n for n in range(1, MAX_COUNT + 1) if n != old.count])
    counted = old.name if count == 1 else old.plural
    said = _say("count_change", random, plural=old.plural, counted=counted, value=str(count))
    after = {**pool, old.kind: replace(old, count=count, boxes=())}
    return Step(edit_type="count_change", instruction=said, touched=(old.kind,), pool=after, text=text)


def _background(pool: dict[str, Thing], text: str, _seen: set[str], random: Random) -> Step:
    after = {kind: thing for kind, thing in pool.items() if thing.is_foreground}
    names = [thing.called for thing in after.values()]
    kept = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
    said = _say("background_change", random, value=random.choice(BACKGROUNDS), kept=kept)
    return Step(edit_type="background_change", instruction=said, touched=(), pool=after, text=text)


MAKERS: dict[str, Callable[[dict[str, Thing], str, set[str], Random], Step]] = {
    "subject_add": _add, "subject_remove": _remove, "subject_replace": _replace, "color_alter": _color,
    "material_alter": _material, "position_change": _position, "count_change": _count, "background_change": _background,
    "text_change": _text,
}  # fmt: skip
