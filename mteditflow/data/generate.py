"""K-turn sessions from the objects of an image, after EdiVal-Agent (arXiv 2509.13399, section 3) and its public code.

A pool holds the objects that are in the image after the turns so far. Each turn draws an edit type that the session has
not had, an object of the pool, and what becomes of it, and then updates the pool; after a change of background only
foreground objects are left in it. Untouched are the objects of the source that no instruction so far names as its
target (or as the place that something is moved to) and that are still in the pool.

Departures: no language model writes the instructions, they are templates; an edit type that cannot be done is not drawn
at all (there: it becomes subject_add); background_change comes at most once; what a session has created it neither
removes nor replaces, since a model whose creation failed would then pass for nothing; only what there is exactly one of
is a place to put things; and nothing is moved to where its box already is. What is part of the place (sky, grass) is
neither counted, moved nor taken away; people are neither painted nor made of wood.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
OPPOSITE: dict[str, str] = dict(zip(POSITIONS, ("to the right of", "to the left of", "below", "above"), strict=True))
MAX_COUNT = 5
# last words of what is part of a place: it is not counted, moved, taken away, nor made of something else
SCENERY = (
    *("sky", "sea", "ocean", "water", "river", "lake", "grass", "sand", "snow", "road", "street", "pavement", "floor"),
    *("ground", "ceiling", "wall", "fog", "mud", "dirt", "gravel", "clouds", "mountain", "hill", "field", "stairs"),
)
MASS = (  # last words of what is not counted
    *("broccoli", "hair", "food", "clothing", "clothes", "furniture", "jewelry", "fruit", "vegetable", "bread"),
    *("cheese", "rice", "pasta", "meat", "seafood", "luggage", "footwear", "leaves"),
)
PAIRS = ("scissors", "skis", "glasses", "sunglasses", "goggles", "jeans", "trousers", "shorts", "headphones", "pliers")
PEOPLE = ("person", "man", "woman", "boy", "girl", "child", "baby", "human", "bride", "groom", "player", "rider")
ENDINGS = {  # of nouns whose plural is their own; the first that fits
    "human": "humans", "mongoose": "mongooses", "man": "men", "person": "people", "child": "children",
    "mouse": "mice", "goose": "geese", "tooth": "teeth", "foot": "feet", "sheep": "sheep", "fish": "fish",
    "deer": "deer", "aircraft": "aircraft", "knife": "knives", "wolf": "wolves", "shelf": "shelves",
    "scarf": "scarves", "calf": "calves", "loaf": "loaves", "leaf": "leaves", "tomato": "tomatoes",
    "potato": "potatoes",
}  # fmt: skip
TEMPLATES: dict[str, tuple[str, ...]] = {
    "subject_add": ("Add {new} {place}", "Put {new} {place}", "Place {new} {place}"),
    "subject_remove": ("Remove {old}", "Erase {old} from the image", "Take {old} out of the image"),
    "subject_replace": ("Replace {old} with {new}", "Swap {old} for {new}", "Turn {old} into {new}"),
    "color_alter": ("Change the color of {old} to {value}", "Make {old} {value}", "Paint {old} {value}"),
    "material_alter": ("Change the material of {old} to {value}", "Make {old} look as if made of {value}"),
    "position_change": ("Move {old} {place}", "Put {old} {place}"),
    "count_change": ("Change the number of {plural} to {value}", "Show {value} {plural} in all"),
    "background_change": (
        "Change the background to {value}, keep {kept} unchanged",
        "Replace the background with {value} and leave {kept} as before",
    ),
    "text_change": ("Replace the text '{old}' with '{value}'", "Change the text '{old}' to '{value}'"),
}
SHARES = dict.fromkeys(TEMPLATES, 1.0) | {"position_change": 1.5}  # which can be asked for least often
TO_ONE = ("Change the number of {plural} to 1", "Show only one {name}", "Leave only one {name}")
FIRST_TEXT = ("Add the text '{value}' to the image", "Write '{value}' on the image")  # where there is none to change
SOMEWHERE = ("Add {new} to the image", "Put {new} somewhere in the image")  # where there is nothing to put it next to


@dataclass(frozen=True, kw_only=True)
class Words:
    """What sessions are made of: lists that a user may replace, and the edit types with their relative shares."""

    new_objects: tuple[str, ...] = NEW_OBJECTS
    colors: tuple[str, ...] = COLORS
    materials: tuple[str, ...] = MATERIALS
    backgrounds: tuple[str, ...] = BACKGROUNDS
    texts: tuple[str, ...] = TEXTS
    shares: Mapping[str, float] = field(default_factory=lambda: dict(SHARES))


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
    beside: tuple[str, str] = ("", "")  # where an edit has put them: to which side, of what kind

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
        """Name them in a sentence: 'the dog', 'the 3 dogs', 'the sky'."""
        return f"the {self.name}" if self.count == 1 or not self.is_countable else f"the {self.count} {self.plural}"

    @property
    def is_scenery(self) -> bool:
        """Whether they are part of the place."""
        return not self.is_foreground or last_word(self.kind) in SCENERY

    @property
    def is_countable(self) -> bool:
        """Whether there can be one or five of them."""
        return not self.is_scenery and last_word(self.kind) not in MASS

    @property
    def is_person(self) -> bool:
        """Whether they are people, who are not painted nor made of wood."""
        return last_word(self.kind) in PEOPLE


Pool = dict[str, Thing]
"""What is in an image, by kind."""
Edit = tuple[Sequence[str], dict[str, str], tuple[str, ...], Pool]
"""The forms of an instruction and their words, the kinds that it touches, and the pool after it."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """A turn: its instruction, the kinds that it touches, and the pool after it."""

    edit_type: str
    instruction: str
    touched: tuple[str, ...]
    pool: Pool
    text: str  # that is written on the image; '' for none


def last_word(kind: str) -> str:
    """Take the word of a noun that is counted: 'vase' of 'glass vase of flowers'."""
    return kind.partition(" of ")[0].rpartition(" ")[2].lower()


def plural(kind: str) -> str:
    """Form the English plural of a noun, of its last word where the noun has no 'of'."""
    head, of, tail = kind.partition(" of ")
    before, space, word = head.rpartition(" ")
    ending = next((it for it in ENDINGS if word.lower().endswith(it)), "")
    if word in PAIRS:
        word = f"pairs of {word}"
    elif ending:
        word = word[: len(word) - len(ending)] + ENDINGS[ending]
    elif word.endswith(("s", "x", "z", "ch", "sh")):
        word += "es"
    elif word.endswith("y") and word[-2:-1] not in "aeiou":
        word = word[:-1] + "ies"
    else:
        word += "s"
    return before + space + word + of + tail


def with_article(noun: str) -> str:
    """Put the article before a noun: 'a dog', 'an owl', 'a pair of skis'; none where it is not counted."""
    if last_word(noun) in MASS:
        return noun
    if last_word(noun) in PAIRS:
        return f"a pair of {noun}"
    word = noun.lower()
    is_vowel = word[0] in "aeiou" and not word.startswith(("uni", "use", "eu", "one", "ukulele"))
    return f"{'an' if is_vowel or word.startswith(('hour', 'honest', 'heir')) else 'a'} {noun}"


def generate(things: Sequence[Thing], num_turns: int, random: Random, words: Words | None = None) -> list[Step]:
    """Draw the K steps of a session on an image with these things; fewer where none of the edit types can be asked for
    any more.
    """
    pool, text, words = {thing.kind: thing for thing in things}, "", words or Words()
    types = [name for name, share in words.shares.items() if share > 0]
    steps, unused, seen = list[Step](), list(types), set(pool)
    for _ in range(num_turns):
        fresh = [kind for kind in words.new_objects if kind not in seen]  # what never was in the image
        possible = [name for name in types if is_feasible(name, pool, fresh, steps)]
        if not possible:
            break
        if not set(possible) & set(unused):
            unused = list(types)
        chosen = [name for name in unused if name in possible]
        edit_type = random.choices(chosen, [words.shares[name] for name in chosen])[0]
        unused.remove(edit_type)
        steps.append(make_step(edit_type, pool, text, replace(words, new_objects=tuple(fresh)), random))
        pool, text = steps[-1].pool, steps[-1].text
        seen |= set(pool)
    return steps


def make_step(edit_type: str, pool: Pool, text: str, words: Words, random: Random) -> Step:
    """Draw a feasible edit of this type, and its instruction. words: with objects that were never in the image."""
    if edit_type == "text_change":
        value = random.choice([other for other in words.texts if other != text])
        forms, named, touched = TEMPLATES[edit_type] if text else FIRST_TEXT, {"old": text, "value": value}, ()
        text = value
    else:
        forms, named, touched, pool = EDITS[edit_type](pool, words, random)
    instruction = random.choice(forms).format(**named)
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
            return bool(_removable(pool))
        case "subject_replace":
            return bool(_removable(pool) and fresh)
        case "background_change":
            is_first = all(step.edit_type != edit_type for step in steps)
            return is_first and any(thing.is_foreground for thing in pool.values())
        case "position_change":
            return bool(_moves(pool))
        case "color_alter":
            return bool(_colorable(pool))
        case "material_alter":
            return bool(_mouldable(pool))
        case _:
            return bool(_countable(pool))


def _removable(pool: Pool) -> list[Thing]:
    return [thing for thing in pool.values() if not thing.is_new and not thing.is_scenery]


def _countable(pool: Pool) -> list[Thing]:
    return [thing for thing in pool.values() if thing.is_countable]


def _singles(pool: Pool) -> list[Thing]:
    return [thing for thing in _countable(pool) if thing.count == 1]


def _colorable(pool: Pool) -> list[Thing]:
    return [thing for thing in pool.values() if not thing.is_person]


def _mouldable(pool: Pool) -> list[Thing]:
    return [thing for thing in _colorable(pool) if not thing.is_scenery]


def _add(pool: Pool, words: Words, random: Random) -> Edit:
    kind, singles = random.choice(words.new_objects), _singles(pool)
    if not singles:
        return SOMEWHERE, {"new": with_article(kind)}, (), {**pool, kind: Thing(kind=kind, is_new=True)}
    place, at = random.choice(POSITIONS), random.choice(singles)
    after = {**pool, kind: Thing(kind=kind, is_new=True, beside=(place, at.kind))}
    return TEMPLATES["subject_add"], {"new": with_article(kind), "place": f"{place} {at.called}"}, (), after


def _remove(pool: Pool, _words: Words, random: Random) -> Edit:
    old = random.choice(_removable(pool))
    after = {kind: thing for kind, thing in pool.items() if kind != old.kind}
    return TEMPLATES["subject_remove"], {"old": old.called}, (old.kind,), after


def _replace(pool: Pool, words: Words, random: Random) -> Edit:
    _, named, touched, after = _remove(pool, words, random)
    old, new = pool[touched[0]], Thing(kind=random.choice(words.new_objects), is_new=True)
    if old.is_countable and new.is_countable:
        new = replace(new, count=old.count)
    named["new"] = with_article(new.kind) if new.count == 1 else f"{new.count} {new.plural}"
    return TEMPLATES["subject_replace"], named, touched, {**after, new.kind: new}


def _values(values: Sequence[str], now: str, kind: str) -> list[str]:
    """List the values, of at least two, that differ from what the things have now, and where there are others from what
    their kind says: a wooden bench is of wood.
    """
    others = [value for value in values if value != now]
    return [value for value in others if not any(it.startswith(value) for it in kind.split())] or others


def _color(pool: Pool, words: Words, random: Random) -> Edit:
    old = random.choice(_colorable(pool))
    value = random.choice(_values(words.colors, old.color, old.kind))
    after = {**pool, old.kind: replace(old, color=value)}
    return TEMPLATES["color_alter"], {"old": old.called, "value": value}, (old.kind,), after


def _material(pool: Pool, words: Words, random: Random) -> Edit:
    old = random.choice(_mouldable(pool))
    value = random.choice(_values(words.materials, old.material, old.kind))
    after = {**pool, old.kind: replace(old, material=value)}
    return TEMPLATES["material_alter"], {"old": old.called, "value": value}, (old.kind,), after


def _moves(pool: Pool) -> list[tuple[Thing, str, Thing]]:
    """List what can be moved where: single things, to a side of another where they are not already."""
    pairs = [(old, at) for old in _singles(pool) for at in _singles(pool) if old.kind != at.kind]
    return [(old, place, at) for old, at in pairs for place in POSITIONS if not _is_there(old, place, at)]


def _is_there(old: Thing, place: str, at: Thing) -> bool:
    """Say whether `old` is at that side of `at` already, by an edit, or by the centres of the boxes, where both are
    known: to ask for what is there is to ask for nothing.
    """
    if old.beside == (place, at.kind) or at.beside == (OPPOSITE[place], old.kind):
        return True
    if not old.boxes or not at.boxes:
        return False
    axis = 0 if place in POSITIONS[:2] else 1
    here, there = (box[axis] + box[axis + 2] for box in (old.boxes[0], at.boxes[0]))
    return here < there if place in (POSITIONS[0], POSITIONS[2]) else here > there


def _position(pool: Pool, _words: Words, random: Random) -> Edit:
    old, place, at = random.choice(_moves(pool))
    after = {**pool, old.kind: replace(old, boxes=(), beside=(place, at.kind))}
    named = {"old": old.called, "place": f"{place} {at.called}"}
    return TEMPLATES["position_change"], named, (old.kind, at.kind), after


def _count(pool: Pool, _words: Words, random: Random) -> Edit:
    old = random.choice(_countable(pool))
    count = random.choice([number for number in range(1, MAX_COUNT + 1) if number != old.count])
    after = {**pool, old.kind: replace(old, count=count, boxes=())}
    named = {"name": old.name, "plural": old.plural, "value": str(count)}
    return TO_ONE if count == 1 else TEMPLATES["count_change"], named, (old.kind,), after


def _background(pool: Pool, words: Words, random: Random) -> Edit:
    after = {kind: thing for kind, thing in pool.items() if thing.is_foreground}
    *names, last = (thing.called for thing in after.values())
    kept = f"{', '.join(names)} and {last}" if names else last
    named = {"value": with_article(random.choice(words.backgrounds)), "kept": kept}
    return TEMPLATES["background_change"], named, (), after


EDITS: dict[str, Callable[[Pool, Words, Random], Edit]] = {
    "subject_add": _add, "subject_remove": _remove, "subject_replace": _replace, "color_alter": _color,
    "material_alter": _material, "position_change": _position, "count_change": _count, "background_change": _background,
}  # fmt: skip
