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
from typing import TypeGuard

import torch
from einops import rearrange
from torch import Tensor

from mteditflow.world.edits import ATTRIBUTE_OF, Edit, Session
from mteditflow.world.render import atlas
from mteditflow.world.scenes import ATTRIBUTES, BACKGROUNDS, CELL, Item, Scene

# Root mean square error of a cell. The autoencoder's is 0.03, and two different objects are 0.2 apart.
UNREADABLE = 0.12
CHUNK = 4  # 1.5 ms a picture on an AVX2 core, 1.3 ms in chunks of 32
MIN_SCORE_DONE = 4  # a turn counts as done from this score on
# The most damage with which an outcome still scores 5, 4, 3 and 2; -1: it never does.
MOST_DAMAGE = {"done": (0, 1, 4, 7), "partly": (-1, -1, 1, 4), "tried": (-1, -1, -1, 1), "no": (-1, -1, -1, -1)}


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What is seen in a picture. `cells`: the object, None for an empty place, 'damaged' where nothing explains the
    pixels.
    """

    background: str
    cells: tuple[Item | str | None, ...]

    def find(self, kind: str) -> int | None:
        """Find the place where an object of that kind is seen; None where there is none."""
        return next((place for place, item in enumerate(self.cells) if _is_kind(item, kind)), None)


class _Templates:
    """The constant part of the search: M objects, U different coverages, 8 backgrounds, 4 places, D = 3072 a cell."""

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


def split_cells(pictures: Tensor) -> Tensor:
    """Cut pictures (N, 3, 64, 64) in [-1, 1] into their four cells, (N, 4, 3072) in [0, 1]."""
    return rearrange(pictures.float() / 2 + 0.5, "n c (y h) (x w) -> n (y x) (c h w)", y=2, x=2)


def errors(pictures: Tensor) -> Tensor:
    """Compute the mean squared error of every hypothesis, (N, 8 backgrounds, 4 places, M objects)."""
    t, x = _templates(), split_cells(pictures)
    with_color = x @ t.colors.T  # (N, 4, M)
    masked = torch.einsum("npd,bpd,ud->nbpu", x, t.backgrounds, t.covers)
    with_background = torch.einsum("npd,bpd->nbp", x, t.backgrounds)
    fit = -2 * with_color[:, None] - 2 * with_background[..., None] + 2 * masked[..., t.cover_of] + t.constant
    return (fit + x.square().sum(-1)[:, None, :, None]) / x.shape[-1]


def read(pictures: Tensor) -> list[Reading]:
    """Read what is in each of the pictures (N, 3, 64, 64), whatever the others.

    CHUNK go through the matrix products at a time, the last ones filled up: alone a picture's errors have other bits.
    """
    found = []
    for part in pictures.split(CHUNK):
        full = torch.cat([part, part[-1:].expand(CHUNK - len(part), *part.shape[1:])])
        best, item = (x[: len(part)] for x in errors(full).min(dim=-1))  # (n, 8, 4)
        background = best.sum(-1).argmin(-1)  # (n,)
        rows = torch.arange(len(part))
        residual, item = best[rows, background].clamp_min(0).sqrt(), item[rows, background]
        for b, items, bad in zip(background.tolist(), item.tolist(), (residual > UNREADABLE).tolist(), strict=True):
            cells = tuple("damaged" if d else atlas().items[i] for i, d in zip(items, bad, strict=True))
            found.append(Reading(background=BACKGROUNDS[b], cells=cells))
    return found


def _is_kind(content: Item | str | None, kind: str) -> TypeGuard[Item]:
    """Say whether what is seen in a place is an object of that kind."""
    return isinstance(content, Item) and content.kind == kind


def differences(before: Item | str | None, after: Item | str | None) -> int:
    """Count how far a content has changed: 0 not, 1 to 4 attributes of the same object, 4 another or lost object."""
    if before in (after, "damaged"):
        return 0
    if isinstance(before, Item) and _is_kind(after, before.kind):
        return sum(getattr(before, name) != getattr(after, name) for name in ATTRIBUTES)
    return 4


def _outcome(edit: Edit, before: Reading, after: Reading) -> tuple[str, int, set[int]]:
    """Judge how far the edit was carried out ('done', 'partly', 'tried', 'no'), the damage to what it changes, and the
    places it concerns.
    """
    place = before.find(edit.kind)
    at = edit.place if place is None else place  # where the object was seen
    was, wanted, seen = before.cells[at], edit.after.cells[edit.place], after.cells[edit.place]
    match edit.edit_type:
        case "background_change":
            changed = after.background != before.background
            return ("done" if after.background == edit.after.background else "tried" if changed else "no"), 0, set()
        case "subject_add" | "subject_replace":
            if wanted and _is_kind(seen, wanted.kind):
                return ("partly" if differences(seen, wanted) else "done"), 0, {edit.place}
            return ("no" if seen in (before.cells[edit.place], None) else "tried"), 0, {edit.place}
        case "subject_remove":
            is_gone = after.find(edit.kind) is None
            return ("done" if is_gone and after.cells[at] is None else "tried" if is_gone else "no"), 0, {at}
        case "position_change":
            if _is_kind(seen, edit.kind):
                has_left = at == edit.place or after.cells[at] is None
                damage = differences(wanted if place is None else was, seen)
                return ("done" if has_left else "partly"), damage, {edit.place, at}
            return ("tried" if after.find(edit.kind) not in (place, None) else "no"), 0, {edit.place, at}
    seen = after.cells[at]  # an attribute of the object where it is seen
    if not _is_kind(seen, edit.kind):
        return "no", 0, {at}
    name = ATTRIBUTE_OF[edit.edit_type]
    is_changed = isinstance(was, Item) and getattr(was, name) != getattr(seen, name)
    damage = differences(was, seen) - is_changed if _is_kind(was, edit.kind) else 0
    is_right = getattr(seen, name) == getattr(wanted, name)
    return ("done" if is_right else "tried" if is_changed else "no"), damage, {at}


def find_outcome(edit: Edit, before: Reading, after: Reading) -> tuple[str, int]:
    """Find how far the edit was carried out ('done', 'partly', 'tried', 'no'), and the attributes lost, 4 an object."""
    outcome, damage, places = _outcome(edit, before, after)
    damage += sum(differences(before.cells[p], after.cells[p]) for p in range(4) if p not in places)
    return outcome, damage + 4 * (edit.edit_type != "background_change" and before.background != after.background)


def grade(edits: list[Edit], before: list[Reading], after: list[Reading]) -> list[int]:
    """Score N edits from 1 to 5 by what was seen before and after them.

    5 done and everything else preserved; 4 done, one attribute of one thing lost; 3 done with more lost, or the right
    kind of object with a wrong attribute; 2 tried, but wrong; 1 ignored, or the rest destroyed. What was damaged before
    cannot be lost again.
    """
    found = [find_outcome(*turn) for turn in zip(edits, before, after, strict=True)]
    return [5 - sum(damage > most for most in MOST_DAMAGE[outcome]) for outcome, damage in found]


def consistency(session: Session, turn: int, source: Tensor, picture: Tensor) -> float:
    """Measure how well the picture (3, 64, 64) of a turn (from 0) keeps what no edit so far has touched in the source;
    NaN where nothing is left.

    Half the background and half the untouched objects (EdiVal); the background alone while no object is untouched; the
    objects alone once an edit has changed the background. The similarity of a region is 1 - rms / 0.5, at least 0, with
    pixels in [0, 1].
    """
    weights, shares = _regions(session, turn)
    if not len(shares):
        return float("nan")
    difference = (split_cells(picture[None]) - split_cells(source[None]))[0]  # (4, 3072)
    squared = difference.square().unflatten(-1, (3, CELL**2)).mean(1)  # (4, 1024)
    rms = (weights @ squared.flatten()).sqrt()
    return (shares * (1 - rms / 0.5).clamp_min(0)).sum().item()


def untouched_pixels(session: Session, turn: int) -> Tensor:
    """Mark the pixels of the source that no edit up to `turn` (from 0) has touched, (64, 64) bool."""
    weights, _ = _regions(session, turn)
    return rearrange((weights > 0).any(0), "(y x h w) -> (y h) (x w)", y=2, x=2, h=CELL)


@lru_cache(maxsize=4096)
def _regions(session: Session, turn: int) -> tuple[Tensor, Tensor]:
    """Find the R regions that no edit up to `turn` has touched: pixel weights (R, 4096) with rows that add up to 1, and
    shares (R,) that add up to 1.
    """
    scenes, kept = session.scenes()[: turn + 2], session.untouched_places(turn)
    # without the objects' edges, which blend with the background: it may have been changed
    objects = _object_mask([session.source], above=0.99)
    regions = [objects * (torch.arange(4) == place)[:, None] for place in kept]
    if all(scene.background == session.source.background for scene in scenes):
        regions.append(1 - _object_mask(scenes))
        shares = torch.tensor([0.5 / len(kept)] * len(kept) + [0.5]) if kept else torch.ones(1)
    else:
        shares = torch.full((len(kept),), 1 / max(len(kept), 1))
    weights = torch.stack(regions).flatten(1) if regions else torch.zeros(0, 4 * CELL**2)
    return weights / weights.sum(1, keepdim=True), shares


def _object_mask(scenes: list[Scene], above: float = 0.0) -> Tensor:
    """Mark with 1 where an object of any of the scenes covers more than that share of a pixel, (4, 1024)."""
    return (atlas().covers[atlas().rows(scenes)].flatten(2) > above).any(0).float()
