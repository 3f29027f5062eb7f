"""Camera effects on a page: blur, motion, shadow, tint, contrast, noise.

Each changes pixel values and moves nothing (kernels are symmetric), so labels stay correct. An effect with zero
strength draws no random number.
"""

from __future__ import annotations

import math
from random import Random

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from megatron_vl.data.synthetic.config import PageConfig

Levels = npt.NDArray[np.float32]


def photograph(image: Image.Image, config: PageConfig, rng: Random) -> Image.Image:
    """Return the image with camera effects up to the strengths of the configuration."""
    if config.max_blur:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0, config.max_blur)))
    levels = np.asarray(image, dtype=np.float32)
    if config.motion_blur > 1 and rng.random() < 0.5:
        levels = move(levels, rng.randint(2, config.motion_blur), rng.uniform(0, math.pi))
    if config.shadow:
        levels = levels * _shadow(levels.shape[1], levels.shape[0], config.shadow * rng.random(), rng)
    if config.tint and rng.random() < 0.2:
        levels = levels * np.array([1 + rng.uniform(-config.tint, config.tint) for _ in range(3)], dtype=np.float32)
    contrast = 1 + rng.uniform(-config.contrast, config.contrast)
    brightness = 128 * rng.uniform(-config.contrast, config.contrast)
    levels = (levels - 128) * contrast + 128 + brightness
    if config.max_noise:
        noise = np.random.default_rng(rng.getrandbits(64)).standard_normal(levels.shape[:2], dtype=np.float32)
        levels += rng.uniform(0, config.max_noise) * noise[:, :, None]
    return Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8))


def move(levels: Levels, length: int, angle: float) -> Levels:
    """Return the mean of ``length`` copies along a line at ``angle``, the middle one in place; edges are repeated.

    ``levels`` and the result are float32[height, width, 3].
    """
    height, width = levels.shape[:2]
    padded = np.pad(levels, ((length, length), (length, length), (0, 0)), mode="edge")
    mean = np.zeros_like(levels)
    steps = np.linspace(-(length - 1) / 2, (length - 1) / 2, length)
    for x, y in zip(np.rint(steps * math.cos(angle)), np.rint(steps * math.sin(angle)), strict=True):
        top, left = length + int(y), length + int(x)
        mean += padded[top : top + height, left : left + width] / length
    return mean


def _shadow(width: int, height: int, strength: float, rng: Random) -> Levels:
    """Return float32[height, width, 1]: a soft edge of shadow across the page in a random direction."""
    angle = rng.uniform(0, 2 * math.pi)
    x = np.linspace(-1, 1, width, dtype=np.float32)[None, :] * math.cos(angle)
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None] * math.sin(angle)
    edge = 1 / (1 + np.exp(-4 * (x + y + rng.uniform(-0.8, 0.8))))
    return np.asarray(1 - strength * edge, dtype=np.float32)[:, :, None]
