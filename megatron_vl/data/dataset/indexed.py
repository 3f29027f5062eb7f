"""Megatron-Core's IndexedDataset format, ``<prefix>.bin`` and ``<prefix>.idx``, with numpy only.

``.bin`` holds sequences of one type, one after the other. ``.idx`` holds, little-endian: ``MMIDIDX\\0\\0``, version
(u64, 1), type code (u8), number of sequences (u64), number of documents + 1 (u64), lengths (i32 each), byte offsets
(i64 each), document borders (i64 each; here every sequence is a document) and optionally one mode byte per sequence.
The format leaves the meaning of the mode byte to its user.

There are two reasons not to use Megatron-Core's own class. Importing it takes eight seconds in every data tool and
decode worker. And it detects a truncated file only hours into a run (memory map) or never (without). Here, opening a
file checks that the index is consistent and matches the size of the data, and every read checks its length. Reads are
positioned (``pread``), so threads can share a reader, and it survives a fork. Megatron-Core can read these files; a
test checks this.
"""

from __future__ import annotations

import errno
import hashlib
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from megatron_vl.errors import DataError
from megatron_vl.files import sync

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_VERSION = 1
_TYPE_CODES = {
    "uint8": 1,
    "int8": 2,
    "int16": 3,
    "int32": 4,
    "int64": 5,
    "float64": 6,
    "float32": 7,
    "uint16": 8,
}
_TYPES = {code: np.dtype(name) for name, code in _TYPE_CODES.items()}


@dataclass(frozen=True)
class FileRange:
    """Consecutive bytes of a file."""

    size: int
    sha256: str


def write_index(
    prefix: str | Path,
    lengths: npt.NDArray[np.integer],
    dtype: npt.DTypeLike,
    modes: npt.NDArray[np.integer] | None = None,
) -> FileRange:
    """Write ``<prefix>.idx`` durably, for sequences of ``lengths`` (integers[sequences]) in items of ``dtype``.

    ``modes``: integers[sequences] from 0 to 127, if the file is to be opened with modes.
    """
    kind, count = np.dtype(dtype), len(lengths)
    pointers = np.zeros(count, dtype="<i8")
    np.cumsum(lengths[:-1].astype(np.int64) * kind.itemsize, out=pointers[1:])
    content = b"".join([
        _HEADER.pack(_MAGIC, _VERSION, _TYPE_CODES[kind.name], count, count + 1),
        lengths.astype("<i4").tobytes(),
        pointers.tobytes(),
        np.arange(count + 1, dtype="<i8").tobytes(),
        b"" if modes is None else modes.astype(np.int8).tobytes(),
    ])  # fmt: skip
    with paths_of(prefix)[1].open("wb") as file:
        file.write(content)
        sync(file)
    return FileRange(len(content), hashlib.sha256(content).hexdigest())


