"""Encoded image -> checked pixels, exactly as the original does it.

The original opens the file with Pillow, converts to RGB (``rgb.py``), squashes to a square by Pillow's (antialiased)
bicubic filter whatever the aspect ratio (``resize.py``), and normalizes with CLIP's constants (``pixels.py``). EXIF
orientation is not looked at, here or wherever else an image is decoded (``stored.py``). Pixels stay uint8 until
they are on the device of the model.

Images come from anywhere, so they are checked before anything is decoded: allow-listed formats only, a limit
on bytes, on pixels (a 10-kB PNG can decode to gigabytes) and on the aspect ratio. A truncated file is
refused, never filled up. This module imports no torch, so that decode workers start in a fraction of a
second.
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
    """What an image may be."""

    formats: tuple[str, ...] = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
    max_bytes: int = 50_000_000
    max_pixels: int = 40_000_000
    max_aspect_ratio: float = 200.0


DEFAULT_LIMITS = ImageLimits()


def decode_image(data: bytes, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """Decode an image to RGB.

    Raises SkipSample: ``image_too_large`` (bytes, pixels or aspect ratio), ``unreadable_image``, or what
    ``to_rgb`` raises.
    """
    with open_image(data, limits) as image:
        return to_rgb(image)


def check_image(data: bytes, limits: ImageLimits = DEFAULT_LIMITS) -> tuple[int, int]:
    """Width and height of an image that ``decode_image`` decodes; raises what it raises.

    Of a JPEG all coefficients are read, for that is where damage shows, but only every eighth pixel of a row and a
    column is computed, which takes 40 % less time. What is refused so, the whole decoding decides.
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
    """The image before it is decoded; what goes wrong with it until it is left becomes SkipSample."""
    if len(data) > limits.max_bytes:
        raise SkipSample("image_too_large", f"{len(data)} bytes, the limit is {limits.max_bytes}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # our own limit is stricter, and damaged EXIF is no damage
            with Image.open(io.BytesIO(data), formats=limits.formats) as image:
                _check_size(image.size, limits)
                yield image
    except Image.DecompressionBombError as error:
        raise SkipSample("image_too_large", str(error)) from error
    except UnidentifiedImageError as error:  # its own text names an address in memory, which is never the same
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
        raise SkipSample(
            "image_too_large", f"{width} x {height}: aspect ratio above {limits.max_aspect_ratio:g}"
        )


def to_pixels(
    data: bytes, image_size: int, limits: ImageLimits = DEFAULT_LIMITS, *, resize: Resize = resize
) -> npt.NDArray[np.uint8]:
    """uint8[3, image_size, image_size] of an encoded image, squashed to the square.

    ``resize``: any that gives the same pixels. Raises SkipSample as ``decode_image`` does.
    """
    return resize(decode_image(data, limits), image_size)


def encode_jpeg(image: Image.Image, quality: int) -> bytes:
    """JPEG bytes without chroma subsampling, which would smear small colored things."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()
