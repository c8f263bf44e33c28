"""What the embedded world looks like: every object and every background, drawn from formulas with numpy.

A cell is 32 x 32 pixels. Objects are signed distance functions, shaded and textured on a grid four times finer and then
averaged, so that edges are smooth and the same on every machine: no font, no image file, no drawing library. Materials
are patterns of brightness over the object's colour with a period of at least five pixels, which a VAE with factor 8 can
still carry.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mteditflow.world.scenes import CELL, IMAGE, Item

Array = NDArray[np.float64]
Color = tuple[float, float, float]

FINE = 4  # samples per pixel and axis
OUTLINE = 1.1  # pixels
COLOR_RGB: dict[str, Color] = {
    "red": (0.86, 0.16, 0.16), "orange": (0.98, 0.55, 0.10), "yellow": (0.98, 0.88, 0.20),
    "green": (0.20, 0.68, 0.28), "blue": (0.18, 0.38, 0.88), "purple": (0.60, 0.26, 0.76), "white": (0.96, 0.96, 0.96),
}  # fmt: skip
BROWN, CREAM, DARK = (0.45, 0.29, 0.16), (0.96, 0.90, 0.76), (0.16, 0.14, 0.16)
# Where the copies of an object stand in its cell: centre (x, y) and half-size, in pixels.
COPIES: dict[int, list[tuple[float, float, float]]] = {
    1: [(16.0, 16.0, 13.5)],
    2: [(8.5, 16.0, 7.6), (23.5, 16.0, 7.6)],
    3: [(16.0, 8.6, 7.4), (8.4, 23.2, 7.4), (23.6, 23.2, 7.4)],
}
GLYPHS: dict[str, tuple[str, ...]] = {  # 5 rows of 4 columns
    "G": (".###", "#...", "#.##", "#..#", ".###"),
    "H": ("#..#", "#..#", "####", "#..#", "#..#"),
    "I": (".##.", ".##.", ".##.", ".##.", ".##."),
    "K": ("#..#", "#.#.", "##..", "#.#.", "#..#"),
    "N": ("#..#", "##.#", "####", "#.##", "#..#"),
    "O": (".##.", "#..#", "#..#", "#..#", ".##."),
    "P": ("###.", "#..#", "###.", "#...", "#..."),
    "T": ("####", ".##.", ".##.", ".##.", ".##."),
    "U": ("#..#", "#..#", "#..#", "#..#", ".##."),
    "X": ("#..#", ".##.", ".##.", ".##.", "#..#"),
}


def _box(u: Array, v: Array, half_width: float, half_height: float, corner: float = 0.12) -> Array:
    a, b = np.abs(u) - half_width + corner, np.abs(v) - half_height + corner
    return np.hypot(np.maximum(a, 0), np.maximum(b, 0)) + np.minimum(np.maximum(a, b), 0) - corner


def _ellipse(u: Array, v: Array, half_width: float, half_height: float) -> Array:
    return (np.hypot(u / half_width, v / half_height) - 1) * min(half_width, half_height)


def _polygon(u: Array, v: Array, corners: list[tuple[float, float]]) -> Array:
    """Measure the signed distance to a polygon: to the nearest edge, negative inside (even-odd rule)."""
    distance, inside = np.full(u.shape, np.inf), np.zeros(u.shape, dtype=bool)
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
        ex, ey = x1 - x0, y1 - y0
        along = np.clip(((u - x0) * ex + (v - y0) * ey) / (ex * ex + ey * ey), 0, 1)
        distance = np.minimum(distance, np.hypot(u - x0 - along * ex, v - y0 - along * ey))
        inside ^= ((y0 > v) != (y1 > v)) & (u < x0 + (v - y0) * ex / (ey if ey else 1.0))
    return np.where(inside, -distance, distance)


def _star(u: Array, v: Array) -> Array:
    corners = [(np.pi * (k / 5 - 0.5), 0.46 if k % 2 else 1.0) for k in range(10)]  # angle, radius
    return _polygon(u, v - 0.06, [(radius * np.cos(angle), radius * np.sin(angle)) for angle, radius in corners])


def _heart(u: Array, v: Array) -> Array:
    lobes = np.minimum(np.hypot(np.abs(u) - 0.44, v + 0.34) - 0.5, np.hypot(u, v + 0.1) - 0.3)
    return np.minimum(lobes, _polygon(u, v, [(-0.86, -0.08), (0.86, -0.08), (0.0, 0.94)]))


def _crown(u: Array, v: Array) -> Array:
    parts = [np.hypot(u - x, v - y) - r for x, y, r in ((0, -0.45, 0.5), (-0.42, 0.0, 0.46), (0.42, 0.0, 0.46))]
    return np.minimum.reduce(parts)


def _fish(u: Array, v: Array) -> Array:
    return np.minimum(_ellipse(u + 0.2, v, 0.75, 0.55), _polygon(u, v, [(0.35, 0.0), (0.98, -0.55), (0.98, 0.55)]))


def _cap(u: Array, v: Array) -> Array:
    return np.maximum(_ellipse(u, v - 0.12, 0.96, 0.98), v - 0.12)


Part = tuple[Callable[[Array, Array], Array], Color | None]  # signed distance, colour (None: the object's)
SHAPES: dict[str, list[Part]] = {  # later parts are drawn over earlier ones
    "ball": [(lambda u, v: np.hypot(u, v) - 0.92, None)],
    "box": [(lambda u, v: _box(u, v, 0.84, 0.84), None), (lambda u, v: _box(u, v + 0.42, 0.84, 0.05, 0.02), DARK)],
    "star": [(_star, None)],
    "heart": [(_heart, None)],
    "tree": [(lambda u, v: _box(u, v - 0.62, 0.15, 0.36, 0.03), BROWN), (_crown, None)],
    "house": [
        (lambda u, v: _box(u, v - 0.38, 0.72, 0.56, 0.03), None),
        (lambda u, v: _polygon(u, v, [(-0.96, -0.12), (0.96, -0.12), (0.0, -0.94)]), BROWN),
        (lambda u, v: _box(u, v - 0.62, 0.17, 0.32, 0.02), DARK),
    ],
    "fish": [(_fish, None), (lambda u, v: np.hypot(u + 0.55, v + 0.12) - 0.12, DARK)],
    "mushroom": [(lambda u, v: _box(u, v - 0.45, 0.26, 0.48), CREAM), (_cap, None)],
    "sign": [
        (lambda u, v: _box(u, v - 0.8, 0.11, 0.2, 0.02), BROWN),
        (lambda u, v: _box(u, v + 0.18, 1.08, 0.86), None),
        (lambda u, v: _box(u, v + 0.18, 0.78, 0.50, 0.02), CREAM),
    ],
}


def _material(material: str, x: Array, y: Array, u: Array, v: Array) -> tuple[Array, Array]:
    """Draw a material's pattern at pixel (x, y) of the cell: the factor on the colour, and the white mixed in."""
    light = 1.0 - 0.16 * (u + v)
    match material:
        case "plastic":
            return light, 0.75 * np.exp(-((u + 0.36) ** 2 + (v + 0.40) ** 2) / 0.05)
        case "wooden":
            return light * (0.76 + 0.27 * np.sin(2 * np.pi * (y + 1.0 * np.sin(x / 3.5)) / 5.4)), np.zeros_like(u)
        case "metal":
            band = np.sin(2 * np.pi * (x + y) / 11.0)
            return light * (0.86 + 0.16 * band), 0.62 * np.clip(band, 0, 1) ** 2
        case "woolen":
            return light * (0.84 + 0.30 * np.sin(2 * np.pi * x / 5.4) * np.sin(2 * np.pi * y / 5.4)), np.zeros_like(u)
    raise ValueError(f"unknown material {material!r}")


