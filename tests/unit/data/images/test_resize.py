"""One filter in three forms: Pillow's, the same arithmetic by lines, and that compiled."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from megatron_vl.data.images.resize import compiled_resize, resize, resize_by_lines, sum_lines

SIDES = st.integers(1, 24)


def noise(width: int, height: int) -> Image.Image:
    """Black and white dots: sums leave [0, 255] on both sides."""
    dots = np.random.default_rng(width).integers(0, 2, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(255 * dots)


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    # Computed with Pillow 11.3, in one call of Image.resize; Pillow 13 gives others for the tall one.
    [
        (64, 48, "6363550507369c0d50354b955769bc341aeef66f7228794da716db863de13a84"),
        (30, 300, "8cffd7bbc2dbe9110becf78e28d656d4ffabd5dae5f733c40ac2a0f5108bd893"),
    ],
)
def test_pixels_do_not_depend_on_the_version_of_pillow(width: int, height: int, expected: str) -> None:
    pixels = resize(noise(width, height), 28)
    assert pixels.shape == (3, 28, 28)
    assert hashlib.sha256(pixels.tobytes()).hexdigest() == expected


def test_a_wide_image_is_what_one_call_of_pillow_gives() -> None:
    image = noise(64, 48)
    whole = np.asarray(image.resize((28, 28), Image.Resampling.BICUBIC))
    assert np.array_equal(resize(image, 28), whole.transpose(2, 0, 1))


@settings(derandomize=True, max_examples=60, deadline=None)
@given(width=SIDES, height=SIDES, size=st.integers(1, 16))
def test_by_lines_it_is_pillow_bit_by_bit(width: int, height: int, size: int) -> None:
    image = noise(width, height)
    assert np.array_equal(resize_by_lines(image, size, add=sum_lines), resize(image, size))


@pytest.fixture(scope="module")
def compiled() -> Callable[[Image.Image, int], np.ndarray]:
    made = compiled_resize()
    assert made is not None
    return made


@pytest.mark.parametrize(
    ("width", "height", "size"),
    [(640, 480, 448), (480, 640, 448), (448, 448, 448), (300, 200, 448), (3, 1000, 14), (4000, 3000, 224), (1, 1, 56)],
)
def test_compiled_it_is_pillow_bit_by_bit(
    compiled: Callable[[Image.Image, int], np.ndarray], width: int, height: int, size: int
) -> None:
    image = noise(width, height)
    assert np.array_equal(compiled(image, size), resize(image, size))


def test_where_numba_does_not_load_there_is_no_compiled_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    assert compiled_resize() is None
