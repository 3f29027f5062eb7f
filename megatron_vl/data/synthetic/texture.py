"""Grounds and papers: prepared tiles, larger than any image, of which images take random crops; and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from megatron_vl.data.images.decode import decode_image
from megatron_vl.errors import ConfigError, SkipSample

Color = tuple[int, int, int]


def texture(color: Color, size: int, rng: np.random.Generator, *, fine: float, coarse: float = 0.0) -> Image.Image:
    """Return a square RGB tile of ``size`` pixels: noise of deviation ``fine``, clouds of deviation ``coarse``."""
    levels = np.array(color) + rng.normal(0.0, fine, (size, size, 1)) + rng.normal(0.0, fine / 3, (size, size, 3))
    if coarse:
        clouds = Image.fromarray(rng.normal(0.0, coarse, (16, 16)).astype(np.float32))
        levels += np.asarray(clouds.resize((size, size), Image.Resampling.BICUBIC))[:, :, None]
    return Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8))


def random_crop(tile: Image.Image, width: int, height: int, rng: Random) -> Image.Image:
    """Return a crop of ``width`` x ``height`` at a random position of a tile that is at least as large."""
    left, top = rng.randint(0, tile.width - width), rng.randint(0, tile.height - height)
    return tile.crop((left, top, left + width, top + height))


def find_pictures(folder: Path) -> tuple[Path, ...]:
    """Return the pictures of a folder and its subfolders, sorted by name. Raises ConfigError if there are none."""
    wanted = (".jpg", ".jpeg", ".png", ".webp")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in wanted and path.is_file())
    if not found:
        what = "holds no picture" if folder.is_dir() else "there is no such folder"
        raise ConfigError(f"--background-dir {folder}: {what}; give one with pictures ({', '.join(wanted)})")
    return tuple(found)


def random_picture(paths: Sequence[Path], size: tuple[int, int], rng: Random) -> Image.Image:
    """Return one of the pictures, cut to ``size``. Raises ConfigError if several in a row are not readable."""
    problem = ""
    for _ in range(10):
        path = rng.choice(paths)
        try:
            return ImageOps.fit(decode_image(path.read_bytes()), size, Image.Resampling.BILINEAR)
        except (SkipSample, OSError) as error:
            problem = f"{path}: {error}"
    raise ConfigError(f"--background-dir: ten unreadable pictures in a row, the last {problem}")


def blurred(image: Image.Image, greatest: float, rng: Random) -> Image.Image:
    """Return the image blurred by a random radius."""
    return image.filter(ImageFilter.GaussianBlur(rng.uniform(0, greatest))) if greatest else image
