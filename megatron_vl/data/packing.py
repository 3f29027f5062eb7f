"""Which samples share a row: best-fit decreasing over two limits, with text documents as mortar.

    limits: 16 tokens, 2 images           a..e samples, T a text document, . padding
    whole samples, best fit decreasing    |a a a a a a a a a b b b b b . .|  |c c c c c c c d d d e e e . . .|
    mortar: T is cut over what is left    |a a a a a a a a a b b b b b T T|  |c c c c c c c d d d e e e T T T|

An image sample takes at least its slots (258 tokens of 2,048), so best fit alone leaves about 5 % of every
row empty, whatever the algorithm. Text has no such grain: laid end to end it is a stream that may be cut
anywhere, and it fills the gaps; what is left of it makes rows of its own. Every other sample lies whole in
exactly one row.

Best fit runs on classes, not on samples: samples of equal (length, images) are interchangeable, and so are
rows with equal room. One operation puts as many samples of the longest remaining class as possible into all
rows of the tightest room that takes them. The number of operations depends on the number of classes; all else
is arithmetic on arrays, so that ten million samples are packed in seconds. Ties are broken by a seeded
shuffle, which also keeps neighbours of the source apart. The result is a pure function of its arguments.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PackLimits:
    """What a row holds at most."""

    tokens: int
    images: int
    min_piece: int = 16
    """Gaps shorter than this stay padding: a document is not cut for a few tokens."""


@dataclass(frozen=True)
class Packing:
    """Rows as lists of pieces; a piece is tokens [start, stop) of a sample (all of it, unless it is a text
    document)."""

    samples: IntArray
    """int64[pieces]: index of the sample."""
    starts: IntArray
    """int64[pieces]."""
    stops: IntArray
    """int64[pieces]."""
    row_splits: IntArray
    """int64[rows + 1]: row r owns pieces row_splits[r] to row_splits[r + 1]."""

    @property
    def num_rows(self) -> int:
        return len(self.row_splits) - 1


@dataclass(frozen=True)
class Items:
    """The samples to pack, one entry each."""

    lengths: IntArray
    """int64[n]: tokens."""
    images: IntArray
    """int64[n]."""
    is_text: npt.NDArray[np.bool_]
    """bool[n]: a text document, which may be cut."""

    def __len__(self) -> int:
        return len(self.lengths)

    def select(self, members: IntArray) -> Items:
        """Some of the samples, in the order given."""
        return Items(self.lengths[members], self.images[members], self.is_text[members])


def pack(items: Items, *, limits: PackLimits, seed: int) -> Packing:
    """Pack samples into rows; every sample that is not text must fit into a row by itself."""
    shuffle = np.random.default_rng(seed).permutation(len(items))
    order, documents = shuffle[~items.is_text[shuffle]], shuffle[items.is_text[shuffle]]
    lengths = items.lengths[order]
    fit = _BestFit(limits, len(order))
    fit.place(lengths, items.images[order])
    filled = np.bincount(fit.row_of, weights=lengths, minlength=fit.num_rows).astype(np.int64)
    mortar = _lay_text(documents, items.lengths[documents], limits.tokens - filled, limits=limits)
    pieces = (
        np.concatenate([fit.row_of, mortar[0]]),
        np.concatenate([order, mortar[1]]),
        np.concatenate([np.zeros(len(order), dtype=np.int64), mortar[2]]),
        np.concatenate([lengths, mortar[3]]),
    )
    rank = np.empty(len(items), dtype=np.int64)
    rank[shuffle] = np.arange(len(items))
    return _by_row(*pieces, rank=rank)


def pack_by_group(items: Items, groups: IntArray, *, limits: PackLimits, seed: int) -> Packing:
    """Rows whose samples all belong to one group (few-shot rows of one task); the groups follow one another."""
    parts = []
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        part = pack(items.select(members), limits=limits, seed=seed)
        parts.append(Packing(members[part.samples], part.starts, part.stops, part.row_splits))
    return _concatenate(parts)


def one_per_row(items: Items, *, limits: PackLimits) -> Packing:
    """One sample a row, in the order given; a text document takes as many rows as it needs."""
    num_pieces = np.maximum(-(-items.lengths // limits.tokens), 1)
    samples = np.repeat(np.arange(len(items)), num_pieces)
    first = np.repeat(np.cumsum(num_pieces) - num_pieces, num_pieces)
    starts = (np.arange(len(samples)) - first) * limits.tokens
    stops = np.minimum(starts + limits.tokens, items.lengths[samples])
    return Packing(samples, starts, stops, np.arange(len(samples) + 1))


class _Room:
    """Rows grouped by what they can still take: (tokens, images) -> blocks of row numbers."""

    def __init__(self, limits: PackLimits) -> None:
        self._blocks: defaultdict[tuple[int, int], list[IntArray]] = defaultdict(list)
        self._occupied = np.zeros((limits.tokens + 1, limits.images + 1), dtype=np.bool_)

    def add(self, tokens: int, images: int, rows: IntArray) -> None:
        if len(rows):
            self._blocks[tokens, images].append(rows)
            self._occupied[tokens, images] = True

    def tightest(self, tokens: int, images: int) -> Iterator[tuple[int, int, IntArray]]:
        """Take out, one after the other, the groups that can hold such a sample, least room first.

        The caller puts back what is left of each: rows that a further sample of this class does not fit into,
        or, when the samples have run out, any.
        """
        fitting = np.argwhere(self._occupied[tokens:, images:]) + (tokens, images)
        for room_tokens, room_images in fitting.tolist():
            self._occupied[room_tokens, room_images] = False
            yield room_tokens, room_images, np.concatenate(self._blocks.pop((room_tokens, room_images)))


class _BestFit:
    """Places classes of equal samples, longest first; ``row_of`` and ``num_rows`` are the result."""

    def __init__(self, limits: PackLimits, num_samples: int) -> None:
        self.row_of = np.empty(num_samples, dtype=np.int64)
        """int64[samples]: row of each sample."""
        self.num_rows = 0
        self._limits = limits
        self._room = _Room(limits)

    def place(self, lengths: IntArray, images: IntArray) -> None:
        """Give every sample its row."""
        base = int(images.max(initial=0)) + 1
        keys = lengths * base + images
        # numpy sorts 16-bit keys by radix
        order = np.argsort(keys.astype(np.uint16) if keys.max(initial=0) < 2**16 else keys, kind="stable")
        ordered = keys[order]
        borders = np.flatnonzero(np.diff(ordered, prepend=-1, append=-1))
        for begin, end in zip(borders[-2::-1].tolist(), borders[:0:-1].tolist(), strict=True):
            size = divmod(int(ordered[begin]), base)
            left = self._fill_existing(order[begin:end], size)
            if len(left):
                self._open_rows(left, size)

    def _fill_existing(self, members: IntArray, size: tuple[int, int]) -> IntArray:
        """Put samples of one size into rows that have room, tightest first; returns those left over."""
        for *space, rows in self._room.tightest(*size):
            members = self._fill(members, size, (space[0], space[1]), rows)
            if not len(members):
                break
        return members

    def _open_rows(self, members: IntArray, size: tuple[int, int]) -> None:
        """Put samples of one size into new rows."""
        space = (self._limits.tokens, self._limits.images)
        per_row = _times(size, space)
        assert per_row > 0, f"a sample of {size[0]} tokens and {size[1]} images exceeds {self._limits}"
        num_new = -(-len(members) // per_row)
        self._fill(members, size, space, np.arange(self.num_rows, self.num_rows + num_new))
        self.num_rows += num_new

    def _fill(self, members: IntArray, size: tuple[int, int], space: tuple[int, int], rows: IntArray) -> IntArray:
        """Fill ``rows`` of equal ``space`` one after the other; returns the samples left over."""
        per_row = _times(size, space)
        count = min(len(members), per_row * len(rows))
        full, partial = divmod(count, per_row)
        self.row_of[members[: full * per_row]] = np.repeat(rows[:full], per_row)
        self._room.add(space[0] - per_row * size[0], space[1] - per_row * size[1], rows[:full])
        untouched = full
        if partial:
            self.row_of[members[full * per_row : count]] = rows[full]
            self._room.add(space[0] - partial * size[0], space[1] - partial * size[1], rows[full : full + 1])
            untouched += 1
        self._room.add(*space, rows[untouched:])
        return members[count:]


def _times(size: tuple[int, int], space: tuple[int, int]) -> int:
    """How many samples of a size (tokens, images) fit into a space."""
    by_tokens = space[0] // max(size[0], 1)
    return min(by_tokens, space[1] // size[1]) if size[1] else by_tokens


def _lay_text(documents: IntArray, lengths: IntArray, gaps: IntArray, *, limits: PackLimits) -> tuple[IntArray, ...]:
    """Lay the documents as one stream over the gaps (largest first), then over new rows.

    Returns row, document, start and stop of every piece.
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


def _by_row(rows: IntArray, samples: IntArray, starts: IntArray, stops: IntArray, *, rank: IntArray) -> Packing:
    """Sort pieces by row, and within a row by the shuffle, so that the longest sample does not always come
    first."""
    # A row holds at most one piece of a document, so (row, rank) is unique and one sort of one key suffices.
    order = np.argsort((rows << 32) | rank[samples])
    num_rows = int(rows.max(initial=-1)) + 1
    splits = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=num_rows))])
    return Packing(samples[order], starts[order], stops[order], splits)


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
