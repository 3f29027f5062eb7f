"""Draw the regions of a text onto its image.

Shapes lie where the published tokenizer draws its boxes (``drawing`` of ``coordinates.py``). It draws boxes alone; here
quads are drawn too. A shape has the color of its phrase, and the label is inside the image, whatever the place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

from PIL import Image, ImageDraw, ImageFont

from megatron_vl.data.prompting.coordinates import cells_to_pixels, outline, to_cells
from megatron_vl.data.prompting.grounding import without_swapped_boxes
from megatron_vl.data.sample import Region
from megatron_vl.errors import DataError

Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont
_COLORS = ("#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#e377c2", "#8c564b")
_LEAST_FONT = 14
_FONTS_PER_SIDE = 30
"""The letters of a label are this part of the image's mean side, as in the original."""
_MARGIN = 2


def draw_regions(image: Image.Image, regions: Sequence[Region], color: str) -> Image.Image:
    """Return an RGB copy of ``image`` with all boxes and quads outlined in one color."""
    canvas = image.convert("RGB")
    draw = ImageDraw.Draw(canvas)
    for region in regions:
        for corners in _shapes(region, canvas.size):
            _outline(draw, corners, color, width=3)
    return canvas


def draw_labeled_regions(image: Image.Image, regions: Sequence[Region], font_file: Path | None = None) -> Image.Image:
    """Return an RGB copy of ``image`` with all boxes and quads, a color for each region, and its phrase beside them.

    Boxes with swapped corners are left out, since nobody knows which corners were meant.

    Args:
        font_file: a TrueType font for the phrases; without it Pillow's own, which has Latin letters alone.

    Raises:
        DataError: if the font cannot be read.
    """
    canvas = image.convert("RGB")
    draw = ImageDraw.Draw(canvas)
    size = max(_LEAST_FONT, math.isqrt(canvas.width * canvas.height) // _FONTS_PER_SIDE)
    font = _read_font(font_file, size)
    labels = []
    for number, region in enumerate(map(without_swapped_boxes, regions)):
        color = _COLORS[number % len(_COLORS)]
        for corners in _shapes(region, canvas.size):
            _outline(draw, corners, color, width=max(2, size // 6))
            labels.append((region.text, corners, color))
    for text, corners, color in labels:  # above all shapes
        if text:
            _label(draw, text, corners, color, font)
    return canvas


def _read_font(path: Path | None, size: int) -> Font:
    if path is None:
        return ImageFont.load_default(size)
    try:
        return ImageFont.truetype(str(path), size)
    except OSError as error:
        raise DataError(f"--font {path}: cannot be read as a TrueType font ({error})") from error


def _shapes(region: Region, size: tuple[int, int]) -> Iterator[list[tuple[float, float]]]:
    """Yield the corners of each shape in pixels."""
    for points in map(outline, region.boxes + region.quads):
        flat = cells_to_pixels(to_cells(points), size, "drawing")
        yield list(zip(flat[::2], flat[1::2], strict=True))


def _outline(draw: ImageDraw.ImageDraw, corners: list[tuple[float, float]], color: str, *, width: int) -> None:
    draw.line([*corners, corners[0]], fill=color, width=width, joint="curve")


def _label(draw: ImageDraw.ImageDraw, text: str, corners: list[tuple[float, float]], color: str, font: Font) -> None:
    """Write a text in white on the color of its shape: above its top left or, at the image's edge, inside."""
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    width, height = right - left + 2 * _MARGIN, bottom - top + 2 * _MARGIN
    x = max(0.0, min(min(x for x, _ in corners), draw.im.size[0] - width))
    y = min(y for _, y in corners)
    y = y - height if y >= height else y
    draw.rectangle((x, y, x + width, y + height), fill=color)
    draw.text((x + _MARGIN - left, y + _MARGIN - top), text, fill="white", font=font)
