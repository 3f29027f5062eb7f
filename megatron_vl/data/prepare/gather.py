"""All parts as columns of numbers, the input of merging.

Memory holds about forty bytes per sample and fifty per distinct image, whatever their size. Tokens, keys and images
stay in the parts and are read one by one. From here on, each sample keeps its number. Numbers follow the sources in the
order of the recipe, shards in the order of the source, and records in the order of the shard.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_vl.data.dataset.manifest import NUM_EXAMPLES
from megatron_vl.data.prepare.part_files import KEPT, PartIndex

IntArray = npt.NDArray[np.int64]


@dataclass
class SourceCounts:
    """Counts of the records of one source, updated during preparation."""

    read: int = 0
    skips: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    num_scored: int = 0

    def skip(self, reason: str, count: int, examples: Iterable[str] = ()) -> None:
        """Count samples that were left out, and keep the first examples."""
        if count:
            self.skips[reason] = self.skips.get(reason, 0) + count
            mine = self.examples.setdefault(reason, [])
            mine += list(examples)[: NUM_EXAMPLES - len(mine)]

    @property
    def kept(self) -> int:
        """Records that were not left out."""
        return self.read - sum(self.skips.values())


@dataclass(frozen=True)
class Samples:
    """The samples of all parts."""

    source: npt.NDArray[np.int16]
    part: npt.NDArray[np.int32]
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
    """The distinct images of all parts, in the order of their first use."""

    part: npt.NDArray[np.int32]
    offset: IntArray
    size: npt.NDArray[np.int32]
    digest: npt.NDArray[np.uint8]
    """uint8[images, 32]: SHA-256."""
    dhashes: npt.NDArray[np.uint64]
    """uint64[images]: perceptual hash; 0 if no filter needs it."""


@dataclass(frozen=True)
class Gathered:
    """The samples and images of all parts, and counts of what was left out."""

    samples: Samples
    images: Images
    all_counts: tuple[SourceCounts, ...]
    """Counts of each source."""
    largest_token: int
    """Largest id of all samples; -1 if there is none."""


def gather(indices: Iterable[tuple[int, PartIndex]], num_sources: int) -> Gathered:
    """Gather the columns of all parts. ``indices`` gives source and index of each part, in the order of the units."""
    all_counts = tuple(SourceCounts() for _ in range(num_sources))
    parts = []
    largest = -1
    for source, index in indices:
        largest = max(largest, index.largest_token)
        _count(all_counts[source], index)
        parts.append((source, dataclasses.replace(index, outcomes=index.outcomes[:0], examples=())))
    return Gathered(*_columns(parts), all_counts, largest)


def cut(index: PartIndex, most: int) -> PartIndex:
    """Return the part as if reading had stopped after ``most`` samples."""
    if index.num_samples < most:
        return index
    read = int(np.flatnonzero(index.outcomes == KEPT)[most - 1]) + 1 if most else 0
    kept = {name: getattr(index, name)[:most] for name in ("tasks", "offsets", "lengths", "key_sizes", "image_counts")}
    return dataclasses.replace(
        index,
        examples=tuple(example for example in index.examples if example.position < read),
        outcomes=index.outcomes[:read],
        image_ids=index.image_ids[: int(index.image_counts[:most].sum())],
        **kept,
    )


def _count(counts: SourceCounts, index: PartIndex) -> None:
    counts.read += len(index.outcomes)
    counts.num_scored += index.num_scored
    skipped = np.bincount(index.outcomes[index.outcomes != KEPT], minlength=len(index.reasons))
    for reason, count in zip(index.reasons, skipped.tolist(), strict=True):
        counts.skip(reason, count, (item.text for item in index.examples if item.reason == reason))


def _columns(parts: Sequence[tuple[int, PartIndex]]) -> tuple[Samples, Images]:
    """Concatenate the columns of all parts. There must be at least one part."""

    def join(column: Callable[[PartIndex], npt.NDArray[Any]]) -> npt.NDArray[Any]:
        return np.concatenate([column(index) for _, index in parts])

    stored = np.array([len(index.image_sizes) for _, index in parts], dtype=np.int64)
    sizes = np.array([index.num_samples for _, index in parts], dtype=np.int64)
    numbers = np.arange(len(parts), dtype=np.int32)
    images, distinct = _distinct(
        Images(
            part=np.repeat(numbers, stored),
            offset=join(lambda index: index.image_offsets),
            size=join(lambda index: index.image_sizes),
            digest=join(lambda index: index.digests),
            dhashes=join(lambda index: index.dhashes),
        )
    )
    uses = np.array([len(index.image_ids) for _, index in parts], dtype=np.int64)
    image_ids = join(lambda index: index.image_ids) + np.repeat(np.cumsum(stored) - stored, uses)
    counts = join(lambda index: index.image_counts)
    samples = Samples(
        source=np.repeat(np.array([source for source, _ in parts], dtype=np.int16), sizes),
        part=np.repeat(numbers, sizes),
        task=join(lambda index: index.tasks),
        offset=join(lambda index: index.offsets),
        length=join(lambda index: index.lengths),
        key_size=join(lambda index: index.key_sizes),
        image_splits=np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)]),
        image_ids=distinct[image_ids],
    )
    return samples, images


def _distinct(images: Images) -> tuple[Images, npt.NDArray[np.int32]]:
    """Keep each image once, at its first use, and return int32[images given]: the new number of every given image.

    Images are equal if their SHA-256 is equal.
    """
    words = np.ascontiguousarray(images.digest).view(np.uint64).reshape(-1, 4)
    order = np.lexsort(words.T)  # stable, so the first of equal images comes first
    fresh = np.ones(len(order), dtype=np.bool_)
    fresh[1:] = (words[order[1:]] != words[order[:-1]]).any(axis=1)
    firsts = order[fresh]
    rank = np.empty(len(firsts), dtype=np.int32)
    rank[np.argsort(firsts)] = np.arange(len(firsts), dtype=np.int32)
    number = np.empty(len(order), dtype=np.int32)
    number[order] = rank[np.cumsum(fresh) - 1]
    kept = np.sort(firsts)
    columns = {item.name: getattr(images, item.name)[kept] for item in dataclasses.fields(Images)}
    # The first of equal images may come from a source whose filters need no hash.
    columns["dhashes"] = np.zeros(len(kept), dtype=np.uint64)
    np.maximum.at(columns["dhashes"], number, images.dhashes)
    return Images(**columns), number
