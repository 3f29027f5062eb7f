"""Layout of the text on a page before anything is drawn: one word per box on a coarse grid, or blocks of lines.

Lines follow SynthDoG. A page is a stack of blocks, and each block has one or more columns. A column has a font, a size,
an alignment and running text that is broken into lines at the full width. Chinese may also be written vertically, with
lines from right to left.

The plan of a page is complete (texts, boxes, corners, fonts). So its key, and hence its split, is known before a pixel
is drawn.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random

from megatron_vl.data.synthetic.config import PageConfig
from megatron_vl.data.synthetic.fonts import Font, Language, LoadedFont
from megatron_vl.data.synthetic.geometry import Quad
from megatron_vl.data.synthetic.lexicon import WORDS

Write = Callable[[Random, int, Language], str]
"""Function that returns running text of at least a number of characters in a language."""


@dataclass(frozen=True)
class LineBox:
    """A line of text and its upright box on the paper, in pixels."""

    text: str
    x: int
    y: int
    width: int
    height: int
    font: Font = Font("Pillow", None)
    vertical: bool = False
    """Written vertically, one letter per square."""


@dataclass(frozen=True)
class PagePlan:
    """A page before it is drawn."""

    width: int
    height: int
    lines: tuple[LineBox, ...]
    corners: Quad
    """Positions of the corners of the paper in the image."""
    language: Language

    @property
    def key(self) -> str:
        """Canonical content: texts, positions and perspective (not font, ink, paper, noise)."""
        lines = "|".join(f"{line.text} {line.x},{line.y}" for line in self.lines)
        return f"{lines}|{self.corners}"


@dataclass(frozen=True)
class _Column:
    """The area of a column."""

    x: int
    y: int
    width: int
    bottom: int


def plan_words(rng: Random, config: PageConfig, font: Font) -> PagePlan | None:
    """Put words on the grid, one per row. Return None if a word is wider than the page."""
    width, height = rng.randint(*config.width), rng.randint(*config.height)
    line_height = rng.randint(*config.line_height)
    rows = range(0, height - line_height + 1, line_height)
    chosen = sorted(rng.sample(rows, min(rng.randint(*config.num_lines), len(rows))))
    lines = []
    for y in chosen:
        word = rng.choice(WORDS)
        room = width - config.letter_width * len(word)
        if room < 0:
            return None
        x = rng.randrange(0, room + 1, config.step)
        lines.append(LineBox(word, x, y, config.letter_width * len(word), line_height, font))
    corners = _lean(width, height, rng.choice(config.perspective), rng)
    return PagePlan(width, height, tuple(lines), corners, "en")


def plan_lines(rng: Random, config: PageConfig, fonts: Sequence[Font], language: Language, write: Write) -> PagePlan:
    """Fill blocks of columns with running text."""
    width, height = rng.randint(*config.width), rng.randint(*config.height)
    margin, gap = round(width * rng.uniform(0.04, 0.1)), round(width * 0.04)
    lines: list[LineBox] = []
    y = margin
    for _ in range(rng.randint(1, config.max_blocks)):
        columns = rng.randint(1, config.max_columns)
        room = (width - 2 * margin - (columns - 1) * gap) // columns
        bottom = y
        for number in range(columns):
            column = _Column(margin + number * (room + gap), y, room, height - margin)
            found = list(_plan_column(rng, config, column, rng.choice(fonts), (language, write)))
            lines += found
            bottom = max([bottom, *(line.y + line.height for line in found)])
        y = bottom + gap
    return PagePlan(width, height, tuple(lines), _corners(width, height, config, rng), language)


def _plan_column(
    rng: Random, config: PageConfig, column: _Column, font: Font, text: tuple[Language, Write]
) -> Iterator[LineBox]:
    language, write = text
    size, count = rng.randint(*config.line_height), rng.randint(*config.num_lines)
    spacing = round(size * rng.uniform(1.05, 1.6))
    alignment = rng.choice(config.alignments)
    words = font.drawable(write(rng, 80 * count, language))
    if language == "zh" and rng.random() < config.vertical_share:
        length = (column.bottom - column.y) // size
        for number in range(min(count, column.width // spacing) if length > 1 else 0):
            x = column.x + column.width - number * spacing - size
            if piece := words[number * length : (number + 1) * length]:
                yield LineBox(piece, x, column.y, size, len(piece) * size, font, vertical=True)
        return
    loaded = font.load_height(size)
    y = column.y
    for piece in itertools.islice(wrap(words, loaded, column.width, language), count):
        length = max(1, round(loaded.getlength(piece)))
        if y + size > column.bottom:
            return
        if length <= column.width:
            x = column.x + {"left": 0, "center": 1, "right": 2}[alignment] * (column.width - length) // 2
            yield LineBox(piece, x, y, length, size, font)
            y += spacing


def wrap(text: str, font: LoadedFont, width: int, language: Language) -> Iterator[str]:
    """Yield ``text`` in lines of at most ``width`` pixels, broken at spaces (Chinese: anywhere)."""
    units, glue = (text.split(" "), " ") if language == "en" else (list(text), "")
    line = ""
    for unit in units:
        longer = f"{line}{glue}{unit}" if line else unit
        if line and font.getlength(longer) > width:
            yield line
            line = unit
        else:
            line = longer
    if line:
        yield line


def _lean(width: int, height: int, by: float, rng: Random) -> Quad:
    """Shorten one edge of the paper by twice ``by``, as if the paper leans away from the viewer on that side."""
    left_top = left_bottom = right_top = right_bottom = 0.0
    if rng.random() < 0.5:
        left_top = left_bottom = by
    else:
        right_top = right_bottom = by
    return (0, left_top), (width, right_top), (width, height - right_bottom), (0, height - left_bottom)


def _corners(width: int, height: int, config: PageConfig, rng: Random) -> Quad:
    """Move every corner inwards by a random amount, then rotate, shrink and shift the whole paper inside the image."""
    dx = [rng.uniform(*config.perspective) for _ in range(4)]
    dy = [rng.uniform(*config.perspective) for _ in range(4)]
    corners = ((dx[0], dy[0]), (width - dx[1], dy[1]), (width - dx[2], height - dy[2]), (dx[3], height - dy[3]))
    angle = math.radians(rng.uniform(-config.rotation, config.rotation))
    c, s = math.cos(angle), math.sin(angle)
    turned = [(c * x - s * y, s * x + c * y) for x, y in corners]
    left, top = (min(values) for values in zip(*turned, strict=True))
    right, bottom = (max(values) for values in zip(*turned, strict=True))
    scale = min(rng.uniform(*config.paper_scale), width / (right - left), height / (bottom - top))
    shift_x = rng.uniform(0, max(0.0, width - scale * (right - left)))
    shift_y = rng.uniform(0, max(0.0, height - scale * (bottom - top)))
    a, b, c2, d = ((scale * (x - left) + shift_x, scale * (y - top) + shift_y) for x, y in turned)
    return a, b, c2, d
