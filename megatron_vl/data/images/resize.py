"""Pillow's bicubic resize to a square, and a compiled version with bit-identical results in less than half the time.

The image is resized along x, rounded to bytes, then resized along y. Pillow did this when the original was trained.
From version 13 on, Pillow begins with y if an image is tall, which gives different pixels. So the two passes are
requested separately.

In both passes, an output line is a sum of neighboring input lines, each multiplied by a fixed-point weight of 22 bits.
Pillow adds pixel by pixel, three bytes at a time. ``sum_lines`` adds whole lines, which a compiler turns into vector
instructions. For the pass along x the image is transposed first, which costs less time than it saves.

The compiler is numba. It takes a second to load and, once on each machine, three seconds to compile. So decode workers
load it after a number of images (``decode_workers.py``), and nothing else loads it. If it cannot be loaded, Pillow is
used.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from PIL import Image

Bytes = npt.NDArray[np.uint8]
Resize = Callable[[Image.Image, int], Bytes]
"""Function from an RGB image to uint8[3, size, size], resized to the square."""

_BITS = 22


def resize(image: Image.Image, size: int) -> Bytes:
    """Resize an RGB image to a square with Pillow; return uint8[3, size, size]."""
    narrow = image.resize((size, image.height), Image.Resampling.BICUBIC)
    squashed = narrow.resize((size, size), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(squashed).transpose(2, 0, 1))


def resize_by_lines(image: Image.Image, size: int, *, add: Callable[[Bytes, int], Bytes]) -> Bytes:
    """Resize like ``resize``, by two passes of ``add`` (plain or compiled ``sum_lines``); uint8[3, size, size]."""
    columns = np.asarray(image.transpose(Image.Transpose.TRANSPOSE))
    width, height, _ = columns.shape
    narrow = add(columns.reshape(width, height * 3), size)
    rows = np.ascontiguousarray(narrow.T).reshape(height, 3 * size)
    return np.ascontiguousarray(add(rows, size).reshape(size, 3, size).transpose(1, 0, 2))


def sum_lines(lines: Bytes, size: int) -> Bytes:
    """Resize uint8[n, length] to uint8[size, length]; each output line is the bicubic mean of nearby input lines.

    Weights and sums equal Pillow's, operation by operation. This source is also what numba compiles.
    """
    count, length = lines.shape
    result = np.empty((size, length), dtype=np.uint8)
    sums = np.empty(length, dtype=np.int32)
    scale = count / size
    stretch = max(scale, 1.0)  # the filter is widened where the image shrinks
    reach = 2.0 * stretch
    weights = np.empty(2 * math.ceil(reach) + 1, dtype=np.float64)
    for row in range(size):
        center = (row + 0.5) * scale
        first = max(int(center - reach + 0.5), 0)
        number = min(int(center + reach + 0.5), count) - first
        total = 0.0
        for index in range(number):
            x = abs((index + first - center + 0.5) * (1.0 / stretch))
            if x < 1.0:
                weights[index] = (1.5 * x - 2.5) * x * x + 1.0
            elif x < 2.0:
                weights[index] = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
            else:
                weights[index] = 0.0
            total += weights[index]
        sums[:] = 1 << (_BITS - 1)
        for index in range(number):
            weight = weights[index] / total
            fixed = np.int32(weight * (1 << _BITS) + (-0.5 if weight < 0.0 else 0.5))
            line = lines[first + index]
            for place in range(length):
                sums[place] += fixed * np.int32(line[place])
        for place in range(length):
            result[row, place] = min(max(sums[place] >> _BITS, 0), 255)
    return result


def compiled_resize() -> Resize | None:
    """Return ``resize`` in compiled code; takes seconds.

    Return None if numba cannot be loaded (it refuses a newer NumPy than it knows) or cannot store compiled code.
    """
    try:
        import numba

        lines = numba.types.Array(numba.uint8, 2, "C", readonly=True)
        add = numba.njit(numba.uint8[:, ::1](lines, numba.int64), cache=True)(sum_lines)
    except (ImportError, RuntimeError):
        return None
    return lambda image, size: resize_by_lines(image, size, add=add)
