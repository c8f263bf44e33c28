"""Sessions for the small judge to learn from: pictures as the embedded editor makes them, graded exactly.

Two kinds, about half and half. The editor's own rollouts of training sessions, K turns on its own output, graded by the
verifier that reads the pictures; they have the faults that a judge will meet, in their natural shares. And sessions put
together here, whose turns are done, ignored, done to another object, half done, or done with damage elsewhere, until
the grade is the one that was drawn: all grades are equally frequent in them. Their pictures are put together of the
four cells: every object on every background goes through the editor's autoencoder once, because decoding every picture
of every session would take hours on a CPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from random import Random

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from einops import rearrange
from torch import Tensor

from mteditflow.config import EMBEDDED, ModelConfig
from mteditflow.flow import sigma_schedule
from mteditflow.pictures import to_uint8
from mteditflow.policy.pipelines import load_pipeline
from mteditflow.world.autoencoder import decode, encode
from mteditflow.world.edits import ATTRIBUTE_OF, Edit, Session, make_session
from mteditflow.world.pretrain import TOKENS, Editor, tokenize
from mteditflow.world.render import atlas, compose, render
from mteditflow.world.scenes import ATTRIBUTES, BACKGROUNDS, CELL, KINDS, Item, Scene, sample_item
from mteditflow.world.verify import Reading, grade, read

NUM_STEPS = 4  # denoising steps of a turn: rollout.num_steps of the miniature
MAX_TRIES = 12  # draws of a turn's outcome until it has the grade that was wanted
GRADES = (1, 2, 3, 4, 5)


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A session with its pictures (K+1, 3, 64, 64) uint8, what is read in them (K+1), and the grades of its turns."""

    edits: tuple[Edit, ...]
    pictures: Tensor | None  # None: to be drawn of what is read
    readings: tuple[Reading, ...]
    grades: tuple[int, ...]

    @classmethod
    def graded(cls, edits: tuple[Edit, ...], pictures: Tensor | None, readings: Sequence[Reading]) -> "Judged":
        """Grade the K turns by the verifier."""
        grades = grade(list(edits), list(readings[:-1]), list(readings[1:]))
        return cls(edits=edits, pictures=pictures, readings=tuple(readings), grades=tuple(grades))

    def part(self, first: int, last: int) -> "Judged":
        """Cut out turns `first` to `last` (from 0, `last` not included), a session of its own."""
        seen = slice(first, last + 1)
        pictures = None if self.pictures is None else self.pictures[seen]
        edits, grades = self.edits[first:last], self.grades[first:last]
        return Judged(edits=edits, pictures=pictures, readings=self.readings[seen], grades=grades)


@torch.no_grad()
def roll_out_editor(sessions: Sequence[Session], seed: int, chunk: int = 64) -> list[Judged]:
    """Let the embedded editor carry out sessions of one length, each turn on its own output, and grade the turns."""
    pipeline = load_pipeline(ModelConfig(path=EMBEDDED))
    editor, judged = Editor(pipeline).eval(), []
    sigmas = sigma_schedule(NUM_STEPS, TOKENS).float()
    for start in range(0, len(sessions), chunk):
        part = sessions[start : start + chunk]
        generator = torch.Generator().manual_seed(seed * 2**32 + start)
        pictures = [to_uint8(render([session.source for session in part]))]
        for edits in zip(*(session.edits for session in part), strict=True):
            t5_ids, clip_ids = tokenize(pipeline, [edit.instruction for edit in edits])
            condition = encode(pipeline.vae, pictures[-1] / 127.5 - 1)
            latents = torch.randn(condition.shape, generator=generator)
            for sigma, sigma_next in pairwise(sigmas):
                velocity = editor(latents, condition, sigma.expand(len(part)), t5_ids, clip_ids)
                latents = latents + (sigma_next - sigma) * velocity
            pictures.append(to_uint8(decode(pipeline.vae, latents)))
        readings = zip(*(read(picture / 127.5 - 1) for picture in pictures), strict=True)
        rows = zip(part, torch.stack(pictures, 1), readings, strict=True)
        judged += [Judged.graded(session.edits, seen, found) for session, seen, found in rows]
    return judged


def make_cells(seed: int, chunk: int = 64) -> Tensor:
    """Put every object on every background, in every place, through the editor's autoencoder: cells as it shows them,
    (8 backgrounds, 4 places, M objects, 3, 32, 32) uint8. Neighbours are drawn at random.
    """
    vae, generator = load_pipeline(ModelConfig(path=EMBEDDED)).vae, torch.Generator().manual_seed(seed)
    num_items = len(atlas().items)
    cells = torch.zeros(len(BACKGROUNDS), 4, num_items, 3, CELL, CELL, dtype=torch.uint8)
    for background in range(len(BACKGROUNDS)):
        items = torch.stack([torch.randperm(num_items, generator=generator) for _ in range(4)], 1)  # (M, 4)
        for rows in items.split(chunk):
            paint_cells(vae, cells, rows, background)
    return cells


@torch.no_grad()
def paint_cells(vae: AutoencoderKL, cells: Tensor, items: Tensor, background: int) -> None:
    """Write what the autoencoder makes of objects (N, 4) on a background into their places in `cells`."""
    pictures = compose(items, torch.full((len(items),), background))
    seen = to_uint8(decode(vae, encode(vae, pictures)))
    for place, cell in enumerate(rearrange(seen, "n c (y h) (x w) -> (y x) n c h w", y=2, x=2)):
        cells[background, place, items[:, place]] = cell


