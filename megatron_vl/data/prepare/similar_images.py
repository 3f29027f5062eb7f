"""Samples whose image looks like an earlier one, among more images than memory holds.

    hashes with first uses ──sort by use──▶ order ──sort by each band──▶ pairs ──sort by the later one──▶ who stays

In the order of their first use, a hash stays unless it is within the distance of an earlier hash that stays. Pairs come
from sorting by a band of bits (``filters/duplicates.py``). All sorting is done in runs on disk. Memory holds a byte for
each hash, and the largest group of hashes that agree in a band. Its pairs are all compared. So a large distance takes
very long for hundreds of millions of images: groups get larger as bands get narrower.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_vl.data.filters.duplicates import band_mask, pairs_in_band
from megatron_vl.data.prepare.sorted_runs import SortedRuns, Table, starts_of_groups

_READ_ROWS = 2**20


def mark_similar(
    firsts: Iterable[Table], distance: int, *, scratch: Path, mark: Callable[[npt.NDArray[np.int64]], None]
) -> None:
    """Mark the entries whose hash is within a distance in bits of an earlier one that stays.

    ``firsts``: each hash once, with the number of the entry that has it first, uint64[n, 2]. ``scratch``: folder for
    temporary files. ``mark`` is called with the numbers of entries, int64[n].
    """
    if not distance:
        for _ in firsts:
            pass  # equal hashes are found while their first uses are
        return
    path, count = _in_order_of_use(firsts, scratch)
    pairs = SortedRuns(scratch / "pairs", 2, thin=lambda rows: rows[starts_of_groups(rows, 2)])
    for band in range(distance + 1):
        for later, earlier in _pairs(path, band, distance, scratch):
            pairs.add(np.stack([later, earlier], axis=1))
    stays = bytearray(b"\1") * count
    for rows in pairs.chunks():
        for second, first in rows[starts_of_groups(rows, 2)].tolist():
            if stays[first]:
                stays[second] = 0
    kept = np.frombuffer(stays, dtype=np.bool_)
    for begin, rows in _read(path):
        mark(rows[~kept[begin : begin + len(rows)], 0].astype(np.int64))
    path.unlink()


def _in_order_of_use(firsts: Iterable[Table], scratch: Path) -> tuple[Path, int]:
    """Write (number of the entry, hash), uint64[n, 2], in order of the numbers; return the file and n."""
    runs = SortedRuns(scratch / "uses", 2)
    for rows in firsts:
        runs.add(rows[:, ::-1])
    path, count = scratch / "order.bin", 0
    with path.open("wb") as file:
        for rows in runs.chunks():
            file.write(np.ascontiguousarray(rows).data)
            count += len(rows)
    return path, count


def _pairs(path: Path, band: int, distance: int, scratch: Path) -> Iterator[tuple[Table, Table]]:
    """Yield places in the order, later and earlier, of hashes that agree in a band and are within the distance."""
    runs = SortedRuns(scratch / "band", 3)
    for begin, rows in _read(path):
        places = np.arange(begin, begin + len(rows), dtype=np.uint64)
        runs.add(np.stack([rows[:, 1] & band_mask(band, distance), places, rows[:, 1]], axis=1))
    for rows in runs.chunks():
        for i, j in pairs_in_band(rows[:, 0], rows[:, 2], distance):
            yield rows[j, 1], rows[i, 1]


def _read(path: Path) -> Iterator[tuple[int, Table]]:
    """Yield the first place and the rows of consecutive pieces of the order."""
    begin = 0
    while len(rows := np.fromfile(path, dtype=np.uint64, count=2 * _READ_ROWS, offset=16 * begin).reshape(-1, 2)):
        yield begin, rows
        begin += len(rows)
