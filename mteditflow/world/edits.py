"""Edits and sessions: EdiVal's nine edit types, each in several paraphrases, chained into sessions of K turns.

A session follows EdiVal's rules: every edit is feasible in the scene that the edits before it ought to have made, and
no type comes twice where that is possible. One rule is ours: what a session has created it does not remove, since a
model whose creation failed would then pass the removal for nothing.
"""

import zlib
from dataclasses import dataclass, replace
from random import Random

from mteditflow.world.scenes import ATTRIBUTES, BACKGROUNDS, KINDS, PLACES, Item, Scene, sample_item, sample_scene

PARAPHRASES: dict[str, tuple[str, ...]] = {
    "subject_add": (
        "add {new} at the {place}", "put {new} in the {place}", "place {new} at the {place}",
        "draw {new} in the {place}",
    ),
    "subject_remove": ("remove the {old}", "delete the {old}", "take the {old} away", "erase the {old} from the image"),
    "subject_replace": (
        "replace the {old} with {new}", "swap the {old} for {new}", "turn the {old} into {new}",
        "exchange the {old} for {new}",
    ),
    "color_alter": (
        "make the {old} {value}", "change the color of the {old} to {value}", "paint the {old} {value}",
        "give the {old} a {value} color",
    ),
    "material_alter": (
        "make the {old} look {value}", "change the material of the {old} to {value}",
        "give the {old} a {value} texture", "let the {old} be {value}",
    ),
    "text_change": (
        "change the text on the sign to {value}", "make the sign say {value}", "write {value} on the sign",
        "let the sign read {value}",
    ),
    "position_change": (
        "move the {old} to the {place}", "shift the {old} to the {place}", "bring the {old} to the {place} corner",
        "the {old} should be at the {place}",
    ),
    "count_change": (
        "change the number of {plural} to {value}", "show {value} {counted} instead", "make it {value} {counted}",
        "there should be {value} {counted}",
    ),
    "background_change": (
        "change the background to {value}", "use a {value} background", "set the scene in the {value}",
        "make the background a {value}",
    ),
}  # fmt: skip
EDIT_TYPES = tuple(PARAPHRASES)
ATTRIBUTE_OF = {"color_alter": "color", "material_alter": "material", "text_change": "text", "count_change": "count"}
NUMBERS = {1: "one", 2: "two", 3: "three"}
PLURALS = {kind: "boxes" if kind == "box" else "fish" if kind == "fish" else f"{kind}s" for kind in KINDS}


@dataclass(frozen=True, kw_only=True)
class Edit:
    """One instruction and what it means: the scene after it, the object's kind ('' for the background) and place."""

    edit_type: str
    instruction: str
    kind: str
    place: int
    after: Scene


@dataclass(frozen=True, kw_only=True)
class Session:
    """A source scene and the K edits that follow one another."""

    source: Scene
    edits: tuple[Edit, ...]

    def scenes(self) -> list[Scene]:
        """List the K+1 scenes of the session if every edit succeeds."""
        return [self.source, *(edit.after for edit in self.edits)]

    def untouched_places(self, turn: int) -> list[int]:
        """List the places of the source's objects that no edit up to and including `turn` (from 0) has touched."""
        scenes = self.scenes()[: turn + 2]
        return [p for p, item in enumerate(self.source.cells) if item and all(s.cells[p] == item for s in scenes)]


def describe(item: Item) -> str:
    """Name an object, as in 'an orange wooden fish'; plastic goes without saying."""
    words = [item.color, *([item.material] if item.material != "plastic" else []), item.kind]
    text = f" saying {item.text.lower()}" if item.text else ""
    return f"{'an' if item.color[0] in 'aeiou' else 'a'} {' '.join(words)}{text}"


def vocabulary() -> list[str]:
    """List every word an instruction can hold, sorted."""
    words = {w for forms in PARAPHRASES.values() for form in forms for w in form.split() if "{" not in w}
    words |= {*KINDS, *PLURALS.values(), *BACKGROUNDS, *NUMBERS.values(), "a", "an", "saying"}
    words |= {value.lower() for values in ATTRIBUTES.values() for value in values if isinstance(value, str)}
    return sorted(words | {w for place in PLACES for w in place.split()})


