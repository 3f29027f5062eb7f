"""Positions of every row and every image in the files of a block, computed from numbers alone.

Packing fixes the length of every row and every image, and hence their positions in the files. So any worker can write
the rows, in any order. They are divided into slices of a certain size. Each slice is a unit of work (row_slices.py)
that holds all it needs. The borders of the slices depend only on the rows, never on the workers.

An image is stored at its first use by a row, so the images of neighboring rows are close together. Each image is stored
once in a block, even if other rows of the block use it too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_vl.data.dataset.rows import row_lengths
from megatron_vl.data.prepare.block_samples import Block
from megatron_vl.data.prepare.packing import Packing
from megatron_vl.data.prepare.row_slices import RowSlice

IntArray = npt.NDArray[np.int64]
SLICE_BYTES = 256 * 2**20
"""Size in bytes of rows and images at which a slice ends: large enough to hand out, small enough to repeat."""
SLICE_PIECES = 200_000
"""Number of segments at which a slice ends. Handing out one segment takes some 45 bytes."""


@dataclass(frozen=True)
class Origins:
    """File paths and names that the numbers of parts and sources stand for."""

    paths: tuple[Path, ...]
    """Data files of the parts."""
    names: tuple[str, ...]
    """Names of the sources."""


@dataclass(frozen=True)
class RowPlan:
    """Rows and images in the order in which they are stored."""

    block: Block
    packing: Packing
    segments: IntArray
    """int64[segments]: the sample of each segment of the packing."""
    lengths: IntArray
    """int64[rows]: items of each stored row."""
    image_splits: IntArray
    """int64[rows + 1]: row r has the images image_numbers[image_splits[r] : image_splits[r + 1]]."""
    image_numbers: IntArray
    """int64[images of all rows]: index into the stored images."""
    stored: IntArray
    """int64[stored images]: index into the images of the block."""
    first_stored: IntArray
    """int64[rows + 1]: row r is the first to use the stored images first_stored[r] to first_stored[r + 1]."""

    @property
    def stored_sizes(self) -> npt.NDArray[np.int32]:
        """int32[stored images]: bytes."""
        return self.block.images.size[self.stored]

    @property
    def images_per_row(self) -> IntArray:
        """int64[rows]: number of images."""
        return np.diff(self.image_splits)


def plan_rows(packing: Packing, block: Block) -> RowPlan:
    """Return the plan of a packing whose samples are positions in the chosen samples of the block."""
    samples = block.samples
    segments = block.chosen[packing.samples]
    counts = samples.image_splits[segments + 1] - samples.image_splits[segments]
    segment_splits = _splits(counts)
    places = np.repeat(samples.image_splits[segments] - segment_splits[:-1], counts) + np.arange(segment_splits[-1])
    uses = samples.image_ids[places]
    used, first_use, inverse = np.unique(uses, return_index=True, return_inverse=True)
    order = np.argsort(first_use)
    number = np.empty(len(order), dtype=np.int64)
    number[order] = np.arange(len(order))
    image_splits = segment_splits[packing.row_splits]
    tokens = _splits(packing.stops - packing.starts)[packing.row_splits]
    return RowPlan(
        block=block,
        packing=packing,
        segments=segments,
        lengths=row_lengths(np.diff(packing.row_splits), np.diff(image_splits), np.diff(tokens)),
        image_splits=image_splits,
        image_numbers=number[inverse],
        stored=used[order].astype(np.int64),
        first_stored=np.searchsorted(first_use[order], image_splits),
    )


def plan_slices(plan: RowPlan, origins: Origins, block: str) -> Iterator[RowSlice]:
    """Yield the slices of a plan, in order. ``block`` is the name of the block, see ``block_name``."""
    token_begins = 4 * _splits(plan.lengths)
    image_begins = _splits(plan.stored_sizes)[plan.first_stored]
    numbers = (token_begins + image_begins)[:-1] // SLICE_BYTES + plan.packing.row_splits[:-1] // SLICE_PIECES
    borders = np.flatnonzero(np.diff(numbers, prepend=-1, append=-1)).tolist()
    for first, last in zip(borders[:-1], borders[1:], strict=True):
        begins = (int(token_begins[first]), int(image_begins[first]))
        work = _slice(plan, first, last, origins)
        yield dataclasses.replace(work, block=block, token_begin=begins[0], image_begin=begins[1])


def _slice(plan: RowPlan, first: int, last: int, origins: Origins) -> RowSlice:
    """Return rows [first, last) with the necessary facts about samples, images and parts, but not their places."""
    samples, images, splits = plan.block.samples, plan.block.images, plan.packing.row_splits
    segment_range = slice(int(splits[first]), int(splits[last]))
    use_range = slice(int(plan.image_splits[first]), int(plan.image_splits[last]))
    segments = plan.segments[segment_range]
    fresh = plan.stored[plan.first_stored[first] : plan.first_stored[last]]
    parts, numbers = np.unique(np.concatenate([samples.part[segments], images.part[fresh]]), return_inverse=True)
    return RowSlice(
        block="",
        token_begin=0,
        image_begin=0,
        paths=tuple(origins.paths[part] for part in parts.tolist()),
        names=origins.names,
        row_splits=splits[first : last + 1] - splits[first],
        part=numbers[: len(segments)],
        offset=samples.offset[segments],
        length=samples.length[segments],
        key_size=samples.key_size[segments],
        source=samples.source[segments],
        task=samples.task[segments],
        start=plan.packing.starts[segment_range],
        stop=plan.packing.stops[segment_range],
        image_splits=plan.image_splits[first : last + 1] - plan.image_splits[first],
        image_numbers=plan.image_numbers[use_range],
        image_part=numbers[len(segments) :],
        image_offset=images.offset[fresh],
        image_size=images.size[fresh],
    )


def _splits(counts: npt.NDArray[np.integer]) -> IntArray:
    """Return int64[n + 1]: the start of each of n runs with lengths ``counts``, and the end of the last run."""
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts, dtype=np.int64)])
