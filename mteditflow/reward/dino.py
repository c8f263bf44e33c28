"""Content consistency (EdiVal-Agent, arXiv 2509.13399), by the features of a DINOv2 or DINOv3.

    c_k = 1/2 (background + mean over the untouched objects),  each a cosine between I_k and I_0 at the same place

- Background: the patch tokens of the whole picture, each of norm 1, averaged with weights w_j: the share of patch j
  that lies outside all boxes of objects, 0 where it is below 1/2. The cosine of the two averages.
- Object: its box cut out of both pictures and brought to the model's size. Half the cosine of the [CLS] tokens, half
  that of the mean patch tokens.
- Once a turn has changed the background (edit type background_change), from that turn on c_k is the objects' part
  alone. Where one part is undefined c_k is the other; where both are, NaN.

This is what EdiVal's public evaluator does, but for these points, which are ours. It finds boxes in both pictures by a
detector; here they come with the task (`EditTask.objects`, `untouched`) and are those of the source, so that what an
instruction adds counts as background. Where no box is known the background is the whole picture. The [CLS] token is
followed by DINOv3's registers, which say nothing of a place and are dropped; the evaluator takes them for patches, and
so lays its weights over a grid of another shape (10 x 20 for 14 x 14). `is_edival_compat` does so too, for our boxes.
Negative cosines count as 0. A DINOv2 sees the whole picture, not the middle crop of its own preparation.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, cosine_similarity, interpolate, normalize
from transformers import AutoModel
from transformers.image_processing_base import ImageProcessingMixin
from transformers.utils.logging import disable_progress_bar

from mteditflow.config.errors import first_line
from mteditflow.record.drift import BACKGROUND_CHANGE
from mteditflow.types import Box, EditTask, Rollout, Score

FAMILIES = ("dinov2", "dinov2_with_registers", "dinov3_vit")
INTERPOLATION = {2: "bilinear", 3: "bicubic"}  # PIL's numbers, in which a preprocessor's file speaks
MICROBATCH_SIZE = 8  # pictures per forward pass: a wave of two trajectories and three turns has one that is full
Look = tuple[Tensor, Box | None, Tensor]
"""A picture (3, H, W), the box of it that is looked at or None for all of it, and its background's weights (T,)."""


