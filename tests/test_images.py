"""Users' pictures, on real photographs: turned, flattened, brought to RGB, cropped, resized; damage is one line."""

import struct
import zlib
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from photos import photo
from PIL import Image, ImageCms

from mteditflow.data.images import Fit, crop_region, fit_picture, frame_of, read_picture, read_size, to_rgb
from mteditflow.types import Region


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(int)


TURNS = {  # EXIF orientation: how the stored picture is made of the shown one
    2: [Image.Transpose.FLIP_LEFT_RIGHT],
    3: [Image.Transpose.ROTATE_180],
    4: [Image.Transpose.FLIP_TOP_BOTTOM],
    5: [Image.Transpose.TRANSPOSE],
    6: [Image.Transpose.ROTATE_90],
    7: [Image.Transpose.TRANSVERSE],
    8: [Image.Transpose.ROTATE_270],
}


@pytest.mark.parametrize("orientation", TURNS)
def test_exif_orientation(orientation: int, tmp_path: Path) -> None:
    shown = Image.open(photo("chelsea.png")).convert("RGB")
    stored = shown
    for turn in TURNS[orientation]:
        stored = stored.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(pixels(read_picture(tmp_path / "turned.png")), pixels(shown))
    assert read_size(tmp_path / "turned.png") == shown.size == (451, 300)


def test_alpha_is_flattened_on_white() -> None:
    """c alpha / 255 + 255 (1 - alpha / 255), within pillow's rounding; fully transparent is white."""
    rgba = Image.open(photo("horse.png"))
    assert rgba.mode == "RGBA"
    color, alpha = pixels(rgba)[..., :3], pixels(rgba)[..., 3:] / 255
    flat = pixels(read_picture(photo("horse.png")))
    assert np.abs(flat - (color * alpha + 255 * (1 - alpha))).max() <= 1
    half = Image.open(photo("coffee.png")).convert("RGBA")
    half.putalpha(128)
    expected = pixels(half)[..., :3] * (128 / 255) + 255 * (127 / 255)
    assert np.abs(pixels(to_rgb(half)) - expected).max() <= 1
    half.putalpha(0)
    assert (pixels(to_rgb(half)) == 255).all()


def test_grey_palette_16_bits_and_other_modes() -> None:
    coins = Image.open(photo("coins.png"))
    assert coins.mode == "L" and (pixels(to_rgb(coins)) == pixels(coins)[..., None]).all()
    deep = Image.fromarray((pixels(coins) * 257).astype(np.uint16))
    assert deep.mode == "I;16" and (pixels(to_rgb(deep)) == pixels(coins)[..., None]).all()
    wide = Image.fromarray((pixels(coins) * 257).astype(np.int32))
    assert wide.mode == "I" and (pixels(to_rgb(wide)) == pixels(coins)[..., None]).all()

    flower = Image.open(photo("flower.jpg")).convert("RGB")
    palette = flower.quantize(64)
    assert palette.mode == "P" and np.array_equal(pixels(to_rgb(palette)), pixels(palette.convert("RGB")))
    assert np.abs(pixels(to_rgb(palette)) - pixels(flower)).mean() < 8  # 64 colours of this picture
    buffer = BytesIO()
    palette.save(buffer, "PNG", transparency=int(pixels(palette)[0, 0]))
    clear = pixels(read_picture(buffer.getvalue()))
    is_clear = pixels(palette) == pixels(palette)[0, 0]
    assert (clear[is_clear] == 255).all() and np.array_equal(
        clear[~is_clear], pixels(palette.convert("RGB"))[~is_clear]
    )

    for mode in ("CMYK", "YCbCr", "LA", "1"):
        assert to_rgb(flower.convert("L" if mode == "LA" else "RGB").convert(mode)).mode == "RGB"
    with pytest.raises(ValueError, match="floating-point"):
        to_rgb(flower.convert("F"))


