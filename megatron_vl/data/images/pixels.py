"""Operations on decoded pixels: the blank image, and normalization for the model.

This is separate from ``decode.py``, so that training needs no Pillow: the training process never decodes an image
itself.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
BLANK_RGB = tuple(round(255 * mean) for mean in IMAGE_MEAN)
"""Color of a blank image: the gray that normalizes to (almost) zero."""


def blank_pixels(num_images: int, image_size: int) -> npt.NDArray[np.uint8]:
    """Return blank images as uint8[num_images, 3, image_size, image_size]."""
    color = np.array(BLANK_RGB, dtype=np.uint8).reshape(1, 3, 1, 1)
    return np.broadcast_to(color, (num_images, 3, image_size, image_size)).copy()


def normalize(pixels: torch.Tensor) -> torch.Tensor:
    """Scale uint8[n, 3, H, W] to [0, 1] and apply CLIP's mean and deviation; return float32[n, 3, H, W].

    The result is on the device of the input.
    """
    mean, deviation = _statistics(pixels.device)
    return (pixels.float() / 255).sub_(mean).div_(deviation)


@functools.cache
def _statistics(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and deviation, float32[1, 3, 1, 1] each, from a cache: the CPU would wait for a new copy."""
    import torch

    mean, deviation = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD))
    return mean, deviation
