"""Which samples are packed together: blocks of bounded size, each of which has its share of every source.

Packing holds some hundred bytes per sample in memory. So a large data set is packed in blocks of at most
``pack.block_samples`` samples, of about equal size. Blocks in the order of the sources would have rows of one source
only, and a sample would never share a row with one of another task. So all drawn samples are put into one order, in
which those of every source are evenly spread: sample k of the n of a source has the place (k + 1/2) / n. A block is a
stretch of this order. It has a share of each source that is exact to one sample, and these samples are neighbors in
their source. So each block is a small copy of the mixture, and it reads a stretch of the parts of each source.

Within a block, samples have the order of the parts. So one block, which is the usual case, has all samples in order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from megatron_vl.data.prepare.block_samples import Piece
from megatron_vl.data.prepare.gather import Gathered
from megatron_vl.data.prepare.mixture import uses_before

IntArray = npt.NDArray[np.int64]


class Blocks:
    """The drawn samples, divided into blocks."""

    def __init__(self, gathered: Gathered, staying: IntArray, drawn: Sequence[int], most: int) -> None:
        """Divide them.

        ``staying``: int64[parts], samples that stay of each part. ``drawn``: samples of each source, including
        repetitions. ``most``: samples of a block.
        """
        self.number = max(-(-sum(drawn) // most), 1)
        """Number of blocks."""
        self._gathered = gathered
        self._drawn = drawn
        self._staying = staying
        self._members = [np.flatnonzero(gathered.parts.source == source) for source in range(len(drawn))]
        self._available = [int(staying[mine].sum()) for mine in self._members]
        self._before = np.zeros_like(staying)
        for mine in self._members:
            self._before[mine] = np.cumsum(staying[mine]) - staying[mine]

    def borders(self, block: int) -> list[tuple[int, int]]:
        """Return the range of the drawn samples of each source that a block has."""
        total = sum(self._drawn)
        begins, ends = (spread_evenly(self._drawn, total * edge // self.number) for edge in (block, block + 1))
        return list(zip(begins, ends, strict=True))

    def pieces(self, block: int) -> Iterator[Piece]:
        """Yield the samples of a block, part after part."""
        parts = self._gathered.parts
        for source, (low, high) in enumerate(self.borders(block)):
            mine = self._members[source]
            begins = np.maximum(self._uses_before(source, self._before[mine]), low)
            ends = np.minimum(self._uses_before(source, self._before[mine] + self._staying[mine]), high)
            for part in mine[begins < ends].tolist():
                places, uses = self._uses(part, source)
                clipped = np.clip(uses, low, high)
                copies = clipped[1:] - clipped[:-1]
                used = copies > 0
                yield Piece(source, part, parts.read(part), places[used], copies[used])

    def unused(self, source: int) -> Iterator[int]:
        """Yield the numbers of the samples of a source that stay but are not drawn."""
        parts = self._gathered.parts
        for part in self._members[source].tolist():
            places, uses = self._uses(part, source)
            yield from (int(parts.first[part]) + places[np.diff(uses) == 0]).tolist()

    def _uses(self, part: int, source: int) -> tuple[IntArray, IntArray]:
        """Return the places in a part of its n samples that stay, int64[n], and the uses before each, int64[n + 1]."""
        places = np.flatnonzero(self._gathered.stays(part))
        begin = int(self._before[part])
        return places, self._uses_before(source, np.arange(begin, begin + len(places) + 1))

    def _uses_before(self, source: int, samples: IntArray) -> IntArray:
        return uses_before(samples, self._available[source], self._drawn[source])


def spread_evenly(counts: Sequence[int], total: int) -> list[int]:
    """Return how many of the first ``total`` of all elements belong to each of several sequences of ``counts``.

    Element k of n has the place (k + 1/2) / n. Of equal places, the earlier sequence comes first.
    """
    whole = max(sum(counts), 1)
    taken = [(2 * count * total + whole) // (2 * whole) for count in counts]

    def place(index: int, element: int) -> tuple[Fraction, int]:
        return Fraction(2 * element + 1, 2 * counts[index]), index

    while sum(taken) < total:
        _, index = min(place(index, taken[index]) for index, count in enumerate(counts) if taken[index] < count)
        taken[index] += 1
    while sum(taken) > total:
        _, index = max(place(index, taken[index] - 1) for index in range(len(counts)) if taken[index])
        taken[index] -= 1
    return taken
