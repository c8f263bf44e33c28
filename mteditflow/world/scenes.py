"""The embedded editing world: what a scene is.

A scene is a background and up to four objects, each alone in one quadrant of a 64 x 64 image. No two objects of a scene
are of one kind, so that 'the ball' always has one meaning.
"""

from dataclasses import dataclass, replace
from random import Random

IMAGE, CELL = 64, 32  # pixels
PLACES = ("top left", "top right", "bottom left", "bottom right")
BACKGROUNDS = ("beach", "meadow", "night", "snow", "desert", "city", "sea", "kitchen")
KINDS = ("ball", "box", "star", "heart", "tree", "house", "fish", "mushroom", "sign")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "white")
MATERIALS = ("plastic", "wooden", "metal", "woolen")
COUNTS = (1, 2, 3)
TEXTS = ("HI", "GO", "UP", "NO", "OK", "TX")
ATTRIBUTES = {"color": COLORS, "material": MATERIALS, "text": TEXTS, "count": COUNTS}  # of an object


@dataclass(frozen=True, kw_only=True)
class Item:
    """An object: `count` copies of a kind (a sign: one, with a text; every other kind: no text)."""

    kind: str
    color: str
    material: str = "plastic"
    count: int = 1
    text: str = ""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Background and the object in each of the four places (None: empty)."""

    background: str
    cells: tuple[Item | None, ...]

    def find(self, kind: str) -> int | None:
        """Find the place of the object of that kind; None where there is none."""
        return next((place for place, item in enumerate(self.cells) if item and item.kind == kind), None)

    def with_cell(self, place: int, item: Item | None) -> "Scene":
        """Copy the scene, with another content of one place."""
        return replace(self, cells=(*self.cells[:place], item, *self.cells[place + 1 :]))


def all_items() -> list[Item]:
    """List every object that can exist, in a fixed order: the rows of the renderer's atlas."""
    plain = [
        Item(kind=kind, color=color, material=material, count=count)
        for kind in KINDS if kind != "sign" for color in COLORS for material in MATERIALS for count in COUNTS
    ]  # fmt: skip
    signs = [Item(kind="sign", color=c, material=m, text=t) for c in COLORS for m in MATERIALS for t in TEXTS]
    return plain + signs


def sample_item(random: Random, kinds: list[str]) -> Item:
    """Draw an object of one of the kinds."""
    kind = random.choice(kinds)
    item = Item(kind=kind, color=random.choice(COLORS), material=random.choice(MATERIALS))
    return replace(item, text=random.choice(TEXTS)) if kind == "sign" else replace(item, count=random.choice(COUNTS))


def sample_scene(random: Random) -> Scene:
    """Draw a scene of two or three objects; about half of the scenes have a sign."""
    scene = Scene(background=random.choice(BACKGROUNDS), cells=(None, None, None, None))
    kinds = random.sample([kind for kind in KINDS if kind != "sign"], random.choice((2, 3)))
    if random.random() < 0.5:
        kinds[0] = "sign"
    for kind, place in zip(kinds, random.sample(range(4), len(kinds)), strict=True):
        scene = scene.with_cell(place, sample_item(random, [kind]))
    return scene
