"""Pillow's bicubic filter to a square; and the same in compiled code, equal bit by bit, in less than half the time.

The image is resized along x, rounded to bytes, then resized along y. That is what Pillow did when the original was
trained; from version 13 on it begins with y where an image is tall, which gives other pixels. So the two passes are
asked for one by one.

Either way an output line is a sum of neighboring input lines, each times a weight in fixed point of 22 bits. Pillow
adds pixel by pixel, three bytes at a time; ``sum_lines`` adds whole lines, which a compiler turns into vector
instructions. For the pass along x the image is transposed first, which costs less than it saves.

The compiler is numba, which takes a second to load and, once on each machine, three to compile. So decode workers turn
to it after a while (``decode_workers.py``), nothing else loads it, and where it does not load, Pillow goes on.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from PIL import Image

Bytes = npt.NDArray[np.uint8]
Resize = Callable[[Image.Image, int], Bytes]
"""uint8[3, size, size] of an RGB image, squashed to the square."""

_BITS = 22


def resize(image: Image.Image, size: int) -> Bytes:
    """uint8[3, size, size] of an RGB image, squashed to the square, by Pillow."""
    narrow = image.resize((size, image.height), Image.Resampling.BICUBIC)
    squashed = narrow.resize((size, size), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(squashed).transpose(2, 0, 1))


def resize_by_lines(image: Image.Image, size: int, *, add: Callable[[Bytes, int], Bytes]) -> Bytes:
    """The same by two passes of ``add``: ``sum_lines``, compiled or not."""
    columns = np.asarray(image.transpose(Image.Transpose.TRANSPOSE))
    width, height, _ = columns.shape
    narrow = add(columns.reshape(width, height * 3), size)
    rows = np.ascontiguousarray(narrow.T).reshape(height, 3 * size)
    return np.ascontiguousarray(add(rows, size).reshape(size, 3, size).transpose(1, 0, 2))


def sum_lines(lines: Bytes, size: int) -> Bytes:
    """uint8[size, length] of uint8[n, length]: every line of the result is a bicubic mean of lines around its place.

    Weights and sums are Pillow's, operation by operation. This very text is what gets compiled.
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
    """``resize`` in compiled code; takes seconds.

    None where numba does not load (it refuses a NumPy newer than itself) or can keep no compiled code.
    """
    try:
        import numba

        lines = numba.types.Array(numba.uint8, 2, "C", readonly=True)
        add = numba.njit(numba.uint8[:, ::1](lines, numba.int64), cache=True)(sum_lines)
    except (ImportError, RuntimeError):
        return None
    return lambda image, size: resize_by_lines(image, size, add=add)
