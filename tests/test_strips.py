"""Strips: where pixels and captions stand."""

from typing import Any

import torch
from PIL import ImageFont

from mteditflow.evaluate.edival import Evaluation
from mteditflow.pictures import to_pil
from mteditflow.report.strips import draw_grid, draw_sessions, wrap_text
from mteditflow.types import EditTask


def test_grid_places_pixels() -> None:
    """The pixel at column 1, row 0 of an image is a square of `scale` pixels at the image's corner plus one square."""
    image = torch.full((3, 8, 8), -1.0)
    image[0, 0, 1] = 1.0  # red
    image[:, 4, 4] = 0.0  # 127.5, rounded to even
    plain = draw_grid([[image, image], [image]], [["", ""], [""]], scale=5)
    assert plain.size == (10 + 2 * (40 + 10), 10 + 2 * (40 + 10))
    for left, top in ((10, 10), (60, 10), (10, 60)):
        assert {plain.getpixel((left + x, top + y)) for x in range(5, 10) for y in range(5)} == {(255, 0, 0)}
        assert plain.getpixel((left + 4, top)) == (0, 0, 0) and plain.getpixel((left + 22, top + 22)) == (128, 128, 128)
    assert plain.getpixel((80, 80)) == (255, 255, 255)  # no image there
    assert plain.getpixel((3, 3)) == (255, 255, 255)


def test_grid_wraps_captions() -> None:
    image = torch.zeros(3, 16, 16)
    text = "put a striped blue square to the left of antidisestablishmentarianism"
    font = ImageFont.load_default(12)
    with_text = draw_grid([[image, image]], [["source", text]], scale=6)
    lines = wrap_text(text, font, 96)
    assert " ".join(lines).replace(" ", "") == text.replace(" ", "")
    assert all(font.getlength(line) <= 96 for line in lines)
    assert with_text.height == 10 + 96 + 4 + 15 * len(lines) + 10
    ink = [with_text.getpixel((x, y)) != (255, 255, 255) for x in range(116, 212) for y in range(107, with_text.height)]
    gutter = [with_text.getpixel((x, y)) for x in range(213, with_text.width) for y in range(107, with_text.height)]
    assert any(ink) and set(gutter) == {(255, 255, 255)}


def test_references_stand_beside_the_source() -> None:
    """By the names that instructions call them by, in every row, with no verdict."""
    sizes = {"source": (16, 16), "hat": (16, 8), "scarf": (8, 16)}
    source, hat, scarf = (torch.full((3, *size), level / 4) for level, size in enumerate(sizes.values()))
    about: dict[str, Any] = {
        "id": 0,
        "source": source,
        "instructions": ("put the hat of image 2 on",),
        "edit_types": ("add",),
    }
    plain, task = EditTask(**about), EditTask(**about, references=(hat, scarf))
    images = torch.full((1, 1, 3, 16, 16), 0.75)
    edits = Evaluation(
        verdict=torch.ones(1, 1, dtype=torch.bool), consistency=torch.ones(1, 1), valid=torch.ones(1, dtype=torch.bool),
        edit_types=[("add",)], images=images, num_steps=1,
    )  # fmt: skip
    without, beside = (draw_sessions([it], {"base": edits}, [0]) for it in (plain, task))
    step = 2 * 16 + 10
    assert beside.width == without.width + 2 * step
    levels = [beside.getpixel((10 + column * step + 3, 10 + 3)) for column in range(4)]
    assert levels == [to_pil(image).getpixel((0, 0)) for image in (source, hat, scarf, images[0, 0])]