def draw_cells(cells: Tensor, items: Tensor, backgrounds: Tensor) -> Tensor:
    """Draw pictures (N, 3, 64, 64) uint8 of such cells: `items` (N, 4) on `backgrounds` (N,), as `compose` has them."""
    drawn = cells[backgrounds[:, None], torch.arange(4), items]
    return rearrange(drawn, "n (y x) c h w -> n c (y h) (x w)", y=2)


def see(scene: Scene) -> Reading:
    """Read a scene without looking at its picture."""
    return Reading(background=scene.background, cells=scene.cells)


def compose_session(session: Session, random: Random) -> Judged:
    """Put a session together whose turns have grades drawn from 1 to 5, where the edit allows the one that is drawn."""
    scenes = [session.source]
    for edit in session.edits:
        wanted, found = random.choice(GRADES), scenes[-1]
        for _ in range(MAX_TRIES):
            found = draw_outcome(edit, scenes[-1], random)
            if grade([edit], [see(scenes[-1])], [see(found)]) == [wanted]:
                break
        scenes.append(found)
    return Judged.graded(session.edits, None, [see(scene) for scene in scenes])


def draw_outcome(edit: Edit, scene: Scene, random: Random) -> Scene:
    """Draw what a poor editor makes of a scene: the edit, nothing, a wrong one, half of it, and damage elsewhere."""
    how = random.choice(("done", "done", "done", "ignored", "wrong", "wrong", "elsewhere"))
    match how:
        case "done":
            scene = carry_out(edit, scene)
        case "wrong":
            scene = carry_out(spoil(edit, scene, random), scene)
        case "elsewhere":
            scene = carry_out(redirect(edit, scene, random), scene)
    damage = random.choice((0, 0, 0, 1, 1, 2, 3, 4, 8))  # attributes lost; 4 an object, or the background
    while damage > 0:
        lost = 4 if damage >= 4 and random.random() < 0.8 else 1
        scene = lose(scene, lost, random)
        damage -= lost
    return scene


def carry_out(edit: Edit, scene: Scene) -> Scene:
    """Carry an edit out in the scene that is there, which may not be the one it was made for."""
    at, wanted = scene.find(edit.kind), edit.after.cells[edit.place]
    found = None if at is None else scene.cells[at]
    match edit.edit_type:
        case "background_change":
            return replace(scene, background=edit.after.background)
        case "subject_add" | "subject_replace":
            return scene.with_cell(edit.place, wanted)
        case "subject_remove":
            return scene if at is None else scene.with_cell(at, None)
        case "position_change":
            return (scene if at is None else scene.with_cell(at, None)).with_cell(edit.place, found or wanted)
    if found is None or at is None or wanted is None:
        return scene
    name = ATTRIBUTE_OF[edit.edit_type]
    is_had = found.kind == "sign" if name == "text" else name != "count" or found.kind != "sign"
    return scene.with_cell(at, replace(found, **{name: getattr(wanted, name)})) if is_had else scene


def spoil(edit: Edit, scene: Scene, random: Random) -> Edit:
    """Turn an edit into one with the same object and another value, look or place."""
    wanted = edit.after.cells[edit.place]
    match edit.edit_type:
        case "background_change":
            return replace(edit, after=replace(edit.after, background=random.choice(BACKGROUNDS)))
        case "subject_remove" | "position_change":
            place = random.randrange(4)
            return replace(edit, edit_type="position_change", place=place, after=edit.after.with_cell(place, wanted))
    if wanted is None:
        return edit
    if edit.edit_type in ATTRIBUTE_OF:
        changed = change(wanted, random, ATTRIBUTE_OF[edit.edit_type])
    elif random.random() < 0.6:
        changed = change(wanted, random)
    else:
        changed = sample_item(random, list(KINDS))
    return replace(edit, after=edit.after.with_cell(edit.place, changed))


def redirect(edit: Edit, scene: Scene, random: Random) -> Edit:
    """Turn an edit into the same one of another object, or at another place."""
    others = [item.kind for item in scene.cells if item and item.kind != edit.kind]
    place = random.randrange(4)
    if edit.edit_type in ("subject_add", "subject_replace", "background_change") or not others:
        return replace(edit, place=place, after=edit.after.with_cell(place, edit.after.cells[edit.place]))
    return replace(edit, kind=random.choice(others))


def change(item: Item, random: Random, name: str = "") -> Item:
    """Draw another value of an attribute, of any that the object can have where none is named."""
    name = name or random.choice(("color", "material", "text" if item.kind == "sign" else "count"))
    return replace(item, **{name: random.choice([value for value in ATTRIBUTES[name] if value != getattr(item, name)])})


def lose(scene: Scene, lost: int, random: Random) -> Scene:
    """Lose one attribute of an object, or with 4 an object or the background; objects may also come up."""
    place = random.randrange(4)
    item = scene.cells[place]
    if lost < 4:
        taken = [place for place, item in enumerate(scene.cells) if item]
        if not taken:
            return scene
        place = random.choice(taken)
        item = scene.cells[place]
        assert item is not None
        return scene.with_cell(place, change(item, random))
    if random.random() < 0.25:
        return replace(scene, background=random.choice(BACKGROUNDS))
    is_empty = item is not None and random.random() < 0.6
    return scene.with_cell(place, None if is_empty else sample_item(random, list(KINDS)))


def judge_sessions(name: str, num_sessions: int, num_turns: int, *, held_out: bool = False) -> list[Session]:
    """Draw sessions that no run trains on or is evaluated on."""
    return [make_session(f"judge/{name}/{i}", num_turns, held_out=held_out) for i in range(num_sessions)]
