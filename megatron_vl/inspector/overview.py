"""Compute the figures of a whole data set, from its manifest and row headers; tokens and images are not read.

Reading a header takes microseconds and a page of the disk. So above ``SCANNED_ROWS`` rows the figures come from an
evenly spaced choice of them, and code that shows the figures must state that.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_vl.data.dataset.manifest import CountEntry, Manifest, SkipEntry
from megatron_vl.data.dataset.rows import RowStore

SCANNED_ROWS = 100_000


@dataclass(frozen=True)
class Overview:
    """What is known of a data set without reading its tokens."""

    prefix: str
    manifest: Manifest
    num_scanned: int
    """Number of rows whose headers were read."""
    segment_lengths: npt.NDArray[np.int64]
    """int64[segments of those rows]: tokens in each."""
    row_lengths: npt.NDArray[np.int64]
    """int64[those rows]: tokens in each, without padding."""

    @property
    def is_sampled(self) -> bool:
        """Whether lengths are those of some rows only."""
        return self.num_scanned < self.manifest.num_rows

    @property
    def fills(self) -> npt.NDArray[np.float64]:
        """float64[those rows]: share of each row that is not padding."""
        return self.row_lengths / self.manifest.seq_length

    @property
    def kept(self) -> tuple[tuple[CountEntry, float], ...]:
        """The counts of each source and task, and their share of all tokens."""
        counts = self.manifest.counts
        total = max(sum(entry.tokens for entry in counts), 1)
        return tuple((entry, entry.tokens / total) for entry in counts)

    def skips_of(self, source: str) -> tuple[SkipEntry, ...]:
        """Return the samples that a source lost, by reason."""
        return tuple(skip for skip in self.manifest.skips if skip.source == source)


def read_overview(store: RowStore, *, scanned_rows: int = SCANNED_ROWS) -> Overview:
    """Read the headers of all rows, or of ``scanned_rows`` of them. Raises DataError for a row that is damaged."""
    count = min(len(store), scanned_rows)
    rows = np.arange(count) * len(store) // max(count, 1)
    lengths = [store.segment_lengths(index) for index in rows.tolist()]
    return Overview(
        prefix=store.prefix,
        manifest=store.manifest,
        num_scanned=count,
        segment_lengths=np.concatenate([*lengths, np.zeros(0, dtype=np.int32)]).astype(np.int64),
        row_lengths=np.array([int(row.sum()) for row in lengths], dtype=np.int64),
    )