class DinoConsistency:
    """The features' model, resident on its device in float32. ValueError: it is none that can be had."""

    is_remote = False

    def __init__(self, path: str, device: torch.device, *, is_edival_compat: bool = False) -> None:
        self.device = device
        self.model, preparation = _load(path)
        self.model.requires_grad_(False).eval().to(device)
        size = preparation["crop_size" if preparation.get("do_center_crop") else "size"]
        self.size = (int(size["height"]), int(size["width"]))
        self.mode = INTERPOLATION[preparation.get("resample", 2)]
        self.mean, self.std = (
            torch.tensor(preparation[name], device=device)[:, None, None] for name in ("image_mean", "image_std")
        )
        patch, num_registers = self.model.config.patch_size, getattr(self.model.config, "num_register_tokens", 0)
        self.grid = (self.size[0] // patch, self.size[1] // patch)
        self.num_skipped = 1 + num_registers  # tokens before the patches
        if is_edival_compat:
            self.grid = nearest_grid(num_registers + self.grid[0] * self.grid[1], self.size[0] / self.size[1])
            self.num_skipped = 1

    def __call__(self, rollout: Rollout) -> Score:
        """Consistency (N, K)."""
        return Score(values=self.score(rollout.tasks, rollout.group, rollout.pictures.nan_to_num()))

    @torch.inference_mode()
    def score(self, tasks: Sequence[EditTask], group: Tensor, pictures: Tensor) -> Tensor:
        """c (N, K) in [0, 1] on the host, NaN where undefined, of pictures (K, N, 3, H, W) in [-1, 1]; row n is of
        tasks[group[n]]. The bits of a row do not depend on the others.
        """
        num_turns, num_rows = pictures.shape[:2]
        places = group.tolist() * num_turns  # of the edits' tasks; edits go turn by turn
        sources = {g: tasks[g].source.to(self.device) for g in dict.fromkeys(places)}
        edits = pictures.to(self.device).flatten(0, 1)  # (K N, 3, H, W)
        weights = {g: background_weights(boxes(tasks[g]), self.size, self.grid) for g in sources}
        is_seen = {g: bool(weight.any()) for g, weight in weights.items()}
        weights = {g: weight.to(self.device) for g, weight in weights.items()}
        objects = [(e, g, box) for e, g in enumerate(places) for box in _untouched_boxes(tasks[g], e // num_rows)]
        of_source = {pair: i for i, pair in enumerate(dict.fromkeys((g, box) for _, g, box in objects))}
        looks: list[Look] = [(source, None, weights[g]) for g, source in sources.items()]
        looks += [(edit, None, weights[g]) for edit, g in zip(edits, places, strict=True)]
        looks += [(sources[g], box, weights[g]) for g, box in of_source]
        looks += [(edits[e], box, weights[g]) for e, g, box in objects]
        numbers = [len(sources), len(edits), len(of_source), len(objects)]
        cls, texture, background = (found.split(numbers) for found in self._features(looks))

        is_lost = [_is_background_changed(tasks[g], e // num_rows) or not is_seen[g] for e, g in enumerate(places)]
        first = {g: i for i, g in enumerate(sources)}
        behind = cosine_similarity(background[0][[first[g] for g in places]], background[1], dim=1)  # (K N,)
        behind = behind.masked_fill(torch.tensor(is_lost), torch.nan)

        match = [of_source[g, box] for _, g, box in objects]
        alike = [cosine_similarity(tokens[2][match], tokens[3], dim=1) for tokens in (cls, texture)]
        alike, row = torch.stack(alike).mean(0), torch.tensor([e for e, *_ in objects], dtype=torch.int64)
        total, count = (torch.zeros(len(edits)).index_add(0, row, v) for v in (alike, torch.ones_like(alike)))
        return torch.stack([behind, total / count]).nanmean(0).clamp(0, 1).reshape(num_turns, num_rows).T

    def _prepare(self, picture: Tensor, box: Box | None = None) -> Tensor:
        """A picture (3, H, W) in [-1, 1], or a box of it, as the model wants it: (3, h, w)."""
        if box:
            height, width = picture.shape[-2:]
            left, top = min(int(box[0] * width), width - 1), min(int(box[1] * height), height - 1)
            right, bottom = max(left + 1, int(box[2] * width)), max(top + 1, int(box[3] * height))
            picture = picture[:, top:bottom, left:right]
        share = (picture.float() + 1) / 2
        return (interpolate(share[None], self.size, mode=self.mode, antialias=True)[0] - self.mean) / self.std

    def _features(self, looks: Sequence[Look]) -> tuple[Tensor, Tensor, Tensor]:
        """[CLS], mean patch, and background, (M, D) each on the host: always computed for MICROBATCH_SIZE looks at a
        time, since a GPU orders the terms of its sums by the number of rows.
        """
        parts = []
        for start in range(0, len(looks), MICROBATCH_SIZE):
            chunk = [looks[min(i, len(looks) - 1)] for i in range(start, start + MICROBATCH_SIZE)]
            prepared = torch.stack([self._prepare(picture, box) for picture, box, _ in chunk])
            tokens = self.model(pixel_values=prepared).last_hidden_state
            patches = tokens[:, self.num_skipped :]
            background = _mean_patch(patches, torch.stack([weights for *_, weights in chunk]))
            parts.append(torch.stack([tokens[:, 0], patches.mean(1), background]))
        cls, texture, background = torch.cat(parts, dim=1)[:, : len(looks)].cpu()
        return cls, texture, background


def _untouched_boxes(task: EditTask, turn: int) -> list[Box]:
    """The known boxes of what no instruction up to a turn touches."""
    return [region.box for regions in task.untouched[turn : turn + 1] for region in regions if region.box]


def _is_background_changed(task: EditTask, turn: int) -> bool:
    return BACKGROUND_CHANGE in task.edit_types[: turn + 1]


def boxes(task: EditTask) -> list[Box]:
    """Every known box of an object of the task's source."""
    regions = [*task.objects, *(region for turn in task.untouched for region in turn)]
    return list(dict.fromkeys(region.box for region in regions if region.box))


def background_weights(boxes: Sequence[Box], size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """w (T,) of the patches of a grid (rows, columns), by row: the share of a patch's pixels whose centres lie outside
    all boxes, 0 where it is below 1/2. `size`: height and width of the picture in pixels.
    """
    y, x = ((torch.arange(side) + 0.5) / side for side in size)
    outside = torch.ones(size)
    for left, top, right, bottom in boxes:
        outside[((y >= top) & (y < bottom))[:, None] & ((x >= left) & (x < right))] = 0
    share = adaptive_avg_pool2d(outside[None], grid).flatten()
    return share.masked_fill(share < 0.5, 0)


def nearest_grid(num_tokens: int, aspect: float) -> tuple[int, int]:
    """The rows x columns of so many tokens that come nearest to height / width `aspect`."""
    rows = [count for count in range(1, num_tokens + 1) if num_tokens % count == 0]
    return min(((count, num_tokens // count) for count in rows), key=lambda grid: abs(grid[0] / grid[1] - aspect))


def _mean_patch(patches: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean (M, D) of the normed patch tokens (M, T, D); 0 where no patch has weight."""
    total = (normalize(patches, dim=-1) * weights[..., None]).sum(1)
    return total / weights.sum(1, keepdim=True).clamp(min=1e-6)


def _load(path: str) -> tuple[Any, dict[str, Any]]:
    """Model and preparation of a folder or a hub name."""
    name = f"reward.consistency {path!r}"
    disable_progress_bar()  # the run has its own
    try:
        preparation = ImageProcessingMixin.get_image_processor_dict(path)[0]
        model = AutoModel.from_pretrained(path, dtype=torch.float32, trust_remote_code=False)  # nor asked about
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name} cannot be loaded ({first_line(error)}): give the folder or hub name of a DINOv2 or DINOv3; "
            "DINOv3 is gated: accept its licence there and log in (hf auth login), or take facebook/dinov2-small"
        ) from error
    if model.config.model_type not in FAMILIES:
        raise ValueError(f"{name} is a {model.config.model_type}: must be one of {', '.join(FAMILIES)}")
    return model, preparation
