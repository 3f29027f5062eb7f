"""Draw regions onto an image."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw

from megatron_vl.data.prompting.coordinates import outline
from megatron_vl.data.sample import Region


def draw_regions(image: Image.Image, regions: Sequence[Region], color: str) -> Image.Image:
    """Return an RGB copy of ``image`` with all boxes and quads outlined."""
    canvas = image.convert("RGB")
    draw = ImageDraw.Draw(canvas)
    for region in regions:
        for points in map(outline, region.boxes + region.quads):
            pixels = _pixels(points, canvas.size)
            draw.line([*pixels, pixels[0]], fill=color, width=3, joint="curve")
    return canvas


def _pixels(points: tuple[float, ...], size: tuple[int, int]) -> list[tuple[float, float]]:
    width, height = size
    return [(x * (width - 1), y * (height - 1)) for x, y in zip(points[::2], points[1::2], strict=True)]
