"""Preparation of an image for storage: EXIF orientation is applied if requested, and the declared size is checked.

No decoder here applies EXIF orientation. The original does not, and boxes of the published sets refer to the pixels as
stored. Most annotation tools do apply it. If the orientation is to be applied, the image is stored again, rotated and
without EXIF. So training, the inspector and generation see the same pixels without special handling. (The orientation
of TIFF is not EXIF but part of the format: Pillow applies it.)
"""

from __future__ import annotations

import io
import struct
from dataclasses import replace
from typing import Literal

from PIL import Image

from megatron_vl.data.images.decode import encode_jpeg, open_image
from megatron_vl.data.images.rgb import to_rgb
from megatron_vl.data.sample import ImageRef
from megatron_vl.errors import SkipSample

_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
"""Transposition that brings an image of each orientation upright. Other values have no meaning."""
_JPEG_QUALITY = 95


def settle_image(image: ImageRef, *, exif_orientation: Literal["ignore", "apply"], scaled_images: bool) -> ImageRef:
    """Return the image as the options of its source (see ``Source``) require it.

    Raises:
        SkipSample: ``size_mismatch`` if the record declares another size, or as for decoding.
    """
    if exif_orientation == "apply":
        image = replace(image, data=upright(image.data))
    if image.declared is not None:
        _compare(image.data, image.declared, scaled=scaled_images)
    return image


def upright(data: bytes) -> bytes:
    """Return the image with its orientation applied, encoded again if it has one. Raises SkipSample."""
    with open_image(data) as image:
        found = _orientation(image)
        if found == 1:
            return data
        is_jpeg = image.format in ("JPEG", "MPO")
        turned = to_rgb(image).transpose(_TURNS[found])
    if is_jpeg:
        return encode_jpeg(turned, _JPEG_QUALITY)
    buffer = io.BytesIO()
    turned.save(buffer, "PNG")
    return buffer.getvalue()


def _orientation(image: Image.Image) -> int:
    """Return the orientation 2 to 8, or 1 if there is none to apply."""
    try:
        found = 1 if image.format == "TIFF" else image.getexif().get(_ORIENTATION)
    except (struct.error, ValueError, SyntaxError, LookupError, TypeError):  # damaged EXIF of an intact image
        return 1
    return found if found in _TURNS else 1


def _compare(data: bytes, declared: tuple[int, int], *, scaled: bool) -> None:
    with open_image(data) as image:
        if image.size == declared or (scaled and _alike(image.size, declared)):
            return
        turn = _orientation(image)
        hint = f"; its EXIF orientation is {turn}, see exif_orientation in docs/data.md" if turn != 1 else ""
        width, height = image.size
        raise SkipSample(
            "size_mismatch", f"the record says {declared[0]} x {declared[1]}, the image is {width} x {height}{hint}"
        )


def _alike(size: tuple[int, int], other: tuple[int, int]) -> bool:
    """Return whether the proportions are equal up to rounding of the sides."""
    return abs(size[0] * other[1] - size[1] * other[0]) <= sum(other)
