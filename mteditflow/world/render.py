"""Scenes to pixels. An atlas holds every object once; a picture is four gathers and one blend."""

from functools import cache

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from mteditflow.world.scenes import BACKGROUNDS, Item, Scene, all_items
from mteditflow.world.sprites import draw_background, draw_item


class Atlas:
    """Every object and background as tensors in [0, 1]; index 0 of the objects is the empty cell.

    colors (M, 3, 32, 32) premultiplied; covers (M, 32, 32); backgrounds (8, 3, 64, 64).
    """

    def __init__(self) -> None:
        self.items: list[Item | None] = [None, *all_items()]
        self.index = {item: i for i, item in enumerate(self.items)}
        drawn = [draw_item(item) for item in self.items if item]
        empty = (np.zeros_like(drawn[0][0]), np.zeros_like(drawn[0][1]))
        self.colors = torch.tensor(np.stack([color for color, _ in [empty, *drawn]]), dtype=torch.float32)
        self.covers = torch.tensor(np.stack([cover for _, cover in [empty, *drawn]]), dtype=torch.float32)
        self.backgrounds = torch.tensor(np.stack([draw_background(b) for b in BACKGROUNDS]), dtype=torch.float32)


@cache
def atlas() -> Atlas:
    """The one atlas of the process; drawing it takes about two seconds."""
    return Atlas()


def render(scenes: list[Scene]) -> Tensor:
    """Pictures of scenes: (N, 3, 64, 64) in [-1, 1], rounded to 8 bit as a file would hold them."""
    a = atlas()
    index = torch.tensor([[a.index[item] for item in scene.cells] for scene in scenes])  # (N, 4)
    behind = a.backgrounds[[BACKGROUNDS.index(scene.background) for scene in scenes]]  # (N, 3, 64, 64)
    color = rearrange(a.colors[index], "n (y x) c h w -> n c (y h) (x w)", y=2)
    cover = rearrange(a.covers[index], "n (y x) h w -> n 1 (y h) (x w)", y=2)
    return ((color + (1 - cover) * behind) * 255).round() / 127.5 - 1
