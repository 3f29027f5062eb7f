"""Modes of images: what people see, or left out, never white or black for want of a rule."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megatron_vl.data.images.decode import check_image, decode_image, to_pixels
from megatron_vl.errors import SkipSample
from tests.helpers.data.learned import outcomes
from tests.helpers.data.reading import write_tar

RAMP = np.linspace(0, 1, 12 * 10).reshape(10, 12)


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def grays(data: bytes) -> Any:
    picture = np.asarray(decode_image(data))
    assert check_image(data) == picture.shape[1::-1] and to_pixels(data, 8).shape == (3, 8, 8)
    assert (picture == picture[..., :1]).all()
    return picture[..., 0]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_keep_their_upper_eight(kind: str) -> None:
    values = (RAMP * 65535).astype(np.uint16)
    assert (grays(encode(Image.fromarray(values), kind)) == values >> 8).all()


def test_deep_pgm_has_the_range_that_it_says() -> None:
    data = b"P5 3 1 1023\n" + bytes([0, 0, 2, 0, 3, 255])
    assert grays(data).tolist() == [[0, 128, 255]]


def test_tiff_of_twelve_bits_and_of_white_zero() -> None:
    values = (RAMP * 65535).astype(np.uint16)
    data = bytearray(encode(Image.fromarray(values), "TIFF"))
    at = data.index((262).to_bytes(2, "little") + (3).to_bytes(2, "little"))
    data[at + 8] = 0
    assert (grays(bytes(data)) == 255 - (values >> 8)).all()
    packed = bytes([0x00, 0x08, 0x00, 0xFF, 0xF0, 0x00])  # 0, 2048, 4095, and a pixel that is not shown
    assert grays(tiff_of_twelve_bits(packed, 3)).tolist() == [[0, 128, 255]]


def tiff_of_twelve_bits(packed: bytes, width: int) -> bytes:
    """A TIFF of one row, entry by entry."""
    entries = [(256, width), (257, 1), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1), (279, len(packed))]
    place = 8 + len(packed)
    head = b"II*\0" + place.to_bytes(4, "little") + packed + len(entries).to_bytes(2, "little")
    for tag, value in entries:
        head += b"".join(number.to_bytes(size, "little") for number, size in ((tag, 2), (3, 2), (1, 4), (value, 4)))
    return head + bytes(4)


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray((RAMP * 2**31 * 0.9).astype(np.int32)),
        Image.fromarray((RAMP * 60000).astype(np.int32)),
        Image.fromarray((RAMP * 255).astype(np.int32)),
        Image.fromarray(RAMP.astype(np.float32)),
        Image.fromarray((RAMP * 255).astype(np.float32)),
        Image.fromarray((RAMP * 4095).astype(np.uint16)),
        Image.fromarray((RAMP * 255).astype(np.uint16)),
    ],
    ids=["I", "I of 16", "I of 8", "F of 1", "F of 255", "12 in 16", "8 in 16"],
)
def test_grays_of_unknown_range_are_left_out(image: Image.Image) -> None:
    for check in (decode_image, check_image):
        with pytest.raises(SkipSample, match="unknown_range"):
            check(encode(image, "TIFF"))


def test_a_black_image_of_16_bits_is_black() -> None:
    assert (grays(encode(Image.fromarray(np.zeros((4, 4), np.uint16)))) == 0).all()


def writing(mode: str, ink: int) -> Image.Image:
    """Opaque writing on nothing, all of one color."""
    alpha = Image.fromarray(np.where(RAMP > 0.5, 255, 0).astype(np.uint8))
    image = Image.new("L", alpha.size, ink)
    found = Image.merge("LA", (image, alpha))
    return found if mode == "LA" else found.convert(mode)


def palette(ink: int) -> tuple[Image.Image, dict[str, Any]]:
    image = Image.fromarray(np.where(RAMP > 0.5, 1, 0).astype(np.uint8), "P")
    image.putpalette([ink] * 6)
    return image, {"transparency": 0}


EXPECTED = np.where(RAMP > 0.5, 0, 255)


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_black_writing_on_nothing_is_black_on_white(mode: str, kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    assert (grays(encode(writing(mode, 0), kind, **options)) == EXPECTED).all()


def test_transparency_of_palettes_and_single_colors_counts() -> None:
    image, options = palette(0)
    for kind in ("PNG", "GIF"):
        assert (grays(encode(image, kind, **options)) == EXPECTED).all()
    dark = Image.fromarray(np.where(RAMP > 0.5, 0, 7).astype(np.uint8))
    assert (grays(encode(dark, "PNG", transparency=7)) == EXPECTED).all()
    assert (grays(encode(dark.convert("RGB"), "PNG", transparency=(7, 7, 7))) == EXPECTED).all()


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_what_does_not_show_on_white_is_left_out(mode: str) -> None:
    data = encode(writing(mode, 255))
    for check in (decode_image, check_image):
        with pytest.raises(SkipSample, match="invisible_image"):
            check(data)


def test_opaque_images_with_an_alpha_channel_are_the_originals_pixels() -> None:
    rng = np.random.default_rng(0)
    colors = rng.integers(0, 256, (9, 7, 3), dtype=np.uint8)
    opaque = np.concatenate([colors, np.full((9, 7, 1), 255, np.uint8)], axis=2)
    assert (np.asarray(decode_image(encode(Image.fromarray(opaque)))) == colors).all()
    half = np.concatenate([colors, np.full((9, 7, 1), 128, np.uint8)], axis=2)
    expected = colors * (128 / 255) + 255 * (1 - 128 / 255)
    assert np.abs(np.asarray(decode_image(encode(Image.fromarray(half)))) - expected).max() <= 1


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_is_the_picture(kind: str) -> None:
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    red, green, blue = np.asarray(decode_image(encode(image, kind)))[4, 4].tolist()
    assert red > 250 and max(green, blue) < 6


def test_lab_is_the_picture() -> None:
    image = Image.new("LAB", (8, 8), (138, 209, 198))
    assert np.abs(np.array(decode_image(encode(image, "TIFF")).getpixel((4, 4))) - (255, 0, 0)).max() <= 6


def test_preparation_counts_them_under_their_names(tmp_path: Path) -> None:
    members = []
    floats = Image.fromarray(RAMP.astype(np.float32))
    for key, data in enumerate((encode(floats, "TIFF"), encode(writing("LA", 255)), encode(writing("LA", 0)))):
        members += [(f"{key}.png", data), (f"{key}.txt", b"it")]
    write_tar(tmp_path / "0.tar", members)
    assert outcomes(tmp_path, "img2dataset", path="0.tar") == {"unknown_range": 1, "invisible_image": 1, "kept": 1}
