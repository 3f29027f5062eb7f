"""A file of a store as a stream that can seek: blocks are fetched, kept for a while, and fetched ahead.

A request takes some ten milliseconds whatever its size. So a reader that goes forward gets twice as much with each
request, up to 8 MiB. A reader that jumps, in a zip or in the columns of parquet, gets what it asked for in blocks of
256 KiB. The last 16 MiB of blocks are kept, because the reader of a zip returns to its directory, and that of parquet
to each column.

fsspec has such caches, but one has to be chosen before the pattern of reading is known, and a failed request ends the
stream.
"""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

BLOCK_BYTES = 2**18
MOST_AHEAD = 2**23 // BLOCK_BYTES
"""Most blocks of one request."""
MOST_KEPT = 2**24 // BLOCK_BYTES
"""Most blocks in memory."""


class BlockStream(io.RawIOBase):
    """A stream over ``fetch(begin, end)``, which returns exactly these bytes of a file of ``size`` bytes."""

    def __init__(self, fetch: Callable[[int, int], bytes], size: int) -> None:
        super().__init__()
        self._fetch, self._size = fetch, size
        self._position = 0
        self._kept: OrderedDict[int, bytes] = OrderedDict()
        self._next = 0
        """The block behind the last request."""
        self._ahead = 1
        """Number of blocks of the last request."""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        begin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if begin + offset < 0:
            raise ValueError(f"negative position {begin + offset}")
        self._position = begin + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill ``buffer`` from one block; return the number of bytes, 0 at the end of the file."""
        wanted = min(len(buffer), self._size - self._position)
        if wanted <= 0:
            return 0
        number, offset = divmod(self._position, BLOCK_BYTES)
        if number not in self._kept:
            self._fetch_from(number, -(-(offset + wanted) // BLOCK_BYTES))
        self._kept.move_to_end(number)
        piece = self._kept[number][offset : offset + wanted]
        buffer[: len(piece)] = piece
        self._position += len(piece)
        return len(piece)

    def _fetch_from(self, first: int, needed: int) -> None:
        """Fetch at least the first of ``needed`` blocks, and more than the last time if that went up to ``first``."""
        ahead = 2 * self._ahead if first == self._next and first else 1
        num_blocks = min(max(ahead, needed), MOST_AHEAD)
        begin = first * BLOCK_BYTES
        data = self._fetch(begin, min(begin + num_blocks * BLOCK_BYTES, self._size))
        fetched = range(0, len(data), BLOCK_BYTES)
        for number, start in enumerate(fetched, start=first):
            self._kept[number] = data[start : start + BLOCK_BYTES]
            self._kept.move_to_end(number)
        while len(self._kept) > MOST_KEPT:
            self._kept.popitem(last=False)
        self._next, self._ahead = first + len(fetched), num_blocks
