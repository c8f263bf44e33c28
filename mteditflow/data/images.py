"""Users' pictures: from a file or bytes to a float tensor at the size of the model.

A picture is turned as its EXIF says, brought to 8 bits and from its own colour space to sRGB, flattened on white,
cropped or stretched to the model's shape, and resized by Lanczos with antialiasing, in this order: transparent pixels
have colours of their own, which resizing would mix in.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageCms, ImageOps
from torch import Tensor

from mteditflow.pictures import from_pil
from mteditflow.types import Box, Region

Fit = Literal["crop", "stretch"]

MIN_VISIBLE = 0.5  # of an object's box: what a crop leaves less of cannot be compared
HEIF = (".heic", ".heif")
SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jfif", ".jpe", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".gif", ".jp2", ".ppm"),
    *HEIF,
)
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")
HEIF_REMEDY = "is HEIC: install pillow-heif (pip install 'mteditflow[data]'), or save it as JPEG"
ORIENTATION = 0x0112  # EXIF's
DEPTHS = (8, 10, 12, 14, 16, 24, 32)  # bits of a grey value that cameras and scanners use
DARK = 63  # of 255: the brightest pixel of a file of 16 bits of which 14 are used


class PictureError(ValueError):
    """A picture that is whole, and cannot be shown as it is meant."""


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A picture at the model's size, (3, H, W) in [-1, 1], the part of the original that it shows, and the original's
    width and height.
    """

    image: Tensor
    frame: Box
    size: tuple[int, int]


def read_size(source: Path | bytes) -> tuple[int, int]:
    """Read width and height as shown, from the header alone. ValueError as `read_picture`."""
    with _open(source) as picture:
        is_on_its_side = picture.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
        return (picture.height, picture.width) if is_on_its_side else picture.size


def is_turned(source: Path | bytes) -> bool:
    """Say whether a picture is shown in another way than it is stored, by its EXIF. ValueError as `read_picture`."""
    with _open(source) as picture:
        return picture.getexif().get(ORIENTATION, 1) in range(2, 9)


def read_picture(source: Path | bytes) -> Image.Image:
    """Read a picture as 8-bit sRGB, as it is meant to be seen. ValueError in one line where it cannot be read."""
    with _open(source) as picture:
        stored = str(getattr(picture, "tile", ""))
        picture.load()
        _check_depth(picture, stored)
        return to_rgb(ImageOps.exif_transpose(picture))


@contextmanager
def _open(source: Path | bytes) -> Iterator[Image.Image]:
    """Read a picture's header; damage found in it or later is a ValueError in one line."""
    is_heif = _is_heif(source) and not _can_read_heif()
    try:
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as picture:
            yield picture
    except PictureError:
        raise
    except FileNotFoundError:
        raise ValueError("no such file") from None
    except Image.UnidentifiedImageError:
        unknown = "no picture in a format that pillow knows: save it as PNG or JPEG"
        raise ValueError(HEIF_REMEDY if is_heif else unknown) from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"too large: {error}") from None
    except Exception as error:  # pillow's decoders raise whatever the damage leads them to
        raise ValueError(f"damaged: {' '.join(str(error).split()) or type(error).__name__}") from None


def _is_heif(source: Path | bytes) -> bool:
    """Say whether a file begins as a picture of a phone does that pillow alone cannot read."""
    try:
        with BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
            head = file.read(12)
    except OSError:
        return False
    return head[4:8] == b"ftyp" and head[8:12] in HEIF_BRANDS


@cache
def _can_read_heif() -> bool:
    """Teach pillow HEIC where pillow-heif is installed; say whether it is."""
    try:
        import_module("pillow_heif").register_heif_opener()
    except ModuleNotFoundError:
        return False
    return True


def to_rgb(picture: Image.Image) -> Image.Image:
    """Convert a picture from any of pillow's modes to 8-bit sRGB; what is transparent becomes white."""
    profile, alpha = picture.info.get("icc_profile"), None
    if picture.mode == "F":
        raise PictureError("pixels are floating-point numbers: save it with 8 or 16 bits")
    if picture.mode == "I" or picture.mode.startswith("I;16"):  # pillow itself would cut at 255
        picture = Image.fromarray(_to_8_bits(np.asarray(picture)))
    elif picture.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in picture.info:
        alpha = picture.convert("RGBA").getchannel("A")
        picture = picture.convert("L") if picture.mode == "LA" else picture.convert("RGBA").convert("RGB")
    colours = _to_srgb(picture if picture.mode in ("L", "CMYK") else picture.convert("RGB"), profile).convert("RGB")
    if alpha is None:
        return colours
    colours.putalpha(alpha)
    return Image.alpha_composite(Image.new("RGBA", colours.size, "white"), colours).convert("RGB")


def _to_8_bits(values: np.ndarray) -> np.ndarray:
    """Bring whole numbers to 8 bits, from the smallest usual depth that holds them: a scanner's or camera's 12 bits in
    a file of 16 or 32 would else be black.
    """
    grey = values.astype(np.int64)
    if grey.min() < 0:
        raise PictureError("pixels are negative numbers: save it with 8 or 16 bits")
    top = next(2**bits - 1 for bits in DEPTHS if grey.max() < 2**bits)
    return ((grey * 255 + top // 2) // top).astype(np.uint8)


def _to_srgb(picture: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert colours from those of an ICC profile to sRGB; a profile that cannot be followed is passed over, as
    browsers do.
    """
    if not profile:
        return picture
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(source).lower():
            return picture
        return ImageCms.profileToProfile(picture, source, ImageCms.createProfile("sRGB"), outputMode="RGB") or picture
    except (ImageCms.PyCMSError, OSError, ValueError):
        return picture


def _check_depth(picture: Image.Image, stored: str) -> None:
    """Raise ValueError for colours of fewer than 16 bits in a file of 16: pillow keeps the upper 8 of them, which are
    black. stored: how the file holds pixels, as pillow's decoders are told.
    """
    if ";16" not in stored or picture.mode not in ("RGB", "RGBA", "LA"):
        return
    bands = picture.getbands()[: -1 if picture.mode.endswith("A") else None]
    brightest = max(np.asarray(picture.getchannel(band)).max() for band in bands)
    if brightest <= DARK:
        raise PictureError("has 16 bits for a colour and uses at most 14 of them: save it with 8 bits")


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
    return Fitted(image=from_pil(small), frame=frame, size=picture.size)


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
