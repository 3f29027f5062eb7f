"""The unit of work of the merge: writing a slice of rows to fixed positions in files.

    rows-<plan>.tokens.bin, rows-<plan>.images.bin     of a block of the data set; every worker writes its own range
    rows-<plan>-<slice>.npz                            the record of a finished slice: hashes of its ranges, its keys

If there are several blocks, ``<plan>`` is followed by the name of the block.

The record is written last, when the ranges are on the disk. The name of a slice is the hash of its inputs and its
positions. The name of a plan is the hash of its slices. So a slice with a record is not written again, and a killed
merge resumes where it stopped. A leftover worker of another plan writes to files that nobody reads.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_vl.data.dataset.columns import load_columns, store_columns
from megatron_vl.data.dataset.indexed import FileRange
from megatron_vl.data.dataset.rows import SegmentKey, encode_keys, encode_row, split_tokens
from megatron_vl.data.prepare.part_reader import PartReader
from megatron_vl.data.sample import TASKS
from megatron_vl.files import HashedWriter, sync

IntArray = npt.NDArray[np.int64]
TOKENS, IMAGES = ".tokens", ".images"
_BUFFER_BYTES = 4 * 2**20


@dataclass(frozen=True)
class RowSlice:
    """Consecutive rows, and the positions of everything they need."""

    block: str
    """What follows the prefix in the names of the files of its block."""
    token_begin: int
    """First byte of its rows in the file of tokens."""
    image_begin: int
    """First byte, in the file of images, of the images that its rows are the first to use."""
    paths: tuple[Path, ...]
    """Files of the parts that it reads."""
    names: tuple[str, ...]
    """Names of the sources."""
    row_splits: IntArray
    """int64[rows + 1]: row r has the segments row_splits[r] to row_splits[r + 1]."""
    part: IntArray
    """int64[segments]: index into ``paths``."""
    offset: IntArray
    """int64[segments]: first byte of the sample's tokens."""
    length: npt.NDArray[np.int32]
    """int32[segments]: tokens of the sample. Its key follows them."""
    key_size: npt.NDArray[np.int32]
    source: npt.NDArray[np.int16]
    task: npt.NDArray[np.int8]
    start: IntArray
    """int64[segments]: the segment is tokens [start, stop) of the sample."""
    stop: IntArray
    image_splits: IntArray
    """int64[rows + 1]: row r has the images image_numbers[image_splits[r] : image_splits[r + 1]]."""
    image_numbers: IntArray
    image_part: IntArray
    """int64[images that it stores]: index into ``paths``."""
    image_offset: IntArray
    image_size: npt.NDArray[np.int32]

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return len(self.row_splits) - 1

    @cached_property
    def name(self) -> str:
        """Fingerprint of all fields. Parts are represented by their names, independently of their folder."""
        digest = hashlib.sha256()
        facts = dataclasses.replace(self, paths=tuple(Path(path.name) for path in self.paths))
        for item in dataclasses.fields(facts):
            value = getattr(facts, item.name)
            data = value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode()
            digest.update(f"{item.name} {len(data)} ".encode() + data)
        return digest.hexdigest()[:32]


@dataclass(frozen=True)
class SliceRecord:
    """The stored facts about a finished slice."""

    tokens: FileRange
    images: FileRange
    keys: npt.NDArray[np.uint8]
    """uint8[bytes]: the stored keys of its rows, one after the other."""
    key_lengths: npt.NDArray[np.int32]
    """int32[rows]: bytes of the keys of each row."""


def record_path(stem: Path, name: str) -> Path:
    """Return the path of the record of a slice; ``stem`` is the path prefix of all files of a plan."""
    return stem.with_name(f"{stem.name}-{name}.npz")


def write_slice(work: RowSlice, stem: Path) -> int:
    """Write the rows of a slice and the images that they are the first to use; return the number of rows.

    Both files must already have their final size.

    Raises:
        DataError: A part is damaged.
    """
    reader = PartReader(work.paths)
    try:
        with _stretch(Path(f"{stem}{work.block}{IMAGES}.bin"), work.image_begin) as images:
            places = (work.image_part, work.image_offset, work.image_size)
            for part, offset, size in zip(*(column.tolist() for column in places), strict=True):
                images.write(reader.read(part, offset, size))
        with _stretch(Path(f"{stem}{work.block}{TOKENS}.bin"), work.token_begin) as tokens:
            keys = [_write_row(work, row, reader, tokens) for row in range(work.num_rows)]
    finally:
        reader.close()
    ranges = json.dumps([(writer.size, writer.sha256) for writer in (tokens, images)])
    columns: dict[str, npt.NDArray[Any]] = {
        "ranges": np.frombuffer(ranges.encode(), np.uint8),
        "keys": np.frombuffer(b"".join(keys), np.uint8),
        "key_lengths": np.array([len(key) for key in keys], dtype=np.int32),
    }
    store_columns(record_path(stem, work.name), columns)
    return work.num_rows


def read_record(stem: Path, name: str) -> SliceRecord | None:
    """Return the record of a slice, or None if it is absent or damaged."""
    stored = load_columns(record_path(stem, name))
    try:
        if stored is None:
            return None
        tokens, images = (FileRange(*item) for item in json.loads(stored["ranges"].tobytes()))
        return SliceRecord(tokens, images, stored["keys"], stored["key_lengths"])
    except (ValueError, KeyError, TypeError):
        return None


@contextlib.contextmanager
def _stretch(path: Path, begin: int) -> Iterator[HashedWriter]:
    """Yield a writer into a file from a byte on. After the block, its data is on the disk.

    The file is opened in write-only mode. Otherwise an NFS client would read a page before writing part of it, and then
    send the whole page, including outdated bytes of the neighboring range.
    """
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CLOEXEC), "wb", _BUFFER_BYTES) as file:
        file.seek(begin)
        yield HashedWriter(file)
        sync(file)


def _write_row(work: RowSlice, row: int, reader: PartReader, tokens: HashedWriter) -> bytes:
    """Write one row; return its keys in their stored form."""
    numbers = range(work.row_splits[row], work.row_splits[row + 1])
    segments = [_read_segment(work, number, reader) for number in numbers]
    images = work.image_numbers[work.image_splits[row] : work.image_splits[row + 1]]
    tokens.write(encode_row([segment for segment, _ in segments], images).astype("<i4").tobytes())
    return encode_keys([key for _, key in segments])


def _read_segment(work: RowSlice, segment: int, reader: PartReader) -> tuple[npt.NDArray[np.int32], SegmentKey]:
    """Return the stored tokens of a segment, int32[tokens], and its origin.

    If the segment continues a text document, its first token is not a target, because another segment precedes it in
    the row.
    """
    part, offset = int(work.part[segment]), int(work.offset[segment])
    start, stop = int(work.start[segment]), int(work.stop[segment])
    length, key_size = int(work.length[segment]), int(work.key_size[segment])
    data = reader.read(part, offset + 4 * start, 4 * (stop - start))
    key = reader.read(part, offset + 4 * length, key_size).decode("utf-8", "surrogatepass")
    joined = np.frombuffer(data, dtype="<i4")
    if start > 0:
        joined = joined.copy()
        joined[0] = split_tokens(joined[:1])[0][0]
    return joined, SegmentKey(work.names[work.source[segment]], TASKS[work.task[segment]], key, start, stop)
