"""Pictures between tensors and files: 8 bits, PIL, PNG. A tensor has its pixels in [-1, 1]."""

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def to_uint8(images: Tensor) -> Tensor:
    """The bytes that a picture file holds of images (..., H, W) in [-1, 1], clamped; of any device and shape."""
    return ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def from_uint8(pixels: Tensor) -> Tensor:
    """Bytes as float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def round_to_8_bit(images: Tensor) -> Tensor:
    """`from_uint8(to_uint8(images))` of images in [-1, 1], but NaN stays NaN."""
    return ((images + 1) * 127.5).round() / 127.5 - 1


def to_pil(pixels: Tensor) -> Image.Image:
    """A picture (3, H, W) as PIL has it: of bytes, or of numbers in [-1, 1]."""
    pixels = pixels if pixels.dtype == torch.uint8 else to_uint8(pixels)
    return Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).cpu().numpy()))


def from_pil(picture: Image.Image) -> Tensor:
    """An RGB picture as float32 (3, H, W) in [-1, 1]."""
    return from_uint8(torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1))


def png_bytes(picture: Image.Image, *, is_small: bool = False) -> bytes:
    """A PNG file; is_small: as few bytes as can be, slowly, else fast."""
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True) if is_small else picture.save(file, "PNG", compress_level=1)
    return file.getvalue()
