"""Pixels of a scene. Each shape touches all four sides of its box, and its color fills the middle of the box.

Shapes are drawn once, at four times their size, and reduced to a mask. A scene is then a crop of a prepared noisy
ground, and one paste per object. So a tiny image takes a fraction of a millisecond.
"""

from __future__ import annotations

import math
from random import Random

import numpy as np
from PIL import Image, ImageDraw

from megatron_vl.data.images.decode import encode_jpeg
from megatron_vl.data.synthetic.config import SceneConfig
from megatron_vl.data.synthetic.scene import Scene
from megatron_vl.data.synthetic.texture import Color, random_crop, texture
from megatron_vl.errors import ConfigError

Outline = tuple[tuple[float, float], ...]

COLORS: dict[str, Color] = {
    "red": (215, 35, 40),
    "green": (35, 160, 60),
    "blue": (40, 70, 215),
    "yellow": (245, 220, 40),
    "black": (15, 15, 15),
    "white": (250, 250, 250),
    "orange": (245, 140, 30),
    "purple": (125, 45, 160),
    "pink": (250, 150, 190),
    "brown": (115, 70, 35),
}
GROUNDS: tuple[Color, ...] = (
    (150, 150, 150),
    (165, 155, 145),
    (145, 158, 168),
    (150, 165, 150),
    (172, 160, 172),
)
SHADE = 10
"""Greatest difference between an object's color and the color in the table, in each channel."""
OVERSAMPLING = 4


def _star() -> Outline:
    points = []
    for corner in range(10):
        radius = 1.0 if corner % 2 == 0 else 0.45
        angle = math.pi * corner / 5
        points.append((radius * math.sin(angle), -radius * math.cos(angle)))
    return tuple(points)


def _heart() -> Outline:
    points = []
    for step in range(48):
        t = 2 * math.pi * step / 48
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((16 * math.sin(t) ** 3, -y))
    return tuple(points)


def _polygon(corners: int) -> Outline:
    angles = (2 * math.pi * (corner + 0.5) / corners for corner in range(corners))
    return tuple((math.sin(angle), math.cos(angle)) for angle in angles)


OUTLINES: dict[str, Outline] = {
    "circle": _polygon(96),
    "square": ((0, 0), (1, 0), (1, 1), (0, 1)),
    "triangle": ((0.5, 0), (1, 1), (0, 1)),
    "star": _star(),
    "cross": ((1, 0), (2, 0), (2, 1), (3, 1), (3, 2), (2, 2), (2, 3), (1, 3), (1, 2), (0, 2), (0, 1), (1, 1)),
    "diamond": ((0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)),
    "hexagon": _polygon(6),
    "heart": _heart(),
}
"""Corners in any units; they are scaled to the box."""


class SceneRenderer:
    """Renderer of scenes of one configuration; prepares its grounds and masks once."""

    def __init__(self, config: SceneConfig, seed: int) -> None:
        """Prepare grounds and masks. Raises ConfigError if the configuration names an unknown shape or color."""
        for kind, names, table in (("shape", config.shapes, OUTLINES), ("color", config.colors, COLORS)):
            for unknown in sorted(set(names) - set(table)):
                raise ConfigError(f"scene.{kind}s: {unknown!r} cannot be drawn; known are {', '.join(table)}")
        self._config = config
        self._masks = {
            (shape, side): draw_mask(OUTLINES[shape], side) for shape in config.shapes for _, side in config.sizes
        }
        noise = np.random.default_rng(seed)
        self._grounds = [texture(color, 2 * config.image_size, noise, fine=config.noise) for color in GROUNDS]

    def render(self, scene: Scene, rng: Random) -> Image.Image:
        """Return the scene's image in RGB; ground and shade of the colors vary with ``rng``."""
        size = scene.image_size
        image = random_crop(rng.choice(self._grounds), size, size, rng)
        for item in scene.objects:
            shade = [min(max(level + rng.randint(-SHADE, SHADE), 0), 255) for level in COLORS[item.color]]
            image.paste((shade[0], shade[1], shade[2]), item.corners, self._masks[item.shape, item.side])
        return image

    def encode(self, scene: Scene, rng: Random) -> bytes:
        """Return the scene's image as JPEG."""
        return encode_jpeg(self.render(scene, rng), self._config.jpeg_quality)


def draw_mask(outline: Outline, side: int) -> Image.Image:
    """Return the coverage (mode L) of an outline scaled to a square of ``side`` pixels."""
    xs, ys = [x for x, _ in outline], [y for _, y in outline]
    large = side * OVERSAMPLING
    scale_x, scale_y = (large - 1) / (max(xs) - min(xs)), (large - 1) / (max(ys) - min(ys))
    mask = Image.new("L", (large, large), 0)
    points = [((x - min(xs)) * scale_x, (y - min(ys)) * scale_y) for x, y in outline]
    ImageDraw.Draw(mask).polygon(points, fill=255)
    return mask.resize((side, side), Image.Resampling.BOX)