def saved(picture: Image.Image, form: str, **options: object) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16, 24])
@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_grey_of_any_depth_is_as_bright(bits: int, form: str) -> None:
    """Scanners' and cameras' bits, in files of 16 and 32: within half of one of 255 steps of what was meant."""
    coins = pixels(Image.open(photo("coins.png")))
    coins = (coins - coins.min()) / (coins.max() - coins.min())
    values = (coins * (2**bits - 1)).round()
    if form == "TIFF" or bits <= 16:
        deep = values.astype(np.int32 if form == "TIFF" else np.uint16)
        shown = pixels(read_picture(saved(Image.fromarray(deep), form)))
        assert np.abs(shown - coins[..., None] * 255).max() <= 0.5 + 255 / 2**bits
    with pytest.raises(ValueError, match="pixels are negative numbers"):
        read_picture(saved(Image.fromarray((values - 5).astype(np.int32)), "TIFF"))


def png_of_16_bits(colours: np.ndarray) -> bytes:
    """A PNG (H, W, 3) of uint16, which pillow reads and does not write."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in colours)
    height, width, _ = colours.shape

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_colours_of_16_bits() -> None:
    """Pillow keeps the upper 8 bits: where they are empty, the picture would be black, and the remedy is said."""
    flower = pixels(Image.open(photo("flower.jpg")).convert("RGB"))[:40, :60]
    flower[0, 0] = 255
    assert np.abs(pixels(read_picture(png_of_16_bits(flower * 257))) - flower).max() == 0
    for bits in (8, 12, 14):
        with pytest.raises(ValueError, match="has 16 bits for a colour and uses at most 14 of them"):
            read_picture(png_of_16_bits(flower * (2**bits - 1) // 255))


def test_icc_profiles_are_followed() -> None:
    """A profile whose red and blue are those of sRGB exchanged: red pixels are blue."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = srgb.replace(b"rXYZ", b"?XYZ").replace(b"bXYZ", b"rXYZ").replace(b"?XYZ", b"bXYZ")
    assert swapped != srgb
    named = swapped.replace("sRGB".encode("utf-16-be"), "else".encode("utf-16-be"))
    flower = Image.open(photo("flower.jpg")).convert("RGB").resize((60, 40))
    shown = pixels(read_picture(saved(flower, "PNG", icc_profile=named)))
    assert np.abs(shown - pixels(flower)[..., ::-1]).max() <= 1  # rounding
    clear = flower.copy()
    clear.putalpha(128)
    blended = pixels(read_picture(saved(clear, "PNG", icc_profile=named)))
    assert np.abs(blended - (pixels(flower)[..., ::-1] * (128 / 255) + 127)).max() <= 2
    for profile in (srgb, b"no profile", named[:200]):  # nothing to do, or nothing that can be followed
        assert np.array_equal(pixels(read_picture(saved(flower, "PNG", icc_profile=profile))), pixels(flower))
    grey = flower.convert("L")
    assert np.array_equal(pixels(read_picture(saved(grey, "PNG", icc_profile=named)))[..., 0], pixels(grey))


def test_pictures_of_phones(tmp_path: Path) -> None:
    """AVIF and jfif are read; HEIC is, where pillow-heif is installed, and else the remedy is said."""
    flower = Image.open(photo("flower.jpg")).convert("RGB").resize((60, 40))
    assert read_picture(saved(flower, "AVIF", quality=90)).size == (60, 40)
    heic = b"\0\0\0\x18ftypheic" + b"\0" * 100
    with pytest.raises(ValueError, match="is HEIC: install pillow-heif" if find_spec("pillow_heif") is None else ""):
        read_picture(heic)
    with pytest.raises(ValueError, match="no picture in a format that pillow knows"):
        read_picture(b"\0\0\0\x18ftypmp42" + b"\0" * 100)


