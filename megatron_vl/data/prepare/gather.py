"""What is known of the samples of all parts, the input of drawing.

The parts are read one after another. A byte of each sample is kept, which says whether its images drop it
(image_drops.py), and a few numbers of each part. Everything else is counted, or read again when the samples of a block
are packed (block_samples.py). From here on, each sample keeps its number. Numbers follow the sources in the order of
the recipe, shards in the order of the source, and records in the order of the shard.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_vl.data.dataset.manifest import NUM_EXAMPLES
from megatron_vl.data.filters.options import FilterOptions
from megatron_vl.data.prepare.image_drops import DROPS, Fates, ImageDrops, Looks
from megatron_vl.data.prepare.part_files import KEPT, PartIndex, data_path, read_index
from megatron_vl.data.prepare.part_reader import PartReader
from megatron_vl.errors import DataError

IntArray = npt.NDArray[np.int64]
_IMAGES_AT_A_TIME = 2**20
"""Images that are compared with those of benchmarks at a time."""


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
class Parts:
    """All parts, one entry each, in the order of the units."""

    prefixes: tuple[Path, ...]
    source: IntArray
    """int64[parts]."""
    first: IntArray
    """int64[parts]: number of the first sample."""
    size: IntArray
    """int64[parts]: samples that are used. A limit may leave out the last ones."""

    @cached_property
    def paths(self) -> tuple[Path, ...]:
        """Data files."""
        return tuple(data_path(prefix) for prefix in self.prefixes)

    def read(self, part: int) -> PartIndex:
        """Return the index of a part, with samples that a limit leaves out. Raises DataError if it is gone."""
        index = read_index(self.prefixes[part])
        if index is None:
            raise DataError(f"{self.prefixes[part]}: the part is gone or damaged; start again")
        return index

    def keys(self, numbers: Sequence[int]) -> list[str]:
        """Read the keys of samples, given by their numbers."""
        reader, keys = PartReader(self.paths), []
        try:
            for number in numbers:
                part = int(np.searchsorted(self.first + self.size, number, side="right"))
                index, place = self.read(part), number - int(self.first[part])
                begin = int(index.offsets[place]) + 4 * int(index.lengths[place])
                keys.append(reader.read(part, begin, int(index.key_sizes[place])).decode("utf-8", "surrogatepass"))
        finally:
            reader.close()
        return keys


@dataclass(frozen=True)
class Gathered:
    """What is known of the samples of all parts."""

    parts: Parts
    fates: Fates
    all_counts: tuple[SourceCounts, ...]
    """Counts of each source, without the samples that their images drop."""
    largest_token: int
    """Largest id of all samples; -1 if there is none."""

    def stays(self, part: int) -> npt.NDArray[np.bool_]:
        """Return bool[samples of a part]: whether each sample stays."""
        return self.fates.of(int(self.parts.first[part]), int(self.parts.size[part])) == 0


def gather(parts: Iterable[tuple[int, Path, PartIndex]], filters: Sequence[FilterOptions], scratch: Path) -> Gathered:
    """Read all parts, given as source, path prefix and index in the order of the units, and judge their images.

    ``filters`` are those of the sources, in order. ``scratch``: folder for temporary files.

    Raises:
        DataError: A list of benchmark images cannot be read.
    """
    fates, all_counts, largest = Fates(), tuple(SourceCounts() for _ in filters), -1
    drops = ImageDrops(filters, fates, scratch)
    columns: list[tuple[Path, int, int, int]] = []
    waiting: list[tuple[int, PartIndex]] = []
    num_images = num_judged = 0
    for source, prefix, index in parts:
        largest = max(largest, index.largest_token)
        _count(all_counts[source], index)
        columns.append((prefix, source, len(fates), index.num_samples))
        fates.extend(index.num_samples)
        if drops.needs_images:
            waiting.append((source, dataclasses.replace(index, outcomes=index.outcomes[:0], examples=())))
            num_images += len(index.image_sizes)
        if num_images >= _IMAGES_AT_A_TIME:
            drops.add(Looks.of(waiting), num_judged)
            waiting, num_images, num_judged = [], 0, len(fates)
    if waiting:
        drops.add(Looks.of(waiting), num_judged)
    drops.finish()
    prefixes, *numbers = zip(*columns, strict=True)
    table = Parts(prefixes, *(np.array(column, dtype=np.int64) for column in numbers))
    return Gathered(table, fates, all_counts, largest)


def count_drops(gathered: Gathered) -> IntArray:
    """Count the samples that their images drop, with their reasons; return int64[parts], the samples that stay."""
    parts = gathered.parts
    counts = np.zeros((len(gathered.all_counts), len(DROPS) + 1), dtype=np.int64)
    first_ones: dict[tuple[int, int], list[int]] = {}
    stay = np.zeros(len(parts.prefixes), dtype=np.int64)
    places = zip(parts.source.tolist(), parts.first.tolist(), parts.size.tolist(), strict=True)
    for part, (source, first, size) in enumerate(places):
        fates = gathered.fates.of(first, size)
        mine = np.bincount(fates, minlength=len(DROPS) + 1)
        stay[part] = mine[0]
        counts[source] += mine
        for fate in np.flatnonzero(mine[1:]).tolist():
            found = first_ones.setdefault((source, fate), [])
            found += (first + np.flatnonzero(fates == fate + 1)[: NUM_EXAMPLES - len(found)]).tolist()
    for fate, dropped in enumerate(DROPS):
        for source, totals in enumerate(gathered.all_counts):
            examples = parts.keys(first_ones.get((source, fate), []))
            totals.skip(dropped.reason, int(counts[source, fate + 1]), examples)
    return stay


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
