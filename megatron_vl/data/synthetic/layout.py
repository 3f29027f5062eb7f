"""Where text stands on a page before anything is drawn: one word to a box on a coarse grid, or columns of
lines.

The plan of a page is complete (texts, boxes, corners, font), so its key, and with it its side of the split,
is known before a pixel is drawn.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from megatron_vl.data.synthetic.config import PageConfig
from megatron_vl.data.synthetic.fonts import Font, Language, LoadedFont
from megatron_vl.data.synthetic.geometry import Quad
from megatron_vl.data.synthetic.lexicon import WORDS, paragraph


@dataclass(frozen=True)
class LineBox:
    """A line of text and its upright box on the paper, in pixels."""

    text: str
    x: int
    y: int
    width: int
    height: int


@dataclass(frozen=True)
class PagePlan:
    """A page before it is drawn."""

    width: int
    height: int
    lines: tuple[LineBox, ...]
    corners: Quad
    """Where the corners of the paper are seen."""
    font: Font
    language: Language

    @property
    def key(self) -> str:
        """Canonical content: texts, places and perspective (not font, ink, paper, noise)."""
        lines = "|".join(f"{line.text} {line.x},{line.y}" for line in self.lines)
        return f"{lines}|{self.corners}"


def plan_words(rng: Random, config: PageConfig, font: Font) -> PagePlan | None:
    """Words on the grid, one to a row; nothing if a word is wider than the page."""
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
        lines.append(LineBox(word, x, y, config.letter_width * len(word), line_height))
    corners = _lean(width, height, rng.choice(config.perspective), rng)
    return PagePlan(width, height, tuple(lines), corners, font, "en")


def plan_lines(rng: Random, config: PageConfig, font: Font, language: Language) -> PagePlan:
    """Columns of running text, cut into lines where the width is full."""
    width, height = rng.randint(*config.width), rng.randint(*config.height)
    columns = rng.randint(1, config.max_columns)
    margin, gap = round(width * rng.uniform(0.04, 0.1)), round(width * 0.04)
    room = (width - 2 * margin - (columns - 1) * gap) // columns
    lines: list[LineBox] = []
    for column in range(columns):
        size = rng.randint(*config.line_height)
        count = rng.randint(*config.num_lines)
        y = margin + rng.randint(0, 2 * size)
        spacing = round(size * rng.uniform(1.05, 1.6))
        loaded = font.load_height(size)
        text = paragraph(rng, 80 * count, language)
        x = margin + column * (room + gap)
        for piece in wrap(text, loaded, room, language)[:count]:
            if y + size > height - margin:
                break
            lines.append(LineBox(piece, x, y, max(1, round(loaded.getlength(piece))), size))
            y += spacing
    return PagePlan(width, height, tuple(lines), _corners(width, height, config, rng), font, language)


def wrap(text: str, font: LoadedFont, width: int, language: Language) -> list[str]:
    """``text`` in lines no wider than ``width`` pixels, broken at blanks (Chinese: anywhere)."""
    units, glue = (text.split(" "), " ") if language == "en" else (list(text), "")
    lines = []
    line = ""
    for unit in units:
        longer = f"{line}{glue}{unit}" if line else unit
        if line and font.getlength(longer) > width:
            lines.append(line)
            line = unit
        else:
            line = longer
    return [*lines, line] if line else lines


def _lean(width: int, height: int, by: float, rng: Random) -> Quad:
    """One edge of the paper shorter by twice ``by``: the paper leans away from the viewer on that side."""
    left_top = left_bottom = right_top = right_bottom = 0.0
    if rng.random() < 0.5:
        left_top = left_bottom = by
    else:
        right_top = right_bottom = by
    return (0, left_top), (width, right_top), (width, height - right_bottom), (0, height - left_bottom)


def _corners(width: int, height: int, config: PageConfig, rng: Random) -> Quad:
    """Every corner moved inwards by its own amount."""
    dx = [rng.uniform(*config.perspective) for _ in range(4)]
    dy = [rng.uniform(*config.perspective) for _ in range(4)]
    return (
        (dx[0], dy[0]),
        (width - dx[1], dy[1]),
        (width - dx[2], height - dy[2]),
        (dx[3], height - dy[3]),
    )
