"""Pixels once they are decoded: the blank image, and what the model makes of uint8.

Apart from ``decode.py``, so that training alone, which never decodes an image in its own process, needs no Pillow.
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
"""The gray that normalizes to (almost) zero: the color of a blank image."""


def blank_pixels(num_images: int, image_size: int) -> npt.NDArray[np.uint8]:
    """uint8[num_images, 3, image_size, image_size] of the blank gray."""
    color = np.array(BLANK_RGB, dtype=np.uint8).reshape(1, 3, 1, 1)
    return np.broadcast_to(color, (num_images, 3, image_size, image_size)).copy()


def normalize(pixels: torch.Tensor) -> torch.Tensor:
    """uint8[n, 3, H, W] -> float32[n, 3, H, W]: to [0, 1], then CLIP's mean and deviation, on the device of
    the input."""
    mean, deviation = _statistics(pixels.device)
    return (pixels.float() / 255).sub_(mean).div_(deviation)


@functools.cache
def _statistics(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """float32[1, 3, 1, 1] each; kept, since the CPU would wait for a device that they are copied to anew."""
    import torch

    mean, deviation = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD))
    return mean, deviation
