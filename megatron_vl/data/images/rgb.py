"""Any mode that Pillow decodes to -> RGB: the picture that people see, or SkipSample where the file does not say it.

Pillow's own ``convert`` drops transparency, which turns black writing on nothing into black on black, and clips grays
of more than 8 bits to white. Here what is transparent lies on white paper, as browsers and img2dataset have it, and of
deep grays the upper 8 bits count. The file says the range of such grays only where it is that of its integers.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from megatron_vl.errors import SkipSample

_OPAQUE = 255
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262
"""Tags of TIFF."""
_UNUSED_BITS = 4
"""Grays that leave more of the upper bits unused are of another range than that of their integers."""


def to_rgb(image: Image.Image) -> Image.Image:
    """The image in RGB, decoded; itself if it is RGB.

    Raises SkipSample: ``unknown_range`` of grays, or ``invisible_image``.
    """
    if image.mode[0] in "IF":
        return _gray(image)
    image.load()
    if image.has_transparency_data:
        return _on_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")  # convert would copy it


def _on_white(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    if image.getchannel("A").getextrema() == (_OPAQUE, _OPAQUE):
        return image.convert("RGB")
    picture = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if picture.getextrema() == ((255, 255),) * 3:
        raise SkipSample("invisible_image", "transparent, and nothing of it shows on white")
    return picture


def _gray(image: Image.Image) -> Image.Image:
    """Integers of 16 bits, or of 12 in TIFF. (Pillow scales PGM to 16 bits.)"""
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