class IndexedFile:
    """Random access to the sequences of ``<prefix>.bin``. Opening checks everything that the index can tell."""

    def __init__(self, prefix: str | Path, *, with_modes: bool = False) -> None:
        """Open both files. Raises DataError with the name of the file if one is missing, truncated or inconsistent."""
        self._bin_path, self._idx_path = paths_of(prefix)
        content = _open_index(self._idx_path)
        self.dtype, count, documents = self._header(content)
        sizes = (4 * count, 8 * count, 8 * documents, count if with_modes else 0)
        if content.size != _HEADER.size + sum(sizes):
            raise DataError(
                f"{self._idx_path}: {content.size} bytes, but its header tells of {count} sequences, which "
                "take "
                f"{_HEADER.size + sum(sizes)}. The file is truncated or of another kind; prepare the data "
                "again."
            )
        borders = np.cumsum((_HEADER.size, *sizes)).tolist()
        self.lengths: npt.NDArray[np.int32] = content[borders[0] : borders[1]].view("<i4")
        """int32[sequences]: items in each sequence."""
        self._pointers: npt.NDArray[np.int64] = content[borders[1] : borders[2]].view("<i8")
        self.modes: npt.NDArray[np.int8] | None = content[borders[3] : borders[4]].view(np.int8) if with_modes else None
        """int8[sequences], if the file was opened with modes."""
        self._check_pointers()
        self._descriptor = _open_descriptor(self._bin_path)
        self._check_data_size()

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> npt.NDArray[np.generic]:
        """Return one sequence as an array of its own, ``dtype``[length]. Raises DataError if the data ends early."""
        return np.frombuffer(self.read_bytes(index), dtype=self.dtype)

    def read_bytes(self, index: int, *, start: int = 0, stop: int | None = None) -> bytes:
        """Return the bytes of items [start, stop) of one sequence, by default of all items.

        Raises:
            DataError: The data ends before these bytes.
            IndexError: There is no such sequence.
        """
        if not 0 <= index < len(self.lengths):
            raise IndexError(f"{self._bin_path}: sequence {index} of {len(self.lengths)}")
        last = int(self.lengths[index])
        assert 0 <= start <= (last if stop is None else stop) <= last
        size = ((last if stop is None else stop) - start) * self.dtype.itemsize
        offset = int(self._pointers[index]) + start * self.dtype.itemsize
        data = os.pread(self._descriptor, size, offset)
        if len(data) != size:
            raise DataError(f"{self._bin_path}: sequence {index} has {len(data)} of {size} bytes; the file was cut.")
        return data

    def close(self) -> None:
        """Close the data file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _header(self, content: npt.NDArray[np.uint8]) -> tuple[np.dtype[np.generic], int, int]:
        if content.size < _HEADER.size:
            raise DataError(f"{self._idx_path}: {content.size} bytes are too few for an index; prepare the data again.")
        magic, version, code, count, documents = _HEADER.unpack(content[: _HEADER.size].tobytes())
        if magic != _MAGIC or version != _VERSION or code not in _TYPES:
            raise DataError(
                f"{self._idx_path}: not an index of version {_VERSION} (begins with {magic!r}, version "
                f"{version}, type "
                f"{code}); prepare the data again."
            )
        return _TYPES[code], count, documents

    def _check_pointers(self) -> None:
        expected = np.zeros(len(self.lengths), dtype=np.int64)
        np.cumsum(self.lengths[:-1].astype(np.int64) * self.dtype.itemsize, out=expected[1:])
        if (len(self.lengths) and int(self.lengths.min()) < 0) or not np.array_equal(expected, self._pointers):
            raise DataError(
                f"{self._idx_path}: offsets and lengths disagree; the file is damaged. Prepare the data again."
            )

    def _check_data_size(self) -> None:
        found = os.fstat(self._descriptor).st_size
        expected = int(self.lengths.sum(dtype=np.int64)) * self.dtype.itemsize
        if found != expected:
            raise DataError(
                f"{self._bin_path}: {found} bytes, but {self._idx_path.name} tells of {expected}. The file "
                "is truncated "
                "or belongs to another index; prepare the data again or copy it anew."
            )


def paths_of(prefix: str | Path) -> tuple[Path, Path]:
    """Return the paths of the data file and the index file of a prefix."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx")


def _open_index(path: Path) -> npt.NDArray[np.uint8]:
    """Map the index as uint8[bytes], so that all processes of a machine share it. An empty file gives an empty array.

    Raises:
        DataError: The file cannot be opened.
    """
    try:
        if path.stat().st_size == 0:
            return np.zeros(0, dtype=np.uint8)
        return np.memmap(path, mode="r", dtype=np.uint8)
    except OSError as error:
        raise _not_opened(path, error) from error


def _open_descriptor(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise _not_opened(path, error) from error


def _not_opened(path: Path, error: OSError) -> DataError:
    if error.errno in (errno.EMFILE, errno.ENFILE):
        remedy = "A data set of many blocks has many files; raise the limit of open files (ulimit -n)"
    else:
        remedy = "Was the data prepared to the end?"
    return DataError(f"{path}: cannot be opened ({error.strerror}). {remedy}")
