"""Decoding of an image into checked pixels, exactly as the original does it.

The original opens the file with Pillow and converts it to RGB (``rgb.py``). It resizes the image to a square with
Pillow's antialiased bicubic filter, whatever the aspect ratio is (``resize.py``), and normalizes with CLIP's constants
(``pixels.py``). EXIF orientation is ignored wherever an image is decoded (``stored.py``). Pixels stay uint8 until they
are on the device of the model.

Images are not trusted, so they are checked before they are decoded. Only allow-listed formats are accepted, and bytes,
pixels (a 10-kB PNG can decode to gigabytes) and the aspect ratio are limited. A truncated file is refused, never
padded. This module does not import torch, so that decode workers start in a fraction of a second.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from megatron_vl.data.file_kinds import HEAD_BYTES, what_is
from megatron_vl.data.images.resize import Resize, resize
from megatron_vl.data.images.rgb import to_rgb
from megatron_vl.errors import SkipSample


@dataclass(frozen=True)
class ImageLimits:
    """Limits of an image."""

    formats: tuple[str, ...] = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
    max_bytes: int = 50_000_000
    max_pixels: int = 40_000_000
    max_aspect_ratio: float = 200.0


DEFAULT_LIMITS = ImageLimits()


def decode_image(data: bytes, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """Decode an image to RGB.

    Raises:
        SkipSample: ``image_too_large`` (bytes, pixels or aspect ratio), ``unreadable_image``, or as for ``to_rgb``.
    """
    with open_image(data, limits) as image:
        return to_rgb(image)


def check_image(data: bytes, limits: ImageLimits = DEFAULT_LIMITS) -> tuple[int, int]:
    """Return width and height of an image if ``decode_image`` can decode it.

    All coefficients of a JPEG are read, because damage shows there. But only every eighth pixel of a row and a column
    is computed, which takes 40 % less time. If this fails, the image is decoded in full to decide.

    Raises:
        SkipSample: As for ``decode_image``.
    """
    try:
        with open_image(data, limits) as image:
            size = image.size
            image.draft("RGB", (1, 1))
            to_rgb(image)
            return size
    except SkipSample:
        return decode_image(data, limits).size


@contextlib.contextmanager
def open_image(data: bytes, limits: ImageLimits = DEFAULT_LIMITS) -> Iterator[Image.Image]:
    """Yield the image before it is decoded; convert errors within the block to SkipSample."""
    if len(data) > limits.max_bytes:
        raise SkipSample("image_too_large", f"{len(data)} bytes, the limit is {limits.max_bytes}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # our own limit is stricter, and damaged EXIF does not matter
            with Image.open(io.BytesIO(data), formats=limits.formats) as image:
                _check_size(image.size, limits)
                yield image
    except Image.DecompressionBombError as error:
        raise SkipSample("image_too_large", str(error)) from error
    except UnidentifiedImageError as error:  # its own text has a memory address, which always differs
        found = what_is(data[:HEAD_BYTES])
        raise SkipSample("unreadable_image", found or f"none of {', '.join(limits.formats)}") from error
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, TypeError, MemoryError) as error:
        # Pillow's format plug-ins raise any of these for damaged files.
        raise SkipSample("unreadable_image", f"{type(error).__name__}: {error}") from error


def _check_size(size: tuple[int, int], limits: ImageLimits) -> None:
    width, height = size
    if width * height > limits.max_pixels:
        raise SkipSample("image_too_large", f"{width} x {height} pixels, the limit is {limits.max_pixels}")
    if max(size) > limits.max_aspect_ratio * min(size):
        raise SkipSample("image_too_large", f"{width} x {height}: aspect ratio above {limits.max_aspect_ratio:g}")


def to_pixels(
    data: bytes, image_size: int, limits: ImageLimits = DEFAULT_LIMITS, *, resize: Resize = resize
) -> npt.NDArray[np.uint8]:
    """Decode an image and resize it to a square; return uint8[3, image_size, image_size].

    ``resize``: any function that gives the same pixels.

    Raises:
        SkipSample: As for ``decode_image``.
    """
    return resize(decode_image(data, limits), image_size)


def encode_jpeg(image: Image.Image, quality: int) -> bytes:
    """Return JPEG bytes without chroma subsampling, which would blur small colored objects."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()
