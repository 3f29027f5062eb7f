"""Assignment of samples to rows: first-fit decreasing with two limits, and text documents as filler.

    limits: 16 tokens, 2 images            a..e samples, T a text document, . padding
    whole samples, first fit decreasing    |a a a a a a a a a b b b b b . .|  |c c c c c c c d d d e e e . . .|
    filler: T is split over the gaps       |a a a a a a a a a b b b b b T T|  |c c c c c c c d d d e e e T T T|

An image sample takes at least its slots (258 tokens of 2,048), so about 5 % of every row stay empty with any algorithm.
Text documents can be split at any token, so they fill the gaps. The remaining text makes rows of its own. Every other
sample is in exactly one row, unsplit.

First fit runs on classes instead of samples. Samples of equal (length, images) are interchangeable, and rows with equal
contents are neighbors. So one operation places a whole class over runs of rows. The result has exactly the rows of
first-fit decreasing with single samples. The number of operations depends on the number of classes (thousands, for rows
of 2,048 tokens). All other work is sorting and array arithmetic. Equal samples are shuffled by a seeded generator of
fixed definition, which also separates neighbors of the source. The result is a pure function of its arguments.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
_RANDOM_BITS = 16
"""Minimum number of random bits in a shuffle key."""


@dataclass(frozen=True)
class PackLimits:
    """Upper limits of a row."""

    tokens: int
    images: int
    min_piece: int = 16
    """Shorter gaps stay padding, so that a document is not split for a few tokens."""


@dataclass(frozen=True)
class Packing:
    """Rows as lists of segments. A segment is tokens [start, stop) of a sample; only text documents are split."""

    samples: IntArray
    """int64[segments]: index of the sample."""
    starts: IntArray
    """int64[segments]: first token of the segment in the sample."""
    stops: IntArray
    """int64[segments]: end of the segment in the sample, exclusive."""
    row_splits: IntArray
    """int64[rows + 1]: row r has the segments row_splits[r] to row_splits[r + 1]."""

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return len(self.row_splits) - 1


@dataclass(frozen=True)
class Items:
    """The samples to pack, one entry each."""

    lengths: IntArray
    """int64[n]: tokens, at least one."""
    images: IntArray
    """int64[n]: images."""
    is_text: npt.NDArray[np.bool_]
    """bool[n]: whether the sample is a text document, which may be split."""

    def __len__(self) -> int:
        return len(self.lengths)

    def select(self, members: IntArray) -> Items:
        """Return some of the samples, in the order of ``members``, int64[m]."""
        return Items(self.lengths[members], self.images[members], self.is_text[members])


def pack(items: Items, *, limits: PackLimits, seed: int) -> Packing:
    """Pack samples into rows. Every sample that is not text must fit into a row by itself."""
    bits = np.random.PCG64(seed)
    whole, documents = np.flatnonzero(~items.is_text), np.flatnonzero(items.is_text)
    order, rows = _first_fit_decreasing(items.select(whole), limits, bits)
    whole, documents = whole[order], documents[_shuffled_order(np.zeros_like(documents), bits)]
    lengths = items.lengths[whole]
    filled = np.bincount(rows, weights=lengths).astype(np.int64)
    filler = _lay_text(documents, items.lengths[documents], limits.tokens - filled, limits=limits)
    segments = (rows, whole, np.zeros_like(whole), lengths)
    return _by_row(*(np.concatenate(columns) for columns in zip(segments, filler, strict=True)), bits=bits)


def pack_by_group(items: Items, groups: IntArray, *, limits: PackLimits, seed: int) -> Packing:
    """Pack each group into rows of its own (few-shot rows of one task), group after group; ``groups`` is int64[n]."""
    parts = []
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        part = pack(items.select(members), limits=limits, seed=seed)
        parts.append(Packing(members[part.samples], part.starts, part.stops, part.row_splits))
    return _concatenate(parts)


def one_per_row(items: Items, *, limits: PackLimits) -> Packing:
    """Put one sample into each row, in the given order. A text document takes as many rows as it needs."""
    num_segments = np.maximum(-(-items.lengths // limits.tokens), 1)
    samples = np.repeat(np.arange(len(items)), num_segments)
    first = np.repeat(np.cumsum(num_segments) - num_segments, num_segments)
    starts = (np.arange(len(samples)) - first) * limits.tokens
    stops = np.minimum(starts + limits.tokens, items.lengths[samples])
    return Packing(samples, starts, stops, np.arange(len(samples) + 1))


def _first_fit_decreasing(items: Items, limits: PackLimits, bits: np.random.PCG64) -> tuple[IntArray, IntArray]:
    """Return the samples, longest first with equal ones shuffled, and the row of each; int64[n] both."""
    base = int(items.images.max(initial=0)) + 1
    sizes = items.lengths * base + items.images
    order = _shuffled_order(int(sizes.max(initial=0)) - sizes, bits)
    counts = np.bincount(sizes)
    classes = np.flatnonzero(counts)[::-1]
    columns = (*np.divmod(classes, base), counts[classes])
    rows = _Rows(len(items), limits)
    placed = [rows.place(*entry) for entry in zip(*(column.tolist() for column in columns), strict=True)]
    return order, np.concatenate([np.zeros(0, dtype=np.int64), *placed])


_FIRST, _SIZE, _TOKENS, _IMAGES = range(4)


class _Rows:
    """All rows, as runs of neighbors that have equal room.

    The rows that are still empty are such a run too. Filling that run opens new rows.
    """

    def __init__(self, num_rows: int, limits: PackLimits) -> None:
        self._limits = limits
        self._num_runs = 1
        self._runs = np.array([[0], [num_rows], [limits.tokens], [limits.images]], dtype=np.int64)
        """int64[4, capacity]: first row, number of rows, tokens left and images left in each of them."""

    def place(self, tokens: int, images: int, count: int) -> IntArray:
        """Place ``count`` equal samples, each in the first row that has room; return these rows as int64[count]."""
        _, _, tokens_left, images_left = self._runs[:, : self._num_runs]
        runs = np.flatnonzero((tokens_left >= tokens) & (images_left >= images))
        assert len(runs), f"a sample of {tokens} tokens and {images} images exceeds {self._limits}"
        runs = runs[np.argsort(self._runs[_FIRST, runs])]
        _, sizes, tokens_left, images_left = self._runs[:, runs]
        times = tokens_left // tokens
        if images:
            times = np.minimum(times, images_left // images)
        ends = np.cumsum(times * sizes)
        last = int(np.searchsorted(ends, count))
        runs, times = runs[: last + 1], times[: last + 1]
        full_rows, rest = divmod(count - int(ends[last - 1] if last else 0), int(times[last]))
        behind = self._cut(int(runs[last]), full_rows)
        if rest:
            self._cut(behind, 1)
            runs, times = np.append(runs, behind), np.append(times, rest)
        self._runs[_TOKENS, runs] -= times * tokens
        self._runs[_IMAGES, runs] -= times * images
        return _repeat_rows(self._runs[_FIRST, runs], self._runs[_SIZE, runs], times)

    def _cut(self, run: int, size: int) -> int:
        """Split a run after its first ``size`` rows; return the new run of the others."""
        new = self._num_runs
        if new == self._runs.shape[1]:
            self._runs = np.concatenate([self._runs, np.zeros_like(self._runs)], axis=1)
        self._num_runs += 1
        self._runs[:, new] = self._runs[:, run]
        self._runs[_FIRST, new] += size
        self._runs[_SIZE, new] -= size
        self._runs[_SIZE, run] = size
        return new


def _repeat_rows(first: IntArray, sizes: IntArray, times: IntArray) -> IntArray:
    """Return the rows of each run, run after run, each row as often as ``times`` says for its run.

    All arguments are int64[runs], the result is int64[sum of sizes * times].
    """
    rows = np.repeat(first - np.cumsum(sizes) + sizes, sizes) + np.arange(sizes.sum())
    return np.repeat(rows, np.repeat(times, sizes))


def _lay_text(documents: IntArray, lengths: IntArray, gaps: IntArray, *, limits: PackLimits) -> tuple[IntArray, ...]:
    """Lay the documents as one stream over the gaps (largest first), then over new rows.

    ``documents`` and ``lengths`` are int64[documents], ``gaps`` int64[rows]. Return row, document, start and stop of
    every segment, int64[segments] each.
    """
    total = int(lengths.sum())
    slots = np.flatnonzero(gaps >= limits.min_piece)
    slots = slots[np.argsort(-gaps[slots], kind="stable")]
    num_new = max(-(-(total - int(gaps[slots].sum())) // limits.tokens), 0)
    rows = np.concatenate([slots, len(gaps) + np.arange(num_new)])
    slot_ends = np.cumsum(np.concatenate([gaps[slots], np.full(num_new, limits.tokens)]))
    document_ends = np.cumsum(lengths)
    cuts = np.sort(np.concatenate([[0], slot_ends[slot_ends < total], document_ends]))
    begins, ends = cuts[:-1], cuts[1:]
    begins, ends = begins[begins < ends], ends[begins < ends]
    of_document = np.searchsorted(document_ends, begins, side="right")
    of_slot = np.searchsorted(slot_ends, begins, side="right")
    offsets = (document_ends - lengths)[of_document]
    return rows[of_slot], documents[of_document], begins - offsets, ends - offsets


def _by_row(rows: IntArray, samples: IntArray, starts: IntArray, stops: IntArray, *, bits: np.random.PCG64) -> Packing:
    """Sort segments by row, and shuffle them within the row, so that the longest sample is not always first.

    All arrays are int64[segments].
    """
    order = _shuffled_order(rows, bits)
    splits = np.concatenate([[0], np.cumsum(np.bincount(rows))])
    return Packing(samples[order], starts[order], stops[order], splits)


def _shuffled_order(keys: IntArray, bits: np.random.PCG64) -> IntArray:
    """Return the indices int64[n] that sort ``keys`` int64[n] (not negative), with equal keys in random order.

    Each number to sort combines a key, random bits and an index. The numbers are distinct, so the result does not
    depend on the sorting algorithm. Sorting numbers is several times as fast as sorting indices. With more than some
    hundred million keys, too few bits remain for randomness, so indices are sorted instead.
    """
    index_bits = len(keys).bit_length()
    random_bits = 63 - index_bits - int(keys.max(initial=0)).bit_length()
    if random_bits < _RANDOM_BITS:
        return np.lexsort((bits.random_raw(len(keys)), keys))
    numbers = (bits.random_raw(len(keys)) >> (64 - random_bits)).astype(np.int64)
    numbers |= keys << random_bits
    numbers <<= index_bits
    numbers |= np.arange(len(keys))
    numbers.sort()
    return numbers & ((1 << index_bits) - 1)


def _concatenate(parts: list[Packing]) -> Packing:
    if not parts:
        empty = np.zeros(0, dtype=np.int64)
        return Packing(empty, empty, empty, np.zeros(1, dtype=np.int64))
    offsets = np.cumsum([0, *(len(part.samples) for part in parts)])
    splits = [part.row_splits[1:] + offset for part, offset in zip(parts, offsets[:-1], strict=True)]
    return Packing(
        np.concatenate([part.samples for part in parts]),
        np.concatenate([part.starts for part in parts]),
        np.concatenate([part.stops for part in parts]),
        np.concatenate([np.zeros(1, dtype=np.int64), *splits]),
    )
