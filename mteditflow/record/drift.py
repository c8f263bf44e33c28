"""How far a picture has drifted from its source, measured where no instruction has touched it.

Of a source x and an edit x', luma y and y', chroma u = x - y and u' = x' - y', and h = x - B x the fine detail of the
source (B is the binomial filter of world/drift.py), over the pixels that no instruction so far has touched,

    y' = a (y + s h_y) + b      contrast = a - 1, sharpness = s
    u' = g (u + s h_u) + c      saturation = g / a - 1; of the colour c that a grey pixel takes
                                cast = (c_red - c_blue) / 2, tint = c_green - (c_red + c_blue) / 2

by least squares; all are 0 for the source itself, and above 0 warmer, greener, harder, more colourful, sharper. They
invert `world.drift.drifted`, clipped pixels aside: its cast d is (d, d / 4) here, and its fade, saturation and blur d
are -d. Fine detail of the edit that the source does not have is grain, the standard deviation of as much white noise.

The fit is made NUM_FITS times, each time without the quarter of the pixels that it explained worst before: what an edit
has changed against its instruction, and all of what it was to change where nobody knows where that is. Grain leaves out
pixels with a neighbour, within B, that was touched. A source without contrast, colour or detail cannot show that it
loses them: RIDGE pulls what is not known to 0. All are cut to [-1, 1]: a picture that has nothing of its source left.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from mteditflow.types import Box, EditTask, Rollout
from mteditflow.world.drift import BINOMIAL, LUMA
from mteditflow.world.verify import untouched_pixels

KINDS = ("cast", "tint", "contrast", "saturation", "sharpness", "grain")
"""In the order of every array and table."""
BACKGROUND_CHANGE = "background_change"  # an edit type, the world's and EdiVal's
NUM_FITS, KEPT_SHARE = 3, 0.75
RIDGE, RIDGE_DETAIL = 1e-5, 1e-7  # variances, pixels being in [-1, 1]: of 8 bit they are known to 5e-6
NUM_PIXELS = 2048  # of a picture that are looked at, at most: every third of the miniature's
MIN_PIXELS = 24  # untouched ones of these: below, the drift is not known
KEPT_NOISE = 0.621  # variance of white noise in the KEPT_SHARE of the pixels that have least of it, in three colours
ROW = BINOMIAL.sum(1)  # B is its outer product
_CENTRE, REACH = BINOMIAL.max(), len(ROW) // 2
NOISE_GAIN = (KEPT_NOISE * (1 - _CENTRE) ** 2 + BINOMIAL.square().sum() - _CENTRE**2).sqrt().item()


def measure_drift(sources: Tensor, pictures: Tensor, untouched: Tensor) -> Tensor:
    """Measure the drift (N, 6), in the order of KINDS, of pictures (N, 3, H, W) in [-1, 1] from their sources, over the
    pixels where `untouched` (N, H, W) bool; NaN where these are too few, or a picture is not finite.

    One by one, each at the beginning of its memory: beside others the sums of a picture may have other bits.
    """
    one_by_one = zip(sources.split(1), pictures.split(1), untouched.split(1), strict=True)
    return torch.cat([_measure(_look_at(s.clone(), u.clone()), p.clone()) for s, p, u in one_by_one])


def measure_rollout(rollout: Rollout) -> Tensor:
    """Measure the drift (N, K, 6) of every turn of a rollout, on the host: a trajectory's turns together, which takes
    less time, but each trajectory by itself, for `measure_drift`'s reason.
    """
    device, num_turns = rollout.turns[0].image.device, len(rollout.turns)  # a session may have more
    seen = [
        _look_at(task.source[None].to(device), untouched_masks(task)[:num_turns].to(device)) for task in rollout.tasks
    ]
    drift = []
    for n, task in enumerate(rollout.group.tolist()):
        pictures = torch.stack([turn.image[n] for turn in rollout.turns])  # (K, 3, H, W)
        drift.append(_measure(seen[task], pictures).cpu())
    return torch.stack(drift)


def untouched_masks(task: EditTask) -> Tensor:
    """Mark the pixels of a task's source that no instruction up to a turn touches, (K, H, W) bool: the embedded world
    knows them; else they are outside the boxes of the objects that are touched or, once the background was changed,
    within those of the others. Of a task that knows neither (`knows_untouched`), the whole picture, as long as the
    background was not changed.
    """
    num_turns = len(task.instructions)
    if task.truth is not None:
        return torch.stack([untouched_pixels(task.truth, turn) for turn in range(num_turns)])
    whole = torch.ones(task.source.shape[-2:], dtype=torch.bool)
    masks = []
    for turn in range(num_turns):
        kept = task.untouched[turn] if knows_untouched(task) else task.objects
        is_changed = BACKGROUND_CHANGE in task.edit_types[: turn + 1]
        inside = _within([region.box for region in kept if region.box], whole.shape)
        touched = _within([region.box for region in task.objects if region.box and region not in kept], whole.shape)
        masks.append((inside if is_changed else whole) & ~touched)
    return torch.stack(masks)


def knows_untouched(task: EditTask) -> bool:
    """Say whether a task tells what no instruction touches: by its truth, or by objects with boxes."""
    return task.truth is not None or (bool(task.untouched) and any(region.box for region in task.objects))


def _within(boxes: list[Box], size: tuple[int, ...]) -> Tensor:
    """Mark the pixels whose centres lie within one of the boxes, (H, W) bool."""
    y, x = ((torch.arange(side) + 0.5) / side for side in size)
    mask = torch.zeros(size, dtype=torch.bool)
    for left, top, right, bottom in boxes:
        mask |= ((y >= top) & (y < bottom))[:, None] & ((x >= left) & (x < right))
    return mask


def _look_at(source: Tensor, untouched: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Take what is measured of a source (1, 3, H, W), and of N pictures of it the pixels that are `untouched`
    (N, H, W): colours and detail (1, 3, M), whether untouched and whether its neighbours are, too (N, M).
    """
    source, mask = source.float(), untouched[:, None].float()
    is_inner = 1 - _filter(1 - mask, torch.ones_like(ROW)).clamp(max=1)
    x, detail, weight, inner = _sample(source, source - _filter(source, ROW), mask, is_inner)
    return x, detail, weight[:, 0], inner[:, 0]


