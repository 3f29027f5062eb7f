"""Sorting of more numbers than memory holds: sorted runs on disk, which are merged.

    add     rows of numbers in any order ──▶ a full buffer is sorted and written: a run
    chunks  a block of each run ──▶ the rows below the last row of every block are complete: a sorted chunk

Rows of a run that come later are not smaller than the last row of its block. So nothing that is read later belongs
before that limit, and one sort of the blocks gives the next rows of the whole. Rows with the same first number are
always in the same chunk, because the limit compares first numbers. So whoever groups by the first number never looks
beyond a chunk.

Memory holds a few times ``RUN_BYTES``, and all rows of the largest group with one first number. ``thin`` removes rows
of a run that cannot matter, so that a number that occurs in every row makes no large group. If all rows fit into one
buffer, nothing is written. The files lie in a folder that is removed at the end (:func:`scratch_folder`).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

Table = npt.NDArray[np.uint64]
"""uint64[rows, columns]."""
RUN_BYTES = 256 * 2**20
"""Bytes of rows that are sorted at a time."""


@contextmanager
def scratch_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder; remove it at the end, and before the start if a killed process has left it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sort_rows(rows: Table) -> Table:
    """Return the rows in order of the first column, then of the second, and so on."""
    rows = rows[np.argsort(rows[:, 0])]
    same = rows[1:, 0] == rows[:-1, 0]
    if same.any():  # only these need the other columns, which cost as much as the first each
        tied = np.append(same, False) | np.insert(same, 0, False)
        group = rows[tied]
        rows[tied] = group[np.lexsort(group.T[::-1])]
    return rows


def starts_of_groups(rows: Table, columns: int) -> npt.NDArray[np.bool_]:
    """Return bool[rows]: whether each sorted row differs from the one before in its first ``columns``."""
    fresh = np.ones(len(rows), dtype=np.bool_)
    fresh[1:] = (rows[1:, :columns] != rows[:-1, :columns]).any(axis=1)
    return fresh


class SortedRuns:
    """Rows of numbers that are added in any order and read back in order."""

    def __init__(self, stem: Path, width: int, *, thin: Callable[[Table], Table] = lambda rows: rows) -> None:
        """Take no rows yet.

        ``stem``: path prefix of the runs. ``width``: columns of a row. ``thin``: gets the sorted rows of a run and
        returns those to keep. It may be called with any part of all rows.
        """
        self._stem = stem
        self._width = width
        self._most_rows = max(RUN_BYTES // (8 * width), 1)
        self._thin = thin
        self._buffer: list[Table] = []
        self._num_buffered = 0
        self._runs: list[_Run] = []

    def add(self, rows: Table) -> None:
        """Add rows, uint64[n, width]."""
        while len(rows):
            part = rows[: self._most_rows - self._num_buffered]
            self._buffer.append(part)
            self._num_buffered += len(part)
            rows = rows[len(part) :]
            if self._num_buffered == self._most_rows:
                self._write_run()

    def chunks(self) -> Iterator[Table]:
        """Yield all rows in order and forget them. Rows with the same first number are in one chunk."""
        if not self._runs:
            yield self._sorted_buffer()
            return
        if self._num_buffered:
            self._write_run()
        block = max(self._most_rows // len(self._runs), 1)
        while any(run.has_rows for run in self._runs):
            for run in self._runs:
                run.load(block)
            limits = [run.last for run in self._runs if run.more_on_disk]
            ready = [run.take_below(min(limits, default=None)) for run in self._runs]
            if any(map(len, ready)):
                yield sort_rows(np.concatenate(ready))
            else:  # one number fills whole blocks
                for run in self._runs:
                    if run.more_on_disk and run.last == min(limits):
                        run.load(run.num_loaded + block)
        for run in self._runs:
            run.path.unlink()
        self._runs = []

    def _sorted_buffer(self) -> Table:
        rows = np.concatenate([np.zeros((0, self._width), dtype=np.uint64), *self._buffer])
        self._buffer, self._num_buffered = [], 0
        return self._thin(sort_rows(rows))

    def _write_run(self) -> None:
        rows = self._sorted_buffer()
        path = self._stem.with_name(f"{self._stem.name}-{len(self._runs)}.run")
        with path.open("wb") as file:
            file.write(np.ascontiguousarray(rows).data)
        self._runs.append(_Run(path, self._width, len(rows)))


class _Run:
    """A sorted file and the part of it that is in memory."""

    def __init__(self, path: Path, width: int, num_rows: int) -> None:
        self.path = path
        self._width = width
        self._num_rows = num_rows
        self._num_read = 0
        self._rows = np.zeros((0, width), dtype=np.uint64)

    @property
    def num_loaded(self) -> int:
        """Rows in memory."""
        return len(self._rows)

    @property
    def more_on_disk(self) -> bool:
        """Whether rows are left to read."""
        return self._num_read < self._num_rows

    @property
    def has_rows(self) -> bool:
        """Whether rows are left."""
        return self.more_on_disk or len(self._rows) > 0

    @property
    def last(self) -> np.uint64:
        """First number of the last row in memory."""
        last: np.uint64 = self._rows[-1, 0]
        return last

    def load(self, count: int) -> None:
        """Read until at least ``count`` rows are in memory, or all that are left."""
        missing = min(count - len(self._rows), self._num_rows - self._num_read)
        if missing > 0:
            offset = 8 * self._width * self._num_read
            fresh = np.fromfile(self.path, dtype=np.uint64, count=missing * self._width, offset=offset)
            self._rows = np.concatenate([self._rows, fresh.reshape(missing, self._width)])
            self._num_read += missing

    def take_below(self, limit: np.uint64 | None) -> Table:
        """Return the rows in memory whose first number is below a limit, by default all, and forget them."""
        stop = len(self._rows) if limit is None else int(np.searchsorted(self._rows[:, 0], limit))
        taken, self._rows = self._rows[:stop], self._rows[stop:]
        return taken


class FirstUses:
    """Entries of a stream that are the first with their key, and those that are not.

    An entry is a row: ``key_width`` columns of its key, its number, and any columns that are kept with it.
    """

    def __init__(
        self, stem: Path, *, key_width: int, width: int, repeated: Callable[[npt.NDArray[np.int64]], None]
    ) -> None:
        """``repeated`` is called with numbers of entries that are not the first, int64[n], each once."""
        self._key_width = key_width
        self._repeated = repeated
        self._runs = SortedRuns(stem, width, thin=self._drop_repeated)

    def add(self, rows: Table) -> None:
        """Add entries, uint64[n, width]."""
        self._runs.add(rows)

    def firsts(self) -> Iterator[Table]:
        """Yield the first entry of each key, in order of the keys, as uint64[n, width]."""
        for rows in self._runs.chunks():
            yield self._drop_repeated(rows)

    def _drop_repeated(self, rows: Table) -> Table:
        fresh = starts_of_groups(rows, self._key_width)
        if not fresh.all():
            self._repeated(rows[~fresh, self._key_width].astype(np.int64))
        return rows[fresh]
