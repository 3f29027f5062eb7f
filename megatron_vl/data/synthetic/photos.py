"""The photographs inside scikit-image's wheel, with captions written for this project after looking at each.

Only files in the installed package are used. scikit-image itself is not imported and downloads nothing.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from megatron_vl.data.synthetic.config import Split


@dataclass(frozen=True)
class Photo:
    """A photograph and its caption."""

    file: str
    caption: str
    split: Split


PHOTOS: tuple[Photo, ...] = (
    Photo("astronaut.png", "a smiling astronaut in an orange space suit in front of a flag", "train"),
    Photo("camera.png", "a man in a black coat looks through a camera on a tripod", "train"),
    Photo("chelsea.png", "the face of an orange cat with green eyes", "train"),
    Photo("coffee.png", "a red cup of coffee on a red saucer with a spoon", "train"),
    Photo("rocket.jpg", "a white rocket stands between towers in the evening", "train"),
    Photo("motorcycle_left.png", "a red motorcycle in a garage", "train"),
    Photo("brick.png", "rows of gray bricks", "train"),
    Photo("grass.png", "a lawn with leaves seen from above", "train"),
    Photo("moon.png", "craters on the surface of the moon", "train"),
    Photo("horse.png", "the black outline of a horse on white", "train"),
    Photo("coins.png", "four rows of old coins on a dark ground", "heldout"),
    Photo("motorcycle_right.png", "a red motorcycle in front of shelves in a garage", "train"),
    Photo("gravel.png", "a ground of small gray stones", "heldout"),
    Photo("hubble_deep_field.jpg", "many galaxies in a black sky", "heldout"),
)


def find_photos(split: Split) -> list[tuple[Photo, Path]]:
    """Return the photographs of a split in the installed scikit-image; none if it is not installed."""
    package = importlib.util.find_spec("skimage")
    if package is None or package.origin is None:
        return []
    folder = Path(package.origin).parent / "data"
    found = [(photo, folder / photo.file) for photo in PHOTOS if photo.split == split]
    return [(photo, path) for photo, path in found if path.is_file()]
