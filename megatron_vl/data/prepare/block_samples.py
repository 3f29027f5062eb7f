"""The samples of one block as columns of numbers, the input of packing.

A block is a set of samples that are packed together, and whose rows and images have files of their own. Memory holds
the columns of one block: about forty bytes per sample, and sixteen per distinct image, whatever their size. While they
are joined it holds about 150 for each image. Tokens, keys and images stay in the parts and are read one by one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_vl.data.prepare.part_files import PartIndex
from megatron_vl.data.prepare.sorted_runs import sort_rows, starts_of_groups

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Samples:
    """Samples from some parts."""

    source: npt.NDArray[np.int16]
    part: npt.NDArray[np.int32]
    """int32[samples]: number among all parts."""
    task: npt.NDArray[np.int8]
    offset: IntArray
    length: npt.NDArray[np.int32]
    key_size: npt.NDArray[np.int32]
    image_splits: IntArray
    """int64[samples + 1]: sample s has the images image_ids[image_splits[s] : image_splits[s + 1]]."""
    image_ids: npt.NDArray[np.int32]
    """int32[images of all samples]: numbers of distinct images, see Images."""

    def __len__(self) -> int:
        return len(self.part)

    @property
    def image_counts(self) -> IntArray:
        """int64[samples]: number of images."""
        return np.diff(self.image_splits)


@dataclass(frozen=True)
class Images:
    """The distinct images of some samples, in the order in which the parts store them first."""

    part: npt.NDArray[np.int32]
    """int32[images]: number among all parts."""
    offset: IntArray
    size: npt.NDArray[np.int32]


@dataclass(frozen=True)
class Piece:
    """Some samples of one part."""

    source: int
    part: int
    """Number among all parts."""
    index: PartIndex
    members: IntArray
    """int64[samples]: indices of the samples in the part, ascending."""
    copies: IntArray
    """int64[samples]: how often each is used, at least once."""


@dataclass(frozen=True)
class Block:
    """The samples that are packed together."""

    samples: Samples
    images: Images
    chosen: IntArray
    """int64[n]: indices of samples in order, each as often as it is used."""


def join_pieces(pieces: Iterable[Piece]) -> Block:
    """Return the samples of all pieces, in order, and their images. There must be at least one piece."""
    columns: dict[str, list[npt.NDArray[Any]]] = {}
    num_images = 0
    for piece in pieces:
        found = _columns(piece)
        found["image_ids"] = found["image_ids"] + num_images
        num_images += len(found["image_size"])
        for name, values in found.items():
            columns.setdefault(name, []).append(values)

    def join(name: str) -> npt.NDArray[Any]:
        return np.concatenate(columns.pop(name))

    kept, number = _distinct(join("digest"))
    images = Images(*(join(name)[kept] for name in ("image_part", "image_offset", "image_size")))
    counts = join("image_count")
    samples = Samples(
        **{name: join(name) for name in ("source", "part", "task", "offset", "length", "key_size")},
        image_splits=np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)]),
        image_ids=number[join("image_ids")],
    )
    copies = join("copies")
    return Block(samples, images, np.repeat(np.arange(len(copies)), copies))


def _columns(piece: Piece) -> dict[str, npt.NDArray[Any]]:
    """Return the columns of a piece, with the images that its samples have; ids count these images from 0."""
    index, members = piece.index, piece.members
    counts = index.image_counts[members].astype(np.int64)
    begins = np.cumsum(index.image_counts, dtype=np.int64)[members] - counts
    places = np.repeat(begins - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
    used, image_ids = np.unique(index.image_ids[places], return_inverse=True)
    return {
        "source": np.full(len(members), piece.source, dtype=np.int16),
        "part": np.full(len(members), piece.part, dtype=np.int32),
        "task": index.tasks[members],
        "offset": index.offsets[members],
        "length": index.lengths[members],
        "key_size": index.key_sizes[members],
        "image_count": index.image_counts[members],
        "image_ids": image_ids.astype(np.int32),
        "image_part": np.full(len(used), piece.part, dtype=np.int32),
        "image_offset": index.image_offsets[used],
        "image_size": index.image_sizes[used],
        "digest": index.digests[used],
        "copies": piece.copies,
    }


def _distinct(digests: npt.NDArray[np.uint8]) -> tuple[IntArray, npt.NDArray[np.int32]]:
    """Keep each image once, at its first use: images are equal if their SHA-256 is equal.

    ``digests`` is uint8[images, 32]. Return int64[kept], the kept images in order, and int32[images], the new number of
    every given image.
    """
    rows = np.empty((len(digests), 5), dtype=np.uint64)
    rows[:, :4] = np.ascontiguousarray(digests).view(np.uint64)
    rows[:, 4] = np.arange(len(digests))
    rows = sort_rows(rows)
    fresh, order = starts_of_groups(rows, 4), rows[:, 4].astype(np.int64)
    del rows
    firsts = order[fresh]
    rank = np.empty(len(firsts), dtype=np.int32)
    rank[np.argsort(firsts)] = np.arange(len(firsts), dtype=np.int32)
    number = np.empty(len(order), dtype=np.int32)
    number[order] = rank[np.cumsum(fresh) - 1]
    return np.sort(firsts), number
