"""Document pages in the manner of SynthDoG: text on paper, seen in perspective on a ground, with a camera's
flaws.

Order of things, and why the labels stay true: text is drawn on flat paper; paper and quadrilaterals go
through one homography; everything after that (shadow, contrast, blur, noise, JPEG) changes values of pixels
and moves nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

from megatron_vl.data.image import encode_jpeg
from megatron_vl.data.synthetic.config import PageConfig, Split
from megatron_vl.data.synthetic.fonts import Font
from megatron_vl.data.synthetic.geometry import Quad, perspective
from megatron_vl.data.synthetic.layout import LineBox, PagePlan, plan_lines, plan_words
from megatron_vl.data.synthetic.scene import draw_until, split_of
from megatron_vl.data.synthetic.texture import Color, random_crop, texture

PAPERS: tuple[Color, ...] = ((244, 242, 236), (235, 235, 238), (240, 232, 212), (226, 230, 224))
DESKS: tuple[Color, ...] = ((92, 74, 58), (70, 78, 88), (112, 108, 100), (58, 72, 62))
INKS: tuple[Color, ...] = ((20, 20, 24), (30, 34, 70), (64, 22, 22), (24, 52, 34))


@dataclass(frozen=True)
class PageLine:
    """A line of text and where it is seen, in pixels of the image."""

    text: str
    quad: Quad


@dataclass(frozen=True)
class Page:
    """A finished page."""

    image: bytes
    """JPEG."""
    width: int
    height: int
    lines: tuple[PageLine, ...]
    language: str


class PageRenderer:
    """Plans and draws pages of one configuration; prepares its paper and its grounds once."""

    def __init__(self, config: PageConfig, *, fonts: tuple[Font, ...], chinese: tuple[Font, ...], seed: int) -> None:
        """``fonts``: at least one for English. ``chinese``: none means no Chinese pages."""
        self._config = config
        self._fonts = {"en": fonts, "zh": chinese}
        self._masks: dict[tuple[str, Font, int, int], Image.Image] = {}
        rng = np.random.default_rng(seed)
        side = max(config.width[1], config.height[1]) * 5 // 4
        self._papers = [texture(color, side, rng, fine=3.0, coarse=3.0) for color in PAPERS]
        coarse = 18.0 if config.background else 6.0
        self._desks = [texture(color, side, rng, fine=5.0, coarse=coarse) for color in DESKS]

    def draw(self, rng: Random, *, split: Split, heldout_percent: int) -> Page:
        """A random page of ``split``; raises ConfigError if the configuration leaves no room for one."""
        plan = draw_until(
            lambda: self._plan(rng),
            lambda plan: bool(plan.lines) and split_of(plan.key, heldout_percent) == split,
            "page",
        )
        return self.render(plan, rng)

    def render(self, plan: PagePlan, rng: Random) -> Page:
        """The page of a plan; paper, ink and flaws vary with ``rng``."""
        size = (plan.width, plan.height)
        paper = random_crop(rng.choice(self._papers), *size, rng)
        ink = rng.choice(INKS)
        for line in plan.lines:
            paper.paste(ink, (line.x, line.y), self._mask(plan, line))
        view = perspective(*size, plan.corners)
        desk = random_crop(rng.choice(self._desks), *size, rng)
        desk.paste(view.warp(paper, size), (0, 0), view.warp(Image.new("L", size, 255), size))
        image = self._flaws(desk, rng)
        lines = tuple(PageLine(b.text, view.rectangle(b.x, b.y, b.width, b.height)) for b in plan.lines)
        encoded = encode_jpeg(image, rng.randint(*self._config.jpeg_quality))
        return Page(encoded, *size, lines, plan.language)

    def _plan(self, rng: Random) -> PagePlan | None:
        config = self._config
        if config.layout == "words":
            return plan_words(rng, config, rng.choice(self._fonts["en"]))
        if self._fonts["zh"] and rng.random() < config.chinese_share:
            return plan_lines(rng, config, rng.choice(self._fonts["zh"]), "zh")
        return plan_lines(rng, config, rng.choice(self._fonts["en"]), "en")

    def _mask(self, plan: PagePlan, line: LineBox) -> Image.Image:
        """Coverage of a line's letters, its whole line height stretched to the line's box."""
        if self._config.layout == "lines":
            return draw_line(plan.font, line)
        key = (line.text, plan.font, line.width, line.height)
        if key not in self._masks:
            self._masks[key] = draw_line(plan.font, line)
        return self._masks[key]

    def _flaws(self, image: Image.Image, rng: Random) -> Image.Image:
        config = self._config
        if config.max_blur:
            image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0, config.max_blur)))
        levels = np.asarray(image, dtype=np.float32)
        if config.shadow:
            levels = levels * _shadow(levels.shape[1], levels.shape[0], config.shadow * rng.random(), rng)
        contrast = 1 + rng.uniform(-config.contrast, config.contrast)
        brightness = 128 * rng.uniform(-config.contrast, config.contrast)
        levels = (levels - 128) * contrast + 128 + brightness
        if config.max_noise:
            noise = np.random.default_rng(rng.getrandbits(64)).standard_normal(levels.shape[:2], dtype=np.float32)
            levels += rng.uniform(0, config.max_noise) * noise[:, :, None]
        return Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8))


def draw_line(font: Font, line: LineBox) -> Image.Image:
    """Coverage (mode L) of a line of text, ascender to descender, as large as its box."""
    loaded = font.load_height(line.height)
    ascent, descent = loaded.getmetrics()
    mask = Image.new("L", (max(1, math.ceil(loaded.getlength(line.text))), ascent + descent), 0)
    ImageDraw.Draw(mask).text((0, 0), line.text, fill=255, font=loaded)
    return mask.resize((line.width, line.height), Image.Resampling.BILINEAR)


def _shadow(width: int, height: int, strength: float, rng: Random) -> npt.NDArray[np.float32]:
    """float32[height, width, 1]: a soft edge of shadow across the page in a random direction."""
    angle = rng.uniform(0, 2 * math.pi)
    x = np.linspace(-1, 1, width, dtype=np.float32)[None, :] * math.cos(angle)
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None] * math.sin(angle)
    edge = 1 / (1 + np.exp(-4 * (x + y + rng.uniform(-0.8, 0.8))))
    return np.asarray(1 - strength * edge, dtype=np.float32)[:, :, None]
