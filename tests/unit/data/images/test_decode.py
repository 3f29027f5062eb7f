"""Pixels as the original makes them, and images that must not be decoded."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from megatron_vl.data.images.decode import ImageLimits, check_image, decode_image, to_pixels
from megatron_vl.data.images.pixels import IMAGE_MEAN, IMAGE_STD, blank_pixels, normalize
from megatron_vl.errors import SkipSample

GOLDEN = Path("tests/golden/qwen_vl/qwen_vl_hf_tiny")


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""
    chunks = (b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks
    )


def test_pixels_are_the_originals() -> None:
    expected = load_file(GOLDEN / "expected.safetensors")["pixels"]
    pixels = torch.from_numpy(to_pixels((GOLDEN / "images/0.png").read_bytes(), 448))
    assert torch.equal(normalize(pixels[None]), expected.reshape(1, 3, 448, 448))


def test_blank_is_close_to_zero() -> None:
    values = normalize(torch.from_numpy(blank_pixels(2, 14)))
    assert values.shape == (2, 3, 14, 14)
    assert values.abs().max() < 0.01
    assert torch.allclose(
        normalize(torch.zeros(1, 3, 1, 1, dtype=torch.uint8)).flatten() * torch.tensor(IMAGE_STD),
        -torch.tensor(IMAGE_MEAN),
    )


def test_modes_become_rgb() -> None:
    for mode in ("L", "P", "RGBA", "CMYK", "1", "LA"):
        kind = "TIFF" if mode == "CMYK" else "PNG"
        white = 255 if len(mode) == 1 else (255,) * len(mode)
        assert to_pixels(encode(Image.new(mode, (5, 9), white), kind), 14).shape == (3, 14, 14)
    gray16 = Image.fromarray(np.full((4, 4), 0x80FF, dtype=np.uint16))
    assert (to_pixels(encode(gray16), 4) == 0x80).all()


def outcome(check: Callable[[bytes], tuple[int, int]], data: bytes) -> tuple[int, int] | tuple[str, str]:
    try:
        return check(data)
    except SkipSample as error:
        return error.reason, error.detail


def test_checking_an_image_is_decoding_it() -> None:
    """Cut and damaged files of every kind have the same outcome, whether pixels are computed or not."""
    rng = random.Random(0)
    picture = Image.effect_noise((60, 44), 90).convert("RGB")
    kinds: list[tuple[str, str, dict[str, Any]]] = [
        (mode, "JPEG", options)
        for mode in ("RGB", "L", "CMYK")
        for options in ({}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_rows": 1})
    ]
    originals = [encode(picture.convert(mode), kind, **options) for mode, kind, options in kinds]
    originals += [encode(picture, kind) for kind in ("PNG", "WEBP", "GIF", "BMP", "TIFF")]
    seen = Counter[bool]()
    for data in originals:
        for turn in range(60):
            damaged = bytearray(data if turn % 3 else data[: rng.randrange(len(data))])
            for _ in range((0, 0, 1, 1, 3, 20)[turn % 6]):
                if damaged:
                    damaged[rng.randrange(len(damaged))] = rng.randrange(256)
            expected = outcome(lambda data: decode_image(data).size, bytes(damaged))
            assert outcome(check_image, bytes(damaged)) == expected
            seen[isinstance(expected[0], int)] += 1
    assert min(seen.values()) > 100


IMAGE = encode(Image.effect_noise((64, 64), 50).convert("RGB"))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "unreadable_image"),
        (b"GIF89a", "unreadable_image"),
        (IMAGE[: len(IMAGE) // 2], "unreadable_image"),
        (IMAGE[:100] + bytes(100) + IMAGE[200:], "unreadable_image"),
        (encode(Image.new("RGB", (8, 8)), "EPS"), "unreadable_image"),
        (png_header(9000, 9000), "image_too_large"),
        (png_header(60000, 60000), "image_too_large"),
        (png_header(2000, 2), "image_too_large"),
        (bytes(60_000_000), "image_too_large"),
    ],
    ids=["empty", "header only", "truncated", "damaged", "EPS", "bomb", "huge bomb", "line", "bytes"],
)
def test_what_cannot_or_must_not_be_decoded(data: bytes, reason: str) -> None:
    with pytest.raises(SkipSample) as error:
        decode_image(data)
    assert error.value.reason == reason


def test_limits_are_an_argument() -> None:
    with pytest.raises(SkipSample, match="4 x 4 pixels, the limit is 15"):
        decode_image(encode(Image.new("RGB", (4, 4))), ImageLimits(max_pixels=15))
