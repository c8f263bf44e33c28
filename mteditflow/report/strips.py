"""Strips: pictures of held-out sessions side by side, under each its instruction, and whether it was carried out."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mteditflow.pictures import from_pil, to_pil
from mteditflow.types import EditTask

SMALL, LARGE = 256, 512  # pixels: between them a tile is half as wide as a picture that is wider than SMALL
MARGIN, LINE_HEIGHT, FONT_SIZE, MARK = 10, 15, 12, 15
GREY, GREEN, RED = (60, 60, 67), (24, 121, 78), (192, 51, 43)


class Edits(Protocol):
    """What a strip shows of an evaluation."""

    @property
    def images(self) -> Tensor:
        """Edits (K, num_strips, 3, H, W) in [-1, 1] of the first sessions."""
        ...

    @property
    def verdict(self) -> Tensor:
        """Whether a turn's instruction was carried out, (n, K) bool."""
        ...

    @property
    def valid(self) -> Tensor:
        """Whether a session could be scored, (n,) bool."""
        ...


def draw_sessions(tasks: list[EditTask], edits: Mapping[str, Edits], sessions: Iterable[int]) -> Image.Image:
    """Draw source, references and turns of sessions, a row for each editor; `edits` by its name."""
    rows, captions, marks = [], [], []
    for n in sessions:
        height, width = tasks[n].source.shape[1:]
        for name, found in edits.items():
            images = found.images[:, n, :, :height, :width]
            given = (tasks[n].source, *tasks[n].references)
            rows.append([_shrink(image) for image in (*given, *images)])
            names = [f"image {number}" for number in range(2, len(given) + 1)]  # as instructions call them
            captions.append([name, *names, *tasks[n].instructions[: len(images)]])
            verdict = found.verdict[n].tolist() if found.valid[n] else [None] * len(images)
            marks.append([None] * len(given) + verdict)
    return draw_grid(rows, captions, scale=_scale(rows[0][0]), marks=marks)


def draw_tiles(images: Sequence[Tensor]) -> Image.Image:
    """Draw images (3, H, W) in [-1, 1] side by side, as wide as those of a strip."""
    tiles = [_shrink(image) for image in images]
    return draw_grid([tiles], [[""] * len(tiles)], scale=_scale(tiles[0]))


def save_strips(folder: Path, iteration: int, tasks: list[EditTask], before: Edits, after: Edits) -> Tensor:
    """Write `strips/iteration-NNNNNN.png`: the edits of the first sessions, base above current. Returns the picture
    (3, H, W) in [-1, 1].
    """
    edits = {"base": before, f"iteration {iteration}": after}
    picture = draw_sessions(tasks, edits, range(before.images.shape[1]))
    path = folder / "strips" / f"iteration-{iteration:06d}.png"
    path.parent.mkdir(exist_ok=True)
    picture.save(path)
    return from_pil(picture)


def draw_grid(
    rows: list[list[Tensor]],
    captions: list[list[str]],
    scale: int = 3,
    marks: Sequence[Sequence[bool | None]] | None = None,
) -> Image.Image:
    """Draw rows of images (3, H, W) in [-1, 1], each pixel `scale` pixels wide, with a caption under each, and before
    it a tick or a cross where `marks` has one.
    """
    font = ImageFont.load_default(FONT_SIZE)
    height, width = (scale * max(image.shape[axis] for row in rows for image in row) for axis in (1, 2))
    signs = marks or [[None] * len(row) for row in rows]
    texts = [
        [wrap_text(caption, font, width if mark is None else width - MARK) for caption, mark in zip(*row, strict=True)]
        for row in zip(captions, signs, strict=True)
    ]
    text_heights = [LINE_HEIGHT * max(map(len, row)) + (4 if any(row) else 0) for row in texts]
    size = (
        MARGIN + max(map(len, rows)) * (width + MARGIN),
        MARGIN + len(rows) * (height + MARGIN) + sum(text_heights),
    )
    canvas = Image.new("RGB", size, "white")
    draw, top = ImageDraw.Draw(canvas), MARGIN
    for row, text, text_height, signed in zip(rows, texts, text_heights, signs, strict=True):
        for column, (image, lines, mark) in enumerate(zip(row, text, signed, strict=True)):
            left, picture = MARGIN + column * (width + MARGIN), to_pil(image)
            tile = (picture.width * scale, picture.height * scale)
            canvas.paste(picture.resize(tile, Image.Resampling.NEAREST), (left, top))
            if mark is not None and lines:
                _draw_mark(draw, left, top + height + 6, is_done=mark)
            indent = 0 if mark is None else MARK
            for place, line in enumerate(lines):
                draw.text((left + indent, top + height + 4 + place * LINE_HEIGHT), line, fill=GREY, font=font)
        top += height + text_height + MARGIN
    return canvas


def _draw_mark(draw: ImageDraw.ImageDraw, left: int, top: int, *, is_done: bool) -> None:
    """Draw a tick or a cross, 9 pixels wide: the font has neither."""
    if is_done:
        draw.line([(left, top + 5), (left + 3, top + 9), (left + 9, top + 1)], fill=GREEN, width=2)
    else:
        draw.line([(left, top + 1), (left + 8, top + 9)], fill=RED, width=2)
        draw.line([(left, top + 9), (left + 8, top + 1)], fill=RED, width=2)


def wrap_text(text: str, font: Any, width: int) -> list[str]:
    """Break a text into lines no wider than `width` pixels; a word that is wider is broken too."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines[-1] else word
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return [line for line in lines if line]


def _tile_width(width: int) -> int:
    """Say how wide a picture's tile is before it is scaled up: half of a large picture, but no less than SMALL."""
    return width if width <= SMALL else min(max(width // 2, SMALL), LARGE)


def _shrink(image: Tensor) -> Tensor:
    """Make an image (3, H, W) smaller where it is wider than its tile."""
    width = _tile_width(image.shape[2])
    if image.shape[2] == width:
        return image
    size = (round(image.shape[1] * width / image.shape[2]), width)
    return torch.nn.functional.interpolate(image[None].float(), size, mode="bilinear", antialias=True)[0]


def _scale(tile: Tensor) -> int:
    """Choose how many pixels wide a pixel of a tile is drawn."""
    return 2 if tile.shape[2] <= SMALL // 2 else 1
