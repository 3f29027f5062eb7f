"""Blocks of a file in a store: which requests a way of reading makes, and that the bytes are those of the file."""

from __future__ import annotations

import io
import random

from megatron_vl.data.remote.blocks import BLOCK_BYTES, MOST_AHEAD, MOST_KEPT, BlockStream

CONTENT = random.Random(0).randbytes(40 * BLOCK_BYTES + 1000)


class Requests:
    """Which blocks were asked for, as (first block, number of bytes)."""

    def __init__(self, content: bytes = CONTENT) -> None:
        self.content = content
        self.made: list[tuple[int, int]] = []
        self.stream = BlockStream(self.fetch, len(content))

    def fetch(self, begin: int, end: int) -> bytes:
        assert begin % BLOCK_BYTES == 0 and begin < end <= len(self.content)
        self.made.append((begin // BLOCK_BYTES, end - begin))
        return self.content[begin:end]


def test_any_way_of_reading_gives_the_bytes_of_the_file() -> None:
    draw = random.Random(1)
    for buffered in (False, True):
        requests = Requests()
        stream = io.BufferedReader(requests.stream, 1 << 16) if buffered else requests.stream
        for _ in range(400):
            position, size = draw.randrange(len(CONTENT) + 10), draw.choice([1, 30, 512, 70_000, 3 * BLOCK_BYTES])
            stream.seek(position)
            found = b""
            while len(found) < size and (piece := stream.read(size - len(found))):
                found += piece
            assert found == CONTENT[position : position + size]
            assert stream.tell() == max(position, min(position + size, len(CONTENT)))


def test_reading_forward_asks_for_twice_as_much_each_time() -> None:
    requests = Requests()
    assert io.BufferedReader(requests.stream, 1 << 16).read() is not None
    requests = Requests()
    stream = io.BufferedReader(requests.stream, 1 << 16)
    assert b"".join(iter(lambda: stream.read(1 << 16), b"")) == CONTENT
    block = BLOCK_BYTES
    assert requests.made == [(0, block), (1, 2 * block), (3, 4 * block), (7, 8 * block), (15, 16 * block),
                             (31, 9 * block + 1000)]  # fmt: skip


def test_jumping_asks_for_one_block_and_a_large_read_for_all_of_its_own() -> None:
    requests = Requests()
    for position in (30 * BLOCK_BYTES + 5, 3 * BLOCK_BYTES, 12 * BLOCK_BYTES + 9):
        requests.stream.seek(position)
        assert requests.stream.read(100) == CONTENT[position : position + 100]
    assert requests.made == [(30, BLOCK_BYTES), (3, BLOCK_BYTES), (12, BLOCK_BYTES)]
    requests.stream.seek(20 * BLOCK_BYTES + 10)
    buffer = bytearray(2 * BLOCK_BYTES)
    assert requests.stream.readinto(buffer) == BLOCK_BYTES - 10
    assert requests.made[3:] == [(20, 3 * BLOCK_BYTES)]


def test_what_was_read_is_kept_within_bounds() -> None:
    content = bytes(3 * MOST_KEPT * BLOCK_BYTES)
    requests = Requests(content)
    directory = len(content) - 10
    for number in range(2 * MOST_KEPT):
        for position in (directory, 2 * (2 * MOST_KEPT - number) * 2000 * 3 % len(content)):
            requests.stream.seek(position)
            requests.stream.read(4)
    last = len(content) // BLOCK_BYTES - 1
    assert [first for first, _ in requests.made].count(last) == 1, "what is used stays"
    requests = Requests(content)
    while requests.stream.read(1 << 20):
        assert len(requests.stream._kept) <= MOST_KEPT
    assert max(size for _, size in requests.made) == MOST_AHEAD * BLOCK_BYTES


def test_an_empty_file_asks_for_nothing() -> None:
    requests = Requests(b"")
    assert requests.stream.read(10) == b"" and requests.made == []
