"""Read regions from text with grounding markup, and draw regions onto an image.

Qwen-VL writes ``<ref>phrase</ref>`` followed by one or more ``<box>(x1,y1),(x2,y2)</box>`` or
``<quad>(x,y),(x,y),(x,y),(x,y)</quad>``, in the cells of :mod:`megatron_vl.data.prompting.coordinates`. A model's text
is untrusted: parsing never fails. Boxes that cannot be read are left out, and tags are dropped from the plain text.
Swapped corners are kept as they are (they overlap nothing, hence count as wrong).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from PIL import Image, ImageDraw, ImageFont

from megatron_vl.data.prompting.coordinates import from_cell, parse_cells, parse_points
from megatron_vl.data.sample import Region

_PAIR = re.compile(r"\(\s*\d{1,3}\s*,\s*\d{1,3}\s*\)\s*,\s*\(\s*\d{1,3}\s*,\s*\d{1,3}\s*\)")
_PIECES = re.compile(r"<ref>(?P<ref>.*?)</ref>|<box>(?P<box>.*?)</box>|<quad>(?P<quad>.*?)</quad>", re.DOTALL)
_LEFT_OVER_TAG = re.compile(r"</?(?:ref|box|quad)>")

Points = tuple[float, ...]


@dataclass(frozen=True)
class GroundedText:
    """A text without its markup, and the regions from the markup."""

    text: str
    regions: tuple[Region, ...]
    """In order; ``span`` gives the characters of ``text`` that a phrase occupies."""
    phrases: tuple[str, ...] = ()
    """Contents of the <ref> tags, with a readable box or without."""


def parse_grounding(text: str) -> GroundedText:
    """Split a model's text into plain text and regions with coordinates in [0, 1].

    A box without a phrase before it makes a region with an empty text. A phrase without a readable box makes no region.
    """
    plain, end = "", 0
    phrase: Region | None = None
    regions: list[Region | None] = []
    phrases: list[str] = []
    for piece in _PIECES.finditer(text):
        between = _LEFT_OVER_TAG.sub("", text[end : piece.start()])
        end = piece.end()
        plain += between
        if between.strip() or piece["ref"] is not None:
            regions.append(phrase)
            phrase = None
        if piece["ref"] is not None:
            words = _LEFT_OVER_TAG.sub("", piece["ref"])
            start = len(plain) + len(words) - len(words.lstrip())
            plain += words
            phrases.append(words.strip())
            phrase = Region(text=words.strip(), span=(start, start + len(words.strip())))
        else:
            phrase = _with_shape(phrase or Region(text=""), piece)
    regions.append(phrase)
    plain += _LEFT_OVER_TAG.sub("", text[end:])
    kept = tuple(region for region in regions if region is not None and (region.boxes or region.quads))
    return GroundedText(plain, kept, tuple(phrases))


def first_cells(text: str) -> tuple[int, int, int, int] | None:
    """Return the first ``(x1,y1),(x2,y2)`` of a text, in tags or not, in cells; None if there is none."""
    found = _PAIR.search(text)
    cells = None if found is None else parse_cells(found[0], 2)
    if cells is None:
        return None
    x1, y1, x2, y2 = cells
    return x1, y1, x2, y2


def first_box(text: str) -> tuple[float, float, float, float] | None:
    """Return the same as coordinates in [0, 1]."""
    cells = first_cells(text)
    return None if cells is None else _as_box(tuple(map(from_cell, cells)))


def draw_regions(
    image: Image.Image,
    regions: Sequence[Region],
    *,
    color: str = "#d1242f",
    width: int = 3,
    labels: bool = True,
) -> Image.Image:
    """Return an RGB copy of ``image`` with all boxes and quads outlined, phrases at their corners."""
    canvas = image.convert("RGB")
    draw = ImageDraw.Draw(canvas)
    size = max(10, canvas.height // 32)
    font = ImageFont.load_default(size)
    for region in regions:
        for points in [_corners(box) for box in region.boxes] + list(region.quads):
            pixels = _pixels(points, canvas.size)
            draw.line([*pixels, pixels[0]], fill=color, width=width, joint="curve")
            if labels and region.text:
                _write_label(draw, region.text, at=pixels[0], font=font, color=color)
    return canvas


def _with_shape(region: Region, piece: re.Match[str]) -> Region:
    """Add the box or quad of ``piece`` to a region if it can be read."""
    if piece["box"] is not None:
        box = _as_box(parse_points(piece["box"], 2))
        return region if box is None else replace(region, boxes=(*region.boxes, box))
    quad = parse_points(piece["quad"], 4)
    return region if quad is None else replace(region, quads=(*region.quads, quad))


def _as_box(points: Points | None) -> tuple[float, float, float, float] | None:
    if points is None:
        return None
    x1, y1, x2, y2 = points
    return x1, y1, x2, y2


def _corners(box: Points) -> Points:
    x1, y1, x2, y2 = box
    return x1, y1, x2, y1, x2, y2, x1, y2


def _pixels(points: Points, size: tuple[int, int]) -> list[tuple[float, float]]:
    width, height = size
    return [(x * (width - 1), y * (height - 1)) for x, y in zip(points[::2], points[1::2], strict=True)]


def _write_label(
    draw: ImageDraw.ImageDraw,
    text: str,
    *,
    at: tuple[float, float],
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    color: str,
) -> None:
    """Write white text on a patch of ``color`` just above ``at``, or below where there is no room above."""
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    height = bottom - top + 4
    x, y = at[0], at[1] - height if at[1] >= height else at[1]
    draw.rectangle((x, y, x + right - left + 6, y + height), fill=color)
    draw.text((x + 3 - left, y + 2 - top), text, fill="white", font=font)
