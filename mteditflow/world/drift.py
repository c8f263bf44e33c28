"""Drift: the small changes of a whole picture that nobody minds once and that grow where a model edits its own output.

A picture x in [-1, 1] with a drift d = (cast, fade, saturation, blur), AXES' order, none of them where all are 0:

    x + d_blur (B x - x)          B a 9 x 9 binomial filter; below 0 sharpened
    y + (1 - d_saturation) (x - y)  y the luma; below 0 more colourful
    (1 - d_fade) x                towards mid grey; below 0 harder
    x + d_cast (1, 1/4, -1)       warm; below 0 cold

in this order, clipped to [-1, 1].
"""

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

AXES = ("cast", "fade", "saturation", "blur")
CAST = torch.tensor([1.0, 0.25, -1.0])
LUMA = torch.tensor([0.299, 0.587, 0.114])
_ROW = torch.tensor([1.0, 8.0, 28.0, 56.0, 70.0, 56.0, 28.0, 8.0, 1.0]) / 256
BINOMIAL = torch.outer(_ROW, _ROW)


def blurred(pictures: Tensor) -> Tensor:
    """Filter pictures (N, 3, H, W) with the binomial."""
    return conv2d(pad(pictures, (4, 4, 4, 4), mode="replicate"), BINOMIAL.expand(3, 1, 9, 9), groups=3)


def drifted(pictures: Tensor, drift: Tensor) -> Tensor:
    """Give pictures (N, 3, H, W) in [-1, 1] the drift (N, 4)."""
    cast, fade, saturation, blur = drift[:, :, None, None, None].unbind(1)  # (N, 1, 1, 1) each
    pictures = pictures + blur * (blurred(pictures) - pictures)
    luma = (LUMA[:, None, None] * pictures).sum(1, keepdim=True)
    pictures = (1 - fade) * (luma + (1 - saturation) * (pictures - luma))
    return (pictures + cast * CAST[:, None, None]).clamp(-1, 1)
