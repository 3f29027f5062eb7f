"""Prepared tiles of ground and paper, larger than any image, from which images take random crops."""

from __future__ import annotations

from random import Random

import numpy as np
from PIL import Image

Color = tuple[int, int, int]


def texture(color: Color, size: int, rng: np.random.Generator, *, fine: float, coarse: float = 0.0) -> Image.Image:
    """A square RGB tile of ``size`` pixels: noise of deviation ``fine``, clouds of deviation ``coarse``."""
    levels = np.array(color) + rng.normal(0.0, fine, (size, size, 1)) + rng.normal(0.0, fine / 3, (size, size, 3))
    if coarse:
        clouds = Image.fromarray(rng.normal(0.0, coarse, (16, 16)).astype(np.float32))
        levels += np.asarray(clouds.resize((size, size), Image.Resampling.BICUBIC))[:, :, None]
    return Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8))


def random_crop(tile: Image.Image, width: int, height: int, rng: Random) -> Image.Image:
    """A crop of ``width`` x ``height`` at a random place of a tile at least as large."""
    left, top = rng.randint(0, tile.width - width), rng.randint(0, tile.height - height)
    return tile.crop((left, top, left + width, top + height))