def test_heic(tmp_path: Path) -> None:
    heif = pytest.importorskip("pillow_heif", reason="of the extra `data`, not of `test`")
    flower = Image.open(photo("flower.jpg")).convert("RGB").resize((96, 64))
    heif.from_pillow(flower).save(tmp_path / "a.heic", quality=95)
    assert np.abs(pixels(read_picture(tmp_path / "a.heic")) - pixels(flower)).mean() < 4  # of lossy compression


def test_damage_is_one_line(tmp_path: Path) -> None:
    whole = photo("china.jpg").read_bytes()
    cases = {
        "cut.jpg": (whole[: len(whole) // 2], "damaged: image file is truncated"),
        "cut.png": (photo("astronaut.png").read_bytes()[:50_000], "damaged: "),
        "head.jpg": (whole[:2], "no picture in a format"),
        "page.jpg": (b"<html>404</html>", "no picture in a format"),
        "empty.png": (b"", "no picture in a format"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        for source in (tmp_path / name, content):
            with pytest.raises(ValueError, match=message) as error:
                read_picture(source)
            assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="no such file"):
        read_picture(tmp_path / "nowhere.png")
    with pytest.raises(ValueError, match=r"damaged: .*Is a directory"):
        read_picture(tmp_path)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 96), (96, 48), (512, 512)])
def test_crop_is_the_largest_centred_part(height: int, width: int) -> None:
    picture = read_picture(photo("chelsea.png"))
    left, top, right, bottom = frame_of(picture.size, height=height, width=width, fit="crop")
    shown = ((right - left) * picture.width, (bottom - top) * picture.height)
    assert shown[0] / shown[1] == pytest.approx(width / height, rel=1e-9)
    assert max(right - left, bottom - top) == pytest.approx(1, abs=1e-12)
    assert (left, top) == pytest.approx((1 - right, 1 - bottom))
    seen = fit_picture(picture, height=height, width=width, fit="crop")
    assert seen.image.shape == (3, height, width) and seen.image.dtype == torch.float32
    assert seen.image.min() >= -1 and seen.image.max() <= 1


@pytest.mark.parametrize("fit", ["crop", "stretch"])
def test_resizing_keeps_the_mean_and_does_not_alias(fit: Fit) -> None:
    """Lanczos with antialiasing: a chess board far finer than a pixel becomes its mean (to 8 bits), not a pattern."""
    board = Image.fromarray((np.indices((512, 512)).sum(0) % 2 * 255).astype(np.uint8)).convert("RGB")
    small = fit_picture(board, height=64, width=64, fit=fit).image
    assert (small - (2 * 127.5 / 255 - 1)).abs().max() <= 2 / 127.5
    whole = read_picture(photo("astronaut.png"))
    tiny = fit_picture(whole, height=64, width=64, fit=fit).image
    assert (tiny.mean() - (pixels(whole).mean() / 127.5 - 1)).abs() < 0.01
    same = fit_picture(whole, height=512, width=512, fit=fit).image
    assert torch.equal(((same + 1) * 127.5).round().byte().permute(1, 2, 0), torch.from_numpy(np.asarray(whole).copy()))


def test_boxes_follow_the_crop() -> None:
    frame = frame_of((400, 200), height=64, width=64, fit="crop")
    assert frame == (0.25, 0.0, 0.75, 1.0)
    inside = crop_region(Region(name="cat", box=(0.25, 0.5, 0.5, 1.0)), frame)
    assert inside == Region(name="cat", box=(0.0, 0.5, 0.5, 1.0))
    half = crop_region(Region(name="cat", box=(0.2, 0.0, 0.4, 1.0)), frame)
    assert half is not None and half.box == pytest.approx((0.0, 0.0, 0.3, 1.0))
    assert crop_region(Region(name="cat", box=(0.1, 0.0, 0.3, 1.0)), frame) is None  # a quarter is left
    assert crop_region(Region(name="cat", box=(0.8, 0.0, 0.9, 1.0)), frame) is None
    assert crop_region(Region(name="cat"), frame) == Region(name="cat")
    assert frame_of((400, 200), height=64, width=64, fit="stretch") == (0, 0, 1, 1)
