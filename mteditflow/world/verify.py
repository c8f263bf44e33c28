"""The exact verifier: what is in a picture, whether an edit was carried out, and what was left alone.

Reading is by synthesis. Every cell of a picture is compared, in squared error, with every object that can exist on
every background; the background that explains all four cells best is the picture's, and the object nearest to a cell is
its content. A cell that nothing explains (root mean square error above `UNREADABLE`) is damaged and equals nothing.

    |x - p - (1 - a) b|^2 = |x|^2 - 2 <x, p> - 2 <x, b> + 2 <x b, a> + |p + (1 - a) b|^2

with p an object's premultiplied colour, a its coverage and b the background, so the search is two matrix products.
Pixels are in [0, 1] here; pictures come in [-1, 1].
"""

from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from einops import rearrange
from torch import Tensor

from mteditflow.world.edits import Edit, Session
from mteditflow.world.render import atlas
from mteditflow.world.scenes import BACKGROUNDS, CELL, Item, Scene

UNREADABLE = (
    0.12  # root mean square error of a cell; the autoencoder's own is 0.03, two different objects are 0.2 apart
)
MIN_SCORE_DONE = 4  # a turn counts as done from this score on


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What is seen in a picture. `cells`: the object, None for an empty place, 'damaged' where nothing explains the
    pixels.
    """

    background: str
    cells: tuple[Item | str | None, ...]

    def find(self, kind: str) -> int | None:
        """The place where an object of that kind is seen, or None."""
        return next((p for p, item in enumerate(self.cells) if isinstance(item, Item) and item.kind == kind), None)


class _Templates:
    """The constant part of the search: M objects, U different coverages, 8 backgrounds, 4 places, D = 3072 numbers a
    cell.
    """

    def __init__(self) -> None:
        a = atlas()
        self.colors = a.colors.flatten(1)  # (M, D)
        covers, self.cover_of = torch.unique(a.covers.flatten(1), dim=0, return_inverse=True)
        self.covers = covers.repeat(1, 3)  # (U, D)
        self.backgrounds = rearrange(a.backgrounds, "b c (y h) (x w) -> b (y x) (c h w)", y=2, x=2)  # (8, 4, D)
        bare = 1 - self.covers[self.cover_of]  # (M, D)
        squares = self.colors.square().sum(-1)  # (M,)
        cross = torch.einsum("md,bpd->bpm", self.colors * bare, self.backgrounds)
        behind = torch.einsum("md,bpd->bpm", bare.square(), self.backgrounds.square())
        self.constant = squares + 2 * cross + behind  # (8, 4, M)


@cache
def _templates() -> _Templates:
    return _Templates()


def cells_of(pictures: Tensor) -> Tensor:
    """The four cells of pictures (N, 3, 64, 64) in [-1, 1], as (N, 4, 3072) in [0, 1]."""
    return rearrange(pictures.float() / 2 + 0.5, "n c (y h) (x w) -> n (y x) (c h w)", y=2, x=2)


def errors(pictures: Tensor) -> Tensor:
    """Mean squared error of every hypothesis, (N, 8 backgrounds, 4 places, M objects)."""
    t, x = _templates(), cells_of(pictures)
    with_color = x @ t.colors.T  # (N, 4, M)
    masked = torch.einsum("npd,bpd,ud->nbpu", x, t.backgrounds, t.covers)
    with_background = torch.einsum("npd,bpd->nbp", x, t.backgrounds)
    fit = -2 * with_color[:, None] - 2 * with_background[..., None] + 2 * masked[..., t.cover_of] + t.constant
    return (fit + x.square().sum(-1)[:, None, :, None]) / x.shape[-1]


def read(pictures: Tensor, chunk: int = 32) -> list[Reading]:
    """What is in each of the pictures (N, 3, 64, 64)."""
    found = []
    for part in pictures.split(chunk):
        best, item = errors(part).min(dim=-1)  # (n, 8, 4)
        background = best.sum(-1).argmin(-1)  # (n,)
        rows = torch.arange(len(part))
        residual, item = best[rows, background].clamp_min(0).sqrt(), item[rows, background]
        for b, items, bad in zip(background.tolist(), item.tolist(), (residual > UNREADABLE).tolist(), strict=True):
            cells = tuple("damaged" if d else atlas().items[i] for i, d in zip(items, bad, strict=True))
            found.append(Reading(background=BACKGROUNDS[b], cells=cells))
    return found


def _differences(before: Item | str | None, after: Item | str | None) -> int:
    """How far a content has changed: 0 not, 1 to 4 attributes of the same object, 4 another or lost object."""
    if before in (after, "damaged"):
        return 0
    if isinstance(before, Item) and isinstance(after, Item) and before.kind == after.kind:
        return sum(getattr(before, name) != getattr(after, name) for name in ("color", "material", "count", "text"))
    return 4


def _outcome(edit: Edit, before: Reading, after: Reading) -> tuple[str, int, set[int]]:
    """How far the edit was carried out ('done', 'partly', 'tried', 'no'), damage to its own object, and the places it
    concerns.
    """
    place = before.find(edit.kind) if edit.kind else None
    wanted = edit.after.cells[edit.place]
    seen = after.cells[edit.place]
    match edit.edit_type:
        case "background_change":
            changed = after.background != before.background
            return ("done" if after.background == edit.after.background else "tried" if changed else "no"), 0, set()
        case "subject_add" | "subject_replace":
            assert wanted is not None
            same_kind = isinstance(seen, Item) and seen.kind == wanted.kind
            wrong = _differences(seen, wanted) if same_kind else 0
            tried = "tried" if seen not in (before.cells[edit.place], None) else "no"
            return ("done" if same_kind and not wrong else "partly" if same_kind else tried), 0, {edit.place}
        case "subject_remove":
            at = edit.place if place is None else place
            gone = after.find(edit.kind) is None
            return ("done" if gone and after.cells[at] is None else "tried" if gone else "no"), 0, {at}
        case "position_change":
            places = {edit.place} | ({place} if place is not None else set())
            arrived = isinstance(seen, Item) and seen.kind == edit.kind
            left = place is None or place == edit.place or after.cells[place] is None
            if arrived:
                own = before.cells[place] if place is not None else wanted
                return ("done" if left else "partly"), _differences(own, seen), places
            return ("tried" if after.find(edit.kind) not in (place, None) else "no"), 0, places
    assert wanted is not None  # an attribute of the object where it is seen
    at = edit.place if place is None else place
    seen, own = after.cells[at], before.cells[at]
    if not (isinstance(seen, Item) and seen.kind == edit.kind):
        return "no", 0, {at}
    name = {"color_alter": "color", "material_alter": "material", "text_change": "text", "count_change": "count"}[
        edit.edit_type
    ]
    is_right = getattr(seen, name) == getattr(wanted, name)
    others = sum(
        isinstance(own, Item) and own.kind == seen.kind and getattr(own, n) != getattr(seen, n)
        for n in ("color", "material", "count", "text") if n != name
    )  # fmt: skip
    is_changed = isinstance(own, Item) and getattr(own, name) != getattr(seen, name)
    return ("done" if is_right else "tried" if is_changed else "no"), others, {at}


def grade(edits: list[Edit], before: list[Reading], after: list[Reading]) -> list[int]:
    """Scores 1 to 5 of N edits, each from what was seen before it and after it.

    5 done and everything else preserved; 4 done, one attribute of one thing lost; 3 done with more lost, or the right
    kind of object with a wrong attribute; 2 tried, but wrong; 1 ignored, or the rest destroyed. What was damaged before
    cannot be lost again.
    """
    scores = []
    for edit, seen_before, seen_after in zip(edits, before, after, strict=True):
        outcome, damage, places = _outcome(edit, seen_before, seen_after)
        others = [p for p in range(4) if p not in places]
        damage += sum(_differences(seen_before.cells[p], seen_after.cells[p]) for p in others)
        damage += 4 * (edit.edit_type != "background_change" and seen_before.background != seen_after.background)
        match outcome:
            case "done":
                score = 5 if damage == 0 else 4 if damage == 1 else 3 if damage <= 4 else 2 if damage < 8 else 1
            case "partly":
                score = 3 if damage <= 1 else 2 if damage <= 4 else 1
            case "tried":
                score = 2 if damage <= 1 else 1
            case _:
                score = 1
        scores.append(score)
    return scores


def consistency(session: Session, turn: int, source: Tensor, picture: Tensor) -> float:
    """How well the picture (3, 64, 64) of a turn (from 0) keeps what no edit so far has touched, against I_0; NaN where
    nothing is left.

    Half the background and half the untouched objects (EdiVal); the background alone while no object is untouched; the
    objects alone once an edit has changed the background. The similarity of a region is 1 - rms / 0.5, at least 0, with
    pixels in [0, 1].
    """
    weights, shares = _regions(session, turn)
    if not len(shares):
        return float("nan")
    squared = (
        (cells_of(picture[None]) - cells_of(source[None]))[0].square().unflatten(-1, (3, CELL**2)).mean(1)
    )  # (4, 1024)
    rms = (weights @ squared.flatten()).sqrt()
    return (shares * (1 - rms / 0.5).clamp_min(0)).sum().item()


@lru_cache(maxsize=4096)
def _regions(session: Session, turn: int) -> tuple[Tensor, Tensor]:
    """R regions that no edit up to `turn` has touched: pixel weights (R, 4096) that add up to 1, and shares (R,) that
    add up to 1.
    """
    scenes, kept = session.scenes()[: turn + 2], session.untouched(turn)
    own = _covered([session.source], above=0.99)  # edges blend with the background, which may have been changed
    regions = [own * (torch.arange(4) == place)[:, None] for place in kept]
    if all(scene.background == session.source.background for scene in scenes):
        regions.append(1 - _covered(scenes))
        shares = torch.tensor([0.5 / len(kept)] * len(kept) + [0.5]) if kept else torch.ones(1)
    else:
        shares = torch.full((len(kept),), 1 / max(len(kept), 1))
    weights = torch.stack(regions).flatten(1) if regions else torch.zeros(0, 4 * CELL**2)
    return weights / weights.sum(1, keepdim=True), shares


def _covered(scenes: list[Scene], above: float = 0.0) -> Tensor:
    """1 where an object of any of the scenes covers more than that share of a pixel, (4, 1024)."""
    a = atlas()
    index = torch.tensor([[a.index[item] for item in scene.cells] for scene in scenes])
    return (a.covers[index].flatten(2) > above).any(0).float()