def _text(text: str, x: Array, y: Array) -> Array:
    """Draw 1 where a glyph of `text` covers pixel (x, y) of the cell; glyph dots are 2.1 x 2.2 pixels large."""
    ink = np.zeros(x.shape)
    for place, glyph in enumerate(text):
        column = np.floor((x - 6.9 - place * 9.8) / 2.1).astype(int)
        row = np.floor((y - 8.2) / 2.2).astype(int)
        inside = (column >= 0) & (column < 4) & (row >= 0) & (row < 5)
        bits = np.array([[c == "#" for c in line] for line in GLYPHS[glyph]])
        ink[inside] = np.maximum(ink[inside], bits[row[inside], column[inside]])
    return ink


def _grid(size: int) -> tuple[Array, Array]:
    """x and y in pixels of the fine samples of a square of `size` pixels."""
    axis = (np.arange(size * FINE) + 0.5) / FINE
    y, x = np.meshgrid(axis, axis, indexing="ij")
    return x, y


def _average(samples: Array) -> Array:
    """Average the fine samples (..., H FINE, W FINE) of every pixel."""
    *rest, height, width = samples.shape
    return samples.reshape(*rest, height // FINE, FINE, width // FINE, FINE).mean(axis=(-3, -1))


def draw_item(item: Item) -> tuple[Array, Array]:
    """Draw an object alone: premultiplied colour (3, 32, 32) in [0, 1] and coverage (32, 32) in [0, 1]."""
    x, y = _grid(CELL)
    color, cover = np.zeros((3, *x.shape)), np.zeros(x.shape)
    for center_x, center_y, half in COPIES[item.count]:
        u, v = (x - center_x) / half, (y - center_y) / half
        for shape, fixed in SHAPES[item.kind]:
            distance = shape(u, v) * half
            inside = distance <= 0
            base = _flat(fixed or COLOR_RGB[item.color])
            factor, white = (1.0 - 0.16 * u, np.zeros_like(u)) if fixed else _material(item.material, x, y, u, v)
            paint = base * factor * (1 - white) + white
            if fixed is CREAM and item.text:
                ink = _text(item.text, x, y)
                paint = paint * (1 - ink) + _flat(DARK) * ink
            paint = np.where(distance > -OUTLINE, base * 0.38, paint)
            color, cover = np.where(inside, np.clip(paint, 0, 1), color), np.where(inside, 1.0, cover)
    return _average(color), _average(cover)


def _flat(color: Color) -> Array:
    return np.array(color)[:, None, None]


def _blend(low: Color, high: Color, amount: Array) -> Array:
    return _flat(low) * (1 - amount) + _flat(high) * amount


STARS = ((6, 5), (20, 30), (47, 31), (58, 7), (31, 48), (4, 45), (60, 52), (14, 60), (44, 60))  # centres (x, y)
TOWERS = ((0, 26, 12), (12, 16, 10), (24, 30, 13), (37, 12, 9), (46, 24, 18))  # left, top, width
Band = tuple[Any, Any]  # where (H, W), colour (3, H, W)


def _tower(x: Array, y: Array, left: int, top: int, width: int) -> list[Band]:
    walls = (x >= left) & (x < left + width) & (y > top) & (y < 52)
    windows = walls & ((x - left) % 5 > 2.6) & ((y - top) % 6 > 3.4)
    return [(walls, _flat((0.46, 0.48, 0.60))), (windows, _flat((0.66, 0.66, 0.70)))]


def _waves(x: Array, y: Array) -> Array:
    return np.sin(2 * np.pi * (x + 10 * np.sin(y / 14)) / 21)


BACKDROPS: dict[str, Callable[[Array, Array], list[Band]]] = {  # later bands are drawn over earlier ones
    "beach": lambda x, y: [
        (True, _blend((0.55, 0.80, 0.95), (0.85, 0.94, 0.98), y / IMAGE * 2)),
        (y > 30, _blend((0.15, 0.52, 0.72), (0.35, 0.72, 0.80), (y - 30) / 14)),
        (y > 44 + 1.5 * np.sin(x / 6), _blend((0.95, 0.86, 0.62), (0.86, 0.74, 0.50), (y - 44) / 20)),
    ],
    "meadow": lambda x, y: [
        (True, _blend((0.62, 0.84, 0.98), (0.90, 0.96, 0.98), y / IMAGE * 2)),
        (y > 34 + 4 * np.sin(x / 11), _blend((0.62, 0.82, 0.42), (0.50, 0.74, 0.34), y / IMAGE)),
        (y > 46 - 4 * np.sin(x / 13), _blend((0.50, 0.76, 0.34), (0.36, 0.62, 0.26), (y - 44) / 20)),
    ],
    "night": lambda x, y: [
        (True, _blend((0.05, 0.06, 0.20), (0.20, 0.16, 0.38), y / IMAGE)),
        (np.hypot(x - 32, y - 12) < 6.5, _flat((0.95, 0.93, 0.78))),
        *((np.hypot(x - star_x, y - star_y) < 1.3, 0.92) for star_x, star_y in STARS),
    ],
    "snow": lambda x, y: [
        (True, _blend((0.62, 0.74, 0.86), (0.80, 0.87, 0.93), y / IMAGE * 2)),
        (y > 14 + np.abs(x - 32) * 0.8, _blend((0.70, 0.76, 0.86), (0.86, 0.90, 0.95), y / IMAGE * 1.6)),
        (y > 42 + 2.5 * np.sin(x / 9), _blend((0.93, 0.96, 0.99), (0.82, 0.88, 0.95), (y - 42) / 22)),
    ],
    "desert": lambda x, y: [
        (True, _blend((0.99, 0.80, 0.52), (0.99, 0.90, 0.70), y / IMAGE * 2)),
        (y > 30 + 5 * np.sin(x / 10 + 1), _blend((0.86, 0.58, 0.32), (0.78, 0.50, 0.28), y / IMAGE)),
        (y > 46 + 5 * np.sin(x / 12 + 3), _blend((0.76, 0.48, 0.26), (0.66, 0.40, 0.22), (y - 44) / 20)),
    ],
    "city": lambda x, y: [
        (True, _blend((0.74, 0.70, 0.82), (0.96, 0.82, 0.78), y / IMAGE * 1.4)),
        *(band for tower in TOWERS for band in _tower(x, y, *tower)),
        (y > 52, _flat((0.36, 0.37, 0.42))),
    ],
    "sea": lambda x, y: [
        (True, _blend((0.30, 0.74, 0.82), (0.06, 0.34, 0.52), y / IMAGE) + 0.06 * _waves(x, y)),
    ],
    "kitchen": lambda x, y: [
        (True, _blend((0.98, 0.94, 0.84), (0.93, 0.86, 0.74), y / IMAGE * 1.5)),
        (y > 40, 0.62 + 0.20 * ((np.floor(x / 8) + np.floor(y / 8)) % 2) + _flat((0.02, 0.0, -0.04))),
    ],
}


def draw_background(name: str) -> Array:
    """Draw a background, (3, 64, 64) in [0, 1]."""
    x, y = _grid(IMAGE)
    picture = np.zeros((3, *x.shape))
    for inside, color in BACKDROPS[name](x, y):
        picture = np.where(inside, color, picture)
    return _average(np.clip(picture, 0, 1))
