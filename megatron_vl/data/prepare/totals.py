"""The figures of a manifest, summed over blocks, each of which is in memory only while it is planned."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from megatron_vl.data.dataset.manifest import BlockEntry, CountEntry
from megatron_vl.data.prepare.block_samples import Block
from megatron_vl.data.prepare.row_plan import RowPlan
from megatron_vl.data.sample import TASKS

IntArray = npt.NDArray[np.int64]


@dataclass
class Totals:
    """Sums over the blocks so far, updated during planning."""

    num_sources: int
    blocks: list[BlockEntry] = field(default_factory=list)
    num_samples: int = 0
    num_segments: int = 0
    num_tokens: int = 0
    num_images: int = 0
    images_per_row: list[int] = field(default_factory=list)
    """Histogram: numbers of rows with 0, 1, 2, ... images."""
    kept: dict[int, int] = field(default_factory=dict)
    """Distinct samples in the rows, by source."""
    counts: dict[int, IntArray] = field(default_factory=dict)
    """int64[3], samples, tokens and images, by source times number of tasks plus task."""
    _last: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Part and offset of the last sample of each source. The next block may go on with another use of it."""

    def add(self, plan: RowPlan) -> None:
        """Add a block."""
        packing = plan.packing
        self.blocks.append(BlockEntry(packing.num_rows, len(plan.stored)))
        self.num_samples += len(plan.block.chosen)
        self.num_segments += len(packing.samples)
        self.num_tokens += int((packing.stops - packing.starts).sum())
        self.num_images += len(plan.image_numbers)
        found = np.bincount(plan.images_per_row, minlength=len(self.images_per_row))
        found[: len(self.images_per_row)] += np.array(self.images_per_row, dtype=np.int64)
        self.images_per_row = found.tolist()
        self._add_kept(plan)
        self._add_counts(plan.block)

    def entries(self, names: list[str]) -> tuple[CountEntry, ...]:
        """Return the counts of each source and task that has samples. ``names`` are those of the sources."""
        return tuple(
            CountEntry(names[group // len(TASKS)], TASKS[group % len(TASKS)], *self.counts[group].tolist())
            for group in sorted(self.counts)
        )

    def _add_kept(self, plan: RowPlan) -> None:
        """Count the distinct samples in the rows, independently of the skip counts."""
        samples = plan.block.samples
        seen = np.zeros(len(samples), dtype=np.bool_)
        seen[plan.segments] = True
        places = np.flatnonzero(seen)
        sources, firsts, counts = np.unique(samples.source[places], return_index=True, return_counts=True)
        for source, first, count in zip(sources.tolist(), firsts.tolist(), counts.tolist(), strict=True):
            begin, end = (places[index] for index in (first, first + count - 1))
            again = self._last.get(source) == (int(samples.part[begin]), int(samples.offset[begin]))
            self.kept[source] = self.kept.get(source, 0) + count - again
            self._last[source] = (int(samples.part[end]), int(samples.offset[end]))

    def _add_counts(self, block: Block) -> None:
        samples, chosen = block.samples, block.chosen
        group = samples.source[chosen].astype(np.int64) * len(TASKS) + samples.task[chosen]
        columns = (
            np.bincount(group),
            np.bincount(group, weights=samples.length[chosen]),
            np.bincount(group, weights=samples.image_counts[chosen]),
        )
        sums = np.stack(columns, axis=1).astype(np.int64)
        for index in np.flatnonzero(sums[:, 0]).tolist():
            self.counts[index] = self.counts.get(index, 0) + sums[index]