def _change(item: Item, edit_type: str, random: Random) -> tuple[Item, str]:
    """Draw another colour, material, text or count for an object, and the word for it."""
    name = ATTRIBUTE_OF[edit_type]
    value = random.choice([value for value in ATTRIBUTES[name] if value != getattr(item, name)])
    return replace(item, **{name: value}), value.lower() if isinstance(value, str) else NUMBERS[value]


def _candidates(scene: Scene, edit_type: str, created: frozenset[str]) -> list[tuple[int, Item]]:
    """List the places and objects that an edit of that type can be about; none where the edit is not feasible."""
    objects = [(place, item) for place, item in enumerate(scene.cells) if item]
    match edit_type:
        case "subject_add" | "position_change":
            return objects if len(objects) < len(PLACES) else []
        case "subject_remove":
            return [(p, item) for p, item in objects if item.kind not in created] if len(objects) > 1 else []
        case "text_change":
            return [(p, item) for p, item in objects if item.kind == "sign"]
        case "count_change":
            return [(p, item) for p, item in objects if item.kind != "sign"]
    return objects


def sample_edit(scene: Scene, edit_type: str, random: Random, created: frozenset[str] = frozenset()) -> Edit | None:
    """Draw an edit of that type; None where none is feasible. `created`: kinds that must not be removed."""
    objects = _candidates(scene, edit_type, created)
    if not objects:
        return None
    empty = [place for place, item in enumerate(scene.cells) if item is None]
    absent = [kind for kind in KINDS if scene.find(kind) is None]
    form = random.choice(PARAPHRASES[edit_type])

    def edit(kind: str, place: int, after: Scene, **words: str) -> Edit:
        plural = PLURALS.get(kind, "")
        counted = kind if words.get("value") == NUMBERS[1] else plural
        text = form.format(old=kind, plural=plural, counted=counted, place=PLACES[place], **words)
        return Edit(edit_type=edit_type, instruction=text, kind=kind, place=place, after=after)

    if edit_type == "background_change":
        name = random.choice([b for b in BACKGROUNDS if b != scene.background])
        return edit("", 0, replace(scene, background=name), value=name)
    if edit_type == "subject_add":
        new, place = replace(sample_item(random, absent), count=1), random.choice(empty)
        return edit(new.kind, place, scene.with_cell(place, new), new=describe(new))
    place, item = random.choice(objects)
    match edit_type:
        case "subject_remove":
            return edit(item.kind, place, scene.with_cell(place, None))
        case "position_change":
            target = random.choice(empty)
            return edit(item.kind, target, scene.with_cell(place, None).with_cell(target, item))
        case "subject_replace":
            new = replace(sample_item(random, absent), count=1)
            return edit(item.kind, place, scene.with_cell(place, new), new=describe(new))
    changed, word = _change(item, edit_type, random)
    return edit(item.kind, place, scene.with_cell(place, changed), value=word)


def sample_session(random: Random, num_turns: int) -> Session:
    """Draw a session of `num_turns` edits by the rules above."""
    source = scene = sample_scene(random)
    edits: list[Edit] = []
    created: frozenset[str] = frozenset()
    while len(edits) < num_turns:
        used = [e.edit_type for e in edits]
        rounds = min((used.count(t) for t in EDIT_TYPES), default=0)
        fresh = [t for t in EDIT_TYPES if used.count(t) == rounds]
        order = random.sample(fresh, len(fresh)) + random.sample(EDIT_TYPES, len(EDIT_TYPES))
        found = next(e for t in order if (e := sample_edit(scene, t, random, created)) is not None)
        created |= {item.kind for item in found.after.cells if item and scene.find(item.kind) is None}
        edits.append(found)
        scene = found.after
    return Session(source=source, edits=tuple(edits))


def is_held_out_scene(source: Scene) -> bool:
    """Say whether sessions from this scene are for evaluation only: one scene in eight, by a hash of its content."""
    return zlib.crc32(repr(source).encode()) % 8 == 0


def make_session(name: str, num_turns: int, *, held_out: bool) -> Session:
    """Draw the session of that name, the same on every machine. No source scene is for training and evaluation both."""
    random = Random(f"{'held-out' if held_out else 'training'}/{name}")
    while is_held_out_scene((session := sample_session(random, num_turns)).source) is not held_out:
        pass
    return session
