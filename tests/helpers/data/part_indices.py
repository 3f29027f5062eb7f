"""Indices of parts made directly, for tests of what follows from numbers alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_vl.data.prepare.part_files import KEPT, PartIndex


@dataclass(frozen=True)
class MadeUp:
    """A sample of a part: tokens, and the images it has as (digest, perceptual hash)."""

    length: int = 1
    images: tuple[tuple[int, int], ...] = ()
    task: int = 0


def digest(number: int) -> bytes:
    """32 bytes that begin alike for many numbers, so that equal beginnings are no equal digests."""
    return bytes([number % 2]) * 8 + number.to_bytes(24, "little")


def part_index(samples: Sequence[MadeUp]) -> PartIndex:
    """The index of a part that has stored each of its images once."""
    images = list(dict.fromkeys(image for sample in samples for image in sample.images))
    ids = [images.index(image) for sample in samples for image in sample.images]

    def array(values: Sequence[int], kind: str) -> npt.NDArray[Any]:
        return np.array(values, dtype=kind)

    return PartIndex(
        reasons=(),
        examples=(),
        outcomes=array([KEPT] * len(samples), "int16"),
        tasks=array([sample.task for sample in samples], "int8"),
        offsets=array([1000 * place for place in range(len(samples))], "int64"),
        lengths=array([sample.length for sample in samples], "int32"),
        key_sizes=array([1] * len(samples), "int32"),
        image_counts=array([len(sample.images) for sample in samples], "int16"),
        image_ids=array(ids, "int32"),
        image_offsets=array([10**6 + place for place in range(len(images))], "int64"),
        image_sizes=array([number + 1 for number, _ in images], "int32"),
        digests=np.frombuffer(b"".join(digest(number) for number, _ in images), np.uint8).reshape(-1, 32),
        dhashes=array([look for _, look in images], "uint64"),
        num_scored=0,
        largest_token=1,
    )
