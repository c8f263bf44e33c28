"""Strips: where pixels and captions stand."""

import torch
from PIL import ImageFont

from mteditflow.report.strips import draw_grid, wrap_text


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
