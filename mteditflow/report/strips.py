"""Strips: pictures of held-out sessions side by side, with the instructions under them."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mteditflow.pictures import from_pil, to_pil
from mteditflow.types import EditTask

MAX_TILE = 256  # pixels: what is wider is made smaller, since a page has many
MARGIN, LINE_HEIGHT, FONT_SIZE = 10, 15, 12
GREY = (60, 60, 67)


def draw_sessions(tasks: list[EditTask], edits: Mapping[str, Tensor], sessions: Iterable[int]) -> Image.Image:
    """Draw source and turns of sessions, a row for each editor; `edits` (K, num_strips, 3, H, W) in [-1, 1] by its
    name.
    """
    rows, captions = [], []
    for n in sessions:
        for name, images in edits.items():
            height, width = tasks[n].source.shape[1:]
            rows.append([_shrink(image) for image in (tasks[n].source, *images[:, n, :, :height, :width])])
            captions.append([name, *tasks[n].instructions[: len(images)]])
    return draw_grid(rows, captions, scale=_scale(rows[0][0]))


def draw_tiles(images: Sequence[Tensor]) -> Image.Image:
    """Draw images (3, H, W) in [-1, 1] side by side, as wide as those of a strip."""
    tiles = [_shrink(image) for image in images]
    return draw_grid([tiles], [[""] * len(tiles)], scale=_scale(tiles[0]))


def save_strips(folder: Path, iteration: int, tasks: list[EditTask], before: Tensor, after: Tensor) -> Tensor:
    """Write `strips/iteration-NNNNNN.png`: edits (K, num_strips, 3, H, W) of the first sessions, base above current.
    Returns the picture (3, H, W) in [-1, 1].
    """
    edits = {"base": before, f"iteration {iteration}": after}
    picture = draw_sessions(tasks, edits, range(before.shape[1]))
    path = folder / "strips" / f"iteration-{iteration:06d}.png"
    path.parent.mkdir(exist_ok=True)
    picture.save(path)
    return from_pil(picture)


def draw_grid(rows: list[list[Tensor]], captions: list[list[str]], scale: int = 3) -> Image.Image:
    """Draw rows of images (3, H, W) in [-1, 1], each pixel `scale` pixels wide, with a caption under each."""
    font = ImageFont.load_default(FONT_SIZE)
    height, width = (scale * max(image.shape[axis] for row in rows for image in row) for axis in (1, 2))
    texts = [[wrap_text(caption, font, width) for caption in row] for row in captions]
    text_heights = [LINE_HEIGHT * max(map(len, row)) + (4 if any(row) else 0) for row in texts]
    size = (
        MARGIN + max(map(len, rows)) * (width + MARGIN),
        MARGIN + len(rows) * (height + MARGIN) + sum(text_heights),
    )
    canvas = Image.new("RGB", size, "white")
    draw, top = ImageDraw.Draw(canvas), MARGIN
    for row, text, text_height in zip(rows, texts, text_heights, strict=True):
        for column, (image, lines) in enumerate(zip(row, text, strict=True)):
            left, picture = MARGIN + column * (width + MARGIN), to_pil(image)
            tile = (picture.width * scale, picture.height * scale)
            canvas.paste(picture.resize(tile, Image.Resampling.NEAREST), (left, top))
            for place, line in enumerate(lines):
                draw.text((left, top + height + 4 + place * LINE_HEIGHT), line, fill=GREY, font=font)
        top += height + text_height + MARGIN
    return canvas


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


def _shrink(image: Tensor) -> Tensor:
    """Make an image (3, H, W) smaller where it is wider than a tile of a strip."""
    if image.shape[2] <= MAX_TILE:
        return image
    size = (round(image.shape[1] * MAX_TILE / image.shape[2]), MAX_TILE)
    return torch.nn.functional.interpolate(image[None].float(), size, mode="bilinear", antialias=True)[0]


def _scale(tile: Tensor) -> int:
    """Choose how many pixels wide a pixel of a tile is drawn."""
    return 2 if tile.shape[2] <= MAX_TILE // 2 else 1
