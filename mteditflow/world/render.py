"""Scenes to pixels. An atlas holds every object once; a picture is four gathers and one blend."""

from functools import cache

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from mteditflow.pictures import from_uint8
from mteditflow.world.scenes import BACKGROUNDS, Item, Scene, all_items
from mteditflow.world.sprites import draw_background, draw_item


class Atlas:
    """Every object and background as tensors in [0, 1]; index 0 of the objects is the empty cell.

    colors (M, 3, 32, 32) premultiplied; covers (M, 32, 32); backgrounds (8, 3, 64, 64).
    """

    def __init__(self) -> None:
        self.items: list[Item | None] = [None, *all_items()]
        self._index = {item: i for i, item in enumerate(self.items)}
        drawn = [draw_item(item) for item in self.items if item]
        empty = (np.zeros_like(drawn[0][0]), np.zeros_like(drawn[0][1]))
        self.colors = torch.tensor(np.stack([color for color, _ in [empty, *drawn]]), dtype=torch.float32)
        self.covers = torch.tensor(np.stack([cover for _, cover in [empty, *drawn]]), dtype=torch.float32)
        self.backgrounds = torch.tensor(np.stack([draw_background(b) for b in BACKGROUNDS]), dtype=torch.float32)

    def rows(self, scenes: list[Scene]) -> Tensor:
        """Look up the objects in the four places of each scene, (N, 4) int64."""
        return torch.tensor([[self._index[item] for item in scene.cells] for scene in scenes])


@cache
def atlas() -> Atlas:
    """Draw the one atlas of the process, which takes about two seconds."""
    return Atlas()


def render(scenes: list[Scene]) -> Tensor:
    """Draw scenes: pictures (N, 3, 64, 64) in [-1, 1], rounded to 8 bit as a file would hold them."""
    backgrounds = torch.tensor([BACKGROUNDS.index(scene.background) for scene in scenes])
    return compose(atlas().rows(scenes), backgrounds)


def compose(items: Tensor, backgrounds: Tensor) -> Tensor:
    """`render` by rows of the atlas: objects `items` (N, 4) in front of `backgrounds` (N,)."""
    a = atlas()
    color = rearrange(a.colors[items], "n (y x) c h w -> n c (y h) (x w)", y=2)
    cover = rearrange(a.covers[items], "n (y x) h w -> n 1 (y h) (x w)", y=2)
    return from_uint8(((color + (1 - cover) * a.backgrounds[backgrounds]) * 255).round())
