"""Content of a picture: objects with shape, color, size and a box; and the split it belongs to.

Invariants: boxes lie inside the image and do not overlap. No two objects share both color and shape (with
``distinct_attributes``: neither). The key is the scene's content in canonical order, without what no text mentions
(ground, noise, shade). So two pictures with the same key have the same true texts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import TypeVar

from megatron_vl.data.synthetic.config import SceneConfig, Split
from megatron_vl.errors import ConfigError

T = TypeVar("T")
ATTEMPTS = 200


@dataclass(frozen=True, order=True)
class SceneObject:
    """One object. Objects sort in reading order, top to bottom, then left to right."""

    y: int
    """Top edge in pixels."""
    x: int
    """Left edge in pixels."""
    side: int
    """Width and height in pixels."""
    size: str
    color: str
    shape: str

    @property
    def corners(self) -> tuple[int, int, int, int]:
        """(x1, y1, x2, y2) in pixels."""
        return self.x, self.y, self.x + self.side, self.y + self.side

    def overlaps(self, other: SceneObject) -> bool:
        """Return whether the two boxes share a pixel."""
        a, b = self.corners, other.corners
        return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


@dataclass(frozen=True)
class Scene:
    """Objects in reading order on a square image."""

    image_size: int
    objects: tuple[SceneObject, ...]

    @property
    def key(self) -> str:
        """Canonical content, equal for two scenes exactly if all true statements about them are equal."""
        return "|".join(f"{o.size} {o.color} {o.shape} {o.x},{o.y}" for o in self.objects)


def split_of(key: str, heldout_percent: int) -> Split:
    """Return the split that a content belongs to, for every seed."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return "heldout" if int.from_bytes(digest, "big") % 100 < heldout_percent else "train"


def draw_until(draw: Callable[[], T | None], accept: Callable[[T], bool], what: str) -> T:
    """Return the first draw that is not None and is accepted. Raises ConfigError if none of many draws is."""
    for _ in range(ATTEMPTS):
        value = draw()
        if value is not None and accept(value):
            return value
    raise ConfigError(f"synthetic data: no {what} fits after {ATTEMPTS} attempts; relax its configuration")


def sample_scene(rng: Random, config: SceneConfig, *, split: Split, heldout_percent: int) -> Scene:
    """Return a random scene of ``split``. Raises ConfigError if the configuration leaves no room for one."""
    return draw_until(
        lambda: _draw_scene(rng, config), lambda scene: split_of(scene.key, heldout_percent) == split, "scene"
    )


def _draw_scene(rng: Random, config: SceneConfig) -> Scene | None:
    num_objects = rng.choices(range(1, len(config.object_weights) + 1), config.object_weights)[0]
    objects: list[SceneObject] = []
    for _ in range(num_objects):
        found = _draw_object(rng, config, objects)
        if found is None:
            return None
        objects.append(found)
    return Scene(config.image_size, tuple(sorted(objects)))


def _draw_object(rng: Random, config: SceneConfig, others: list[SceneObject]) -> SceneObject | None:
    for _ in range(20):
        size, side = rng.choice(config.sizes)
        x, y = (rng.randrange(0, config.image_size - side + 1, config.step) for _ in range(2))
        found = SceneObject(y, x, side, size, rng.choice(config.colors), rng.choice(config.shapes))
        if not any(found.overlaps(other) or _too_alike(found, other, config) for other in others):
            return found
    return None


def _too_alike(a: SceneObject, b: SceneObject, config: SceneConfig) -> bool:
    if config.distinct_attributes:
        return a.color == b.color or a.shape == b.shape
    return a.color == b.color and a.shape == b.shape
