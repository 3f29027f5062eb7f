"""The samples that packing and balance are measured on, and the two usual ways to pack them.

Of the samples 80 % have one image and a short text, 10 % are text documents, 10 % have two to four images; the lengths
of texts are log-normal. An image is 256 slots and two markers, a row 2,048 tokens. Numbers are drawn with a seed, and
what next-fit makes of the first 400,000 is known: it says whether the stream is the one meant.
"""

from __future__ import annotations

import heapq

import numpy as np

from megatron_vl.data.prepare.packing import IntArray, Items

SEED = 1
ROW = 2048
IMAGE = 258
_SHORTEST = 16
_SHORTEST_DOCUMENT = 64
_CHECKED = 400_000
_NEXT_FIT_FILL = 0.868


def make_stream(count: int) -> Items:
    """The first samples of a stream of ``count``; streams of different counts differ."""
    rng = np.random.default_rng(SEED)
    kinds = rng.choice(3, count, p=[0.8, 0.1, 0.1])
    is_text, is_long = kinds == 1, kinds == 2
    words = np.exp(rng.normal(3.4, 0.8, count))
    lengths = np.floor(IMAGE + words).astype(np.int64)
    documents = np.exp(rng.normal(6.2, 0.8, np.count_nonzero(is_text)))
    lengths[is_text] = np.clip(documents, _SHORTEST_DOCUMENT, ROW).astype(np.int64)
    images = np.where(is_text, 0, 1)
    images[is_long] = rng.integers(2, 5, np.count_nonzero(is_long))
    lengths[is_long] = (images[is_long] * IMAGE + 3 * words[is_long]).astype(np.int64)
    return Items(np.clip(lengths, _SHORTEST, ROW), images, is_text)


def check_stream() -> str:
    """What next-fit makes of the stream, as a line to print.

    Raises:
        SystemExit: it is not what it should be; then the stream is another, and no figure could be compared.
    """
    items = make_stream(_CHECKED)
    found = fill(items, next_fit(items))
    line = f"stream: seed {SEED}; next-fit fills {100 * found:.1f} % of its rows at {_CHECKED:,} samples"
    if round(found, 3) != _NEXT_FIT_FILL:
        raise SystemExit(f"{line}, expected {100 * _NEXT_FIT_FILL:.1f} %: numpy draws other numbers")
    return line


def fill(items: Items, num_rows: int) -> float:
    """Tokens over what the rows could hold."""
    return int(items.lengths.sum()) / (num_rows * ROW)


def next_fit(items: Items) -> int:
    """Number of rows when samples are taken in order, and a row ends where the next does not fit."""
    rows, used = 1, 0
    for length in items.lengths.tolist():
        used += length
        if used > ROW:
            rows, used = rows + 1, length
    return rows


def first_fit_decreasing(lengths: IntArray) -> int:
    """Number of rows when each sample, the longest first, goes whole into the first row that has room.

    ``usable`` holds the rows with room for the current length. Lengths only fall, so a row that has none waits until
    the length has come down to its room.
    """
    usable: list[int] = []
    waiting: list[list[int]] = [[] for _ in range(ROW + 1)]
    room: list[int] = []
    counts = np.bincount(lengths, minlength=ROW + 1).tolist()
    for length in range(ROW, 0, -1):
        for row in waiting[length]:
            heapq.heappush(usable, row)
        for _ in range(counts[length]):
            if not usable:
                usable.append(len(room))
                room.append(ROW)
            row = usable[0]
            room[row] -= length
            if room[row] < length:
                waiting[room[row]].append(heapq.heappop(usable))
    return len(room)