def _measure(seen: tuple[Tensor, Tensor, Tensor, Tensor], pictures: Tensor) -> Tensor:
    """Measure a few pictures (N, 3, H, W) of one source, (N, 6)."""
    x, detail, weight, inner = seen
    pictures = pictures.float()
    luma = _luma(pictures.flatten(2)).view_as(pictures[:, :1])
    edit, edit_detail = _sample(pictures, luma - _filter(luma, ROW))
    is_known = weight.sum(1) >= MIN_PIXELS
    (drift, missed), kept = _fit(x, detail, edit, weight), weight
    for _ in range(NUM_FITS - 1):
        kept = _keep_best(missed, weight)
        drift, missed = _fit(x, detail, edit, kept)
    weight = kept * inner
    grain = _grain(_luma(detail), edit_detail[:, 0], weight).masked_fill(weight.sum(1) < MIN_PIXELS, torch.nan)
    drift = torch.cat([drift, grain[:, None]], dim=1).clamp(-1, 1)
    return drift.masked_fill(~(is_known & pictures.flatten(1).isfinite().all(1))[:, None], torch.nan)


def _sample(*values: Tensor) -> Iterator[Tensor]:
    """Take every so many-th pixel of each (N, C, H, W), row after row: (N, C, M). An odd stride meets every place of a
    latent's 8 x 8 or 16 x 16 pixels.
    """
    stride = values[0][0, 0].numel() // NUM_PIXELS | 1
    for value in values:
        yield value.flatten(2)[..., stride // 2 :: stride].contiguous()


def _filter(pictures: Tensor, row: Tensor) -> Tensor:
    """Filter pictures (N, C, H, W) by a row of weights, along the rows and along the columns."""
    row, channels = row.to(pictures), pictures.shape[1]
    across, down = (row.view(1, 1, *shape).expand(channels, 1, *shape) for shape in ((1, len(row)), (len(row), 1)))
    padded = pad(pictures, (REACH,) * 4, mode="replicate")
    return conv2d(conv2d(padded, across, groups=channels), down, groups=channels)


def _luma(pixels: Tensor) -> Tensor:
    """Weigh the colours of pixels (N, 3, M): (N, M)."""
    return (LUMA.to(pixels)[:, None] * pixels).sum(1)


def _fit(x: Tensor, detail: Tensor, edit: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Fit the drift but for its grain, (N, 5), to pixels (N, 3, M) by weighted least squares; also returns the squared
    error of each pixel, (N, M).
    """
    weight = weight / weight.sum(1, keepdim=True).clamp(min=1e-12)

    def mean(values: Tensor) -> Tensor:
        return (values * (weight if values.ndim == 2 else weight[:, None])).sum(-1, keepdim=True)

    y, h, change = (v - mean(v) for v in (_luma(x), _luma(detail), _luma(edit - x)))  # (N, M)
    yy, hh, yh, yd, hd = (mean(p * q) for p, q in ((y, y), (h, h), (y, h), (y, change), (h, change)))  # (N, 1)
    yy, hh = yy + RIDGE, hh + RIDGE_DETAIL
    contrast, on_detail = (hh * yd - yh * hd) / (yy * hh - yh * yh), (yy * hd - yh * yd) / (yy * hh - yh * yh)
    gain = (1 + contrast).clamp(min=0.1)
    sharpness = on_detail / gain

    as_sharp = x + sharpness[..., None] * detail
    before, after = (v - _luma(v)[:, None] for v in (as_sharp, edit))  # chroma (N, 3, M)
    u, shift = before - mean(before), after - before
    moved = shift - mean(shift)
    slope = mean(u * moved).sum(1) / (mean(u * u).sum(1) + RIDGE)  # (N, 1)
    colour = (mean(shift) - slope[:, None] * mean(before))[..., 0]  # (N, 3)
    red, green, blue = colour.unbind(1)

    missed = (change - contrast * y - on_detail * h)[:, None] + moved - slope[:, None] * u
    columns = ((red - blue) / 2, green - (red + blue) / 2, contrast[:, 0], ((1 + slope) / gain - 1)[:, 0],
               sharpness[:, 0])  # fmt: skip
    return torch.stack(columns, dim=1), missed.square().sum(1)


def _keep_best(missed: Tensor, weight: Tensor) -> Tensor:
    """Take the weight (N, M) of the pixels that were missed most, a quarter of all weight."""
    order = missed.masked_fill(weight == 0, torch.inf).argsort(dim=1)
    total = weight.gather(1, order).cumsum(1)
    is_kept = (total <= KEPT_SHARE * total[:, -1:]).to(weight)
    return weight * torch.zeros_like(weight).scatter(1, order, is_kept)


def _grain(detail: Tensor, edit: Tensor, weight: Tensor) -> Tensor:
    """Measure the fine detail (N, M) of edits beside their sources': (N,), as the white noise that has as much."""
    weight = weight / weight.sum(1, keepdim=True).clamp(min=1e-12)
    both, alone = ((weight * detail * value).sum(1, keepdim=True) for value in (edit, detail))
    rest = edit - both / (alone + RIDGE_DETAIL) * detail
    return (weight * rest.square()).sum(1).sqrt() / NOISE_GAIN
