"""Conversion of any Pillow mode to RGB, as people see the picture; SkipSample if the file does not define this.

Pillow's own ``convert`` drops transparency, so black writing on a transparent ground becomes black on black. It also
clips grays of more than 8 bits to white. Here, transparent images are put on a white ground, as in browsers and
img2dataset. Of grays with more than 8 bits, the upper 8 bits are used. The range of such grays is known only if it
equals the range of their integers.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from megatron_vl.errors import SkipSample

_OPAQUE = 255
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262
"""TIFF tags."""
_UNUSED_BITS = 4
"""If grays leave more of the upper bits unused, their range is not the range of their integers."""


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode an image and return it in RGB; an RGB image is returned itself.

    Raises:
        SkipSample: ``unknown_range`` of grays, or ``invisible_image``.
    """
    if image.mode[0] in "IF":
        return _gray(image)
    image.load()
    if image.has_transparency_data:
        return _on_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")  # convert would copy an RGB image


def _on_white(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    if image.getchannel("A").getextrema() == (_OPAQUE, _OPAQUE):
        return image.convert("RGB")
    picture = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if picture.getextrema() == ((255, 255),) * 3:
        raise SkipSample("invisible_image", "transparent, and nothing of it shows on white")
    return picture


def _gray(image: Image.Image) -> Image.Image:
    """Convert grays of 16-bit integers, or of 12-bit integers in TIFF. (Pillow scales PGM to 16 bits.)"""
    if not image.mode.startswith("I;16") and image.format != "PPM":
        raise SkipSample("unknown_range", f"grays of 32 bits (mode {image.mode}): which is black, which is white?")
    tags = getattr(image, "tag_v2", {})
    bits = int(tags.get(_BITS_PER_SAMPLE, (16,))[0])
    values = np.asarray(image)
    highest = int(values.max())
    if 0 < highest < 1 << (bits - _UNUSED_BITS):
        raise SkipSample("unknown_range", f"grays of {bits} bits, but none above {highest}: which is white?")
    upper = (values >> (bits - 8)).astype(np.uint8)
    return Image.fromarray(~upper if tags.get(_PHOTOMETRIC) == 0 else upper).convert("RGB")
