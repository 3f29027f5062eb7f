"""Document pages in the style of SynthDoG: text on paper, in perspective on a ground, with camera effects.

The order of steps keeps the labels correct. First, text is drawn on flat paper. Then the paper and the outlines of the
lines go through one homography and one elastic field. All later steps (blur, shadow, contrast, noise, JPEG) change
pixel values and move nothing. A label is the quadrilateral that encloses the outline.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image, ImageDraw

from megatron_vl.data.images.decode import encode_jpeg
from megatron_vl.data.synthetic.config import PageConfig, Split
from megatron_vl.data.synthetic.effects import photograph
from megatron_vl.data.synthetic.fonts import Font, Language
from megatron_vl.data.synthetic.geometry import Elastic, Perspective, Quad, elastic, enclose, outline, perspective
from megatron_vl.data.synthetic.layout import LineBox, PagePlan, plan_lines, plan_words
from megatron_vl.data.synthetic.lexicon import Corpus, paragraph
from megatron_vl.data.synthetic.scene import draw_until, split_of
from megatron_vl.data.synthetic.texture import Color, blurred, find_pictures, random_crop, random_picture, texture

PAPERS: tuple[Color, ...] = ((244, 242, 236), (235, 235, 238), (240, 232, 212), (226, 230, 224))
DESKS: tuple[Color, ...] = ((92, 74, 58), (70, 78, 88), (112, 108, 100), (58, 72, 62))
INKS: tuple[Color, ...] = ((20, 20, 24), (30, 34, 70), (64, 22, 22), (24, 52, 34))


@dataclass(frozen=True)
class PageLine:
    """A line of text and its position in pixels of the image."""

    text: str
    quad: Quad


@dataclass(frozen=True)
class Page:
    """A finished page."""

    image: bytes
    """Image as JPEG."""
    width: int
    height: int
    lines: tuple[PageLine, ...]
    language: str


class PageRenderer:
    """Planner and renderer of pages of one configuration; prepares its paper and its grounds once."""

    def __init__(self, config: PageConfig, *, fonts: tuple[Font, ...], chinese: tuple[Font, ...], seed: int) -> None:
        """Prepare paper and grounds. ``fonts`` has at least one English font. Empty ``chinese``: no Chinese pages."""
        self._config = config
        self._fonts = {"en": fonts, "zh": chinese}
        self._masks: dict[tuple[str, Font, int, int], Image.Image] = {}
        rng = np.random.default_rng(seed)
        side = max(config.width[1], config.height[1]) * 5 // 4
        self._papers = [texture(color, side, rng, fine=3.0, coarse=3.0) for color in PAPERS]
        coarse = 18.0 if config.background else 6.0
        self._desks = [texture(color, side, rng, fine=5.0, coarse=coarse) for color in DESKS]
        self._pictures = find_pictures(Path(config.background_dir)) if config.background_dir else ()
        files: dict[Language, str] = {"en": config.corpus_en, "zh": config.corpus_zh}
        self._corpora = {language: Corpus.read(Path(file)) for language, file in files.items() if file}

    def draw(self, rng: Random, *, split: Split, heldout_percent: int) -> Page:
        """Return a random page of ``split``. Raises ConfigError if the configuration leaves no room for one."""
        plan = draw_until(
            lambda: self._plan(rng),
            lambda plan: bool(plan.lines) and split_of(plan.key, heldout_percent) == split,
            "page",
        )
        return self.render(plan, rng)

    def render(self, plan: PagePlan, rng: Random) -> Page:
        """Render the page of a plan; paper, ink and camera effects vary with ``rng``."""
        size = (plan.width, plan.height)
        paper = random_crop(rng.choice(self._papers), *size, rng)
        ink = rng.choice(INKS)
        for line in plan.lines:
            paper.paste(ink, (line.x, line.y), self._mask(line))
        view = perspective(*size, plan.corners)
        image = self._ground(size, rng)
        image.paste(view.warp(paper, size), (0, 0), view.warp(Image.new("L", size, 255), size))
        field = None
        if self._config.elastic:
            field = elastic(size, self._config.elastic, np.random.default_rng(rng.getrandbits(64)))
            image = field.warp(image)
        image = photograph(image, self._config, rng)
        lines = tuple(PageLine(line.text, track(line, view, field)) for line in plan.lines)
        encoded = encode_jpeg(image, rng.randint(*self._config.jpeg_quality))
        return Page(encoded, *size, lines, plan.language)

    def _ground(self, size: tuple[int, int], rng: Random) -> Image.Image:
        if self._pictures:
            return blurred(random_picture(self._pictures, size, rng), self._config.background_blur, rng)
        return random_crop(rng.choice(self._desks), *size, rng)

    def _plan(self, rng: Random) -> PagePlan | None:
        config = self._config
        if config.layout == "words":
            return plan_words(rng, config, rng.choice(self._fonts["en"]))
        language: Language = "zh" if self._fonts["zh"] and rng.random() < config.chinese_share else "en"
        corpus = self._corpora.get(language)
        return plan_lines(rng, config, self._fonts[language], language, corpus.paragraph if corpus else paragraph)

    def _mask(self, line: LineBox) -> Image.Image:
        """Return the coverage of a line's letters, with its whole line height scaled to the line's box."""
        if self._config.layout == "lines":
            return draw_line(line)
        key = (line.text, line.font, line.width, line.height)
        if key not in self._masks:
            self._masks[key] = draw_line(line)
        return self._masks[key]


def track(line: LineBox, view: Perspective, field: Elastic | None) -> Quad:
    """Return the quadrilateral that encloses a line in the image."""
    sides = [view.points(side) for side in outline(line.x, line.y, line.width, line.height)]
    if field is None:  # straight edges stay straight
        a, b, c, d = ((float(side[0, 0]), float(side[0, 1])) for side in sides)
        return a, b, c, d
    return enclose([field.points(side) for side in sides])


def draw_line(line: LineBox) -> Image.Image:
    """Return the coverage (mode L) of a line in the size of its box: ascender to descender, or letters in squares."""
    if line.vertical:
        mask = Image.new("L", (line.width, line.height), 0)
        draw, loaded = ImageDraw.Draw(mask), line.font.load_height(line.width)
        for number, letter in enumerate(line.text):
            middle = line.width / 2, (number + 0.5) * line.width
            draw.text(middle, letter, fill=255, font=loaded, anchor="mm")
        return mask
    loaded = line.font.load_height(line.height)
    ascent, descent = loaded.getmetrics()
    mask = Image.new("L", (max(1, math.ceil(loaded.getlength(line.text))), ascent + descent), 0)
    ImageDraw.Draw(mask).text((0, 0), line.text, fill=255, font=loaded)
    return mask.resize((line.width, line.height), Image.Resampling.BILINEAR)
