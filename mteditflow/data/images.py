"""Users' pictures: from a file or bytes to a float tensor at the size of the model.

A picture is turned as its EXIF says, flattened on white, brought to 8-bit RGB, cropped or stretched to the model's
shape, and resized by Lanczos with antialiasing, in this order: transparent pixels have colours of their own, which
resizing would mix in.
"""

import math
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor

from mteditflow.pictures import from_pil
from mteditflow.types import Box, Region

Fit = Literal["crop", "stretch"]

MIN_VISIBLE = 0.5  # of an object's box: what a crop leaves less of cannot be compared
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error)  # what pillow raises


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A picture at the model's size, (3, H, W) in [-1, 1], and the part of the original that it shows."""

    image: Tensor
    frame: Box


def read_size(source: Path | bytes) -> tuple[int, int]:
    """Read width and height as shown, from the header alone. ValueError as `read_picture`."""
    with _open(source) as picture:
        is_turned = picture.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # EXIF's Orientation: on its side
        return (picture.height, picture.width) if is_turned else picture.size


def read_picture(source: Path | bytes) -> Image.Image:
    """Read a picture as 8-bit RGB, as it is meant to be seen. ValueError in one line where it cannot be read."""
    with _open(source) as picture:
        picture.load()
        return to_rgb(ImageOps.exif_transpose(picture))


@contextmanager
def _open(source: Path | bytes) -> Iterator[Image.Image]:
    """Read a picture's header; damage found in it or later is a ValueError in one line."""
    try:
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as picture:
            yield picture
    except FileNotFoundError:
        raise ValueError("no such file") from None
    except Image.UnidentifiedImageError:
        raise ValueError("no picture in a format that pillow knows") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"too large: {error}") from None
    except _DAMAGE as error:
        raise ValueError(f"damaged: {' '.join(str(error).split()) or type(error).__name__}") from None


def to_rgb(picture: Image.Image) -> Image.Image:
    """Convert a picture from any of pillow's modes to 8-bit RGB; what is transparent becomes white."""
    if picture.mode == "F":
        raise ValueError("pixels are floating-point numbers: save it with 8 or 16 bits")
    if picture.mode == "I" or picture.mode.startswith("I;16"):  # pillow itself would cut at 255
        grey = np.asarray(picture).astype(np.int64).clip(0, 2**16 - 1)
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    if picture.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in picture.info:
        rgba = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return picture.convert("RGB")


def frame_of(size: tuple[int, int], *, height: int, width: int, fit: Fit) -> Box:
    """Choose the part of a picture of `size` (width, height) that is shown: all of it, or the largest centred part with
    the aspect ratio of width : height.
    """
    if fit == "stretch":
        return (0.0, 0.0, 1.0, 1.0)
    scale = max(width / size[0], height / size[1])
    x = max(0.0, (1 - width / scale / size[0]) / 2)
    y = max(0.0, (1 - height / scale / size[1]) / 2)
    return (x, y, 1 - x, 1 - y)


def nearest_size(size: tuple[int, int], sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Choose the (height, width) whose aspect is nearest, by ratio, to that of a picture of `size` (width, height)."""
    return min(sizes, key=lambda one: abs(math.log(size[0] / size[1] * one[0] / one[1])))


def fit_picture(picture: Image.Image, *, height: int, width: int, fit: Fit) -> Fitted:
    """Bring an RGB picture to the model's size."""
    frame = frame_of(picture.size, height=height, width=width, fit=fit)
    left, top, right, bottom = frame
    box = (left * picture.width, top * picture.height, right * picture.width, bottom * picture.height)
    small = picture.resize((width, height), Image.Resampling.LANCZOS, box=box)
    return Fitted(image=from_pil(small), frame=frame)


def crop_region(region: Region, frame: Box) -> Region | None:
    """Express a region in shares of the frame; None where less than MIN_VISIBLE of its box is inside it."""
    if region.box is None:
        return region
    left, top, right, bottom = region.box
    x0, y0, x1, y1 = frame
    inner = (max(left, x0), max(top, y0), min(right, x1), min(bottom, y1))
    visible = max(0.0, inner[2] - inner[0]) * max(0.0, inner[3] - inner[1])
    if visible < MIN_VISIBLE * (right - left) * (bottom - top):
        return None
    w, h = x1 - x0, y1 - y0
    box = ((inner[0] - x0) / w, (inner[1] - y0) / h, (inner[2] - x0) / w, (inner[3] - y0) / h)
    return Region(name=region.name, box=box)
