"""Read regions from text with grounding markup.

Qwen-VL writes ``<ref>phrase</ref>`` followed by one or more ``<box>(x1,y1),(x2,y2)</box>`` or
``<quad>(x,y),(x,y),(x,y),(x,y)</quad>``, in the cells of :mod:`megatron_vl.data.prompting.coordinates`. A model's text
is untrusted: parsing never fails. Boxes that cannot be read are left out and reported, and tags are dropped from the
plain text. Swapped corners are kept as they are (they overlap nothing, hence count as wrong), and reported too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from megatron_vl.data.prompting.coordinates import first_cells, from_cell, parse_points
from megatron_vl.data.sample import Region

_PIECES = re.compile(r"<ref>(?P<ref>.*?)</ref>|<box>(?P<box>.*?)</box>|<quad>(?P<quad>.*?)</quad>", re.DOTALL)
_OPEN_AT_END = re.compile(r"(?:<ref>[^<]*</ref>)?\s*<(?:box|quad)>\s*$")
_LEFT_OVER_TAG = re.compile(r"</?(?:ref|box|quad)>")

_BOX_NUMBERS = 4

Points = tuple[float, ...]


@dataclass(frozen=True)
class GroundedText:
    """A text without its markup, and the regions from the markup."""

    text: str
    regions: tuple[Region, ...]
    """In order; ``span`` gives the characters of ``text`` that a phrase occupies."""
    phrases: tuple[str, ...] = ()
    """Contents of the <ref> tags, with a readable box or without."""
    broken: tuple[str, ...] = ()
    """What is wrong with the markup, for people."""


def parse_grounding(text: str) -> GroundedText:
    """Split a model's text into plain text and regions with coordinates in [0, 1].

    Boxes without a phrase before them make one region with an empty text. A phrase without a readable box makes none.
    """
    plain, end = "", 0
    region: Region | None = None
    regions: list[Region | None] = []
    phrases: list[str] = []
    broken: list[str] = []
    for piece in _PIECES.finditer(text):
        between = _LEFT_OVER_TAG.sub("", text[end : piece.start()])
        broken += _stray_tags(text[end : piece.start()])
        end = piece.end()
        plain += between
        if between.strip() or piece["ref"] is not None:
            regions.append(region)
            region = None
        if piece["ref"] is not None:
            words = _LEFT_OVER_TAG.sub("", piece["ref"])
            start = len(plain) + len(words) - len(words.lstrip())
            plain += words
            phrases.append(words.strip())
            broken += _stray_tags(piece["ref"])
            region = Region(text=words.strip(), span=(start, start + len(words.strip())))
        else:
            region = _with_shape(region or Region(text=""), piece)
            broken += _what_is_wrong(piece)
    regions.append(region)
    plain += _LEFT_OVER_TAG.sub("", text[end:])
    broken += _stray_tags(text[end:])
    kept = tuple(found for found in regions if found is not None and (found.boxes or found.quads))
    return GroundedText(plain, kept, tuple(phrases), tuple(broken))


def complete_reply(prompt: str, reply: str) -> str:
    """Return a reply with the tags that its prompt has left open, ``<ref>phrase</ref><box>`` for example."""
    tags = _OPEN_AT_END.search(prompt)
    return reply if tags is None else tags[0] + reply


def without_swapped_boxes(region: Region) -> Region:
    """Return a region without the boxes whose second corner is left of or above the first."""
    return replace(region, boxes=tuple(box for box in region.boxes if not _is_swapped(box)))


def first_box(text: str) -> tuple[float, float, float, float] | None:
    """Return the cells of :func:`first_cells` as coordinates in [0, 1]."""
    cells = first_cells(text)
    return None if cells is None else _as_box(tuple(map(from_cell, cells)))


def _with_shape(region: Region, piece: re.Match[str]) -> Region:
    """Add the box or quad of ``piece`` to a region if it can be read."""
    if piece["box"] is not None:
        box = _as_box(parse_points(piece["box"], 2))
        return region if box is None else replace(region, boxes=(*region.boxes, box))
    quad = parse_points(piece["quad"], 4)
    return region if quad is None else replace(region, quads=(*region.quads, quad))


def _stray_tags(text: str) -> list[str]:
    return [f"{tag} without its partner, near {text.strip()[:60]!r}" for tag in _LEFT_OVER_TAG.findall(text)]


def _what_is_wrong(piece: re.Match[str]) -> list[str]:
    """Return why a box or quad is not what it should be, or nothing."""
    points = parse_points(piece["box"], 2) if piece["box"] is not None else parse_points(piece["quad"], 4)
    if points is None:
        number = "two" if piece["box"] is not None else "four"
        return [f"{piece[0][:80]}: expected {number} points (x,y) of integers from 0 to 999"]
    if len(points) == _BOX_NUMBERS and _is_swapped(points):
        return [f"{piece[0]}: its second corner is not right of and below the first"]
    return []


def _is_swapped(box: Points) -> bool:
    return box[2] < box[0] or box[3] < box[1]


def _as_box(points: Points | None) -> tuple[float, float, float, float] | None:
    if points is None:
        return None
    x1, y1, x2, y2 = points
    return x1, y1, x2, y2
