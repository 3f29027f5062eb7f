"""Units of work, records that gave no sample, and what every reader asks of files and folders.

A record that cannot be used is *data*, not an exception: a reader yields ``Skipped`` in its place, with the reason that
groups it in the manifest. Exceptions are for what makes the whole source useless (a missing folder, a file of another
format): ``DataError`` names the file, what was found and what was expected.
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vl.errors import DataError, SkipSample

_FAULTS_OF_FILES = frozenset({
    errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.ENOENT, errno.EINVAL,
})  # fmt: skip


@dataclass(frozen=True)
class Shard:
    """A unit of work: a file, or some of its records."""

    name: str
    """Unique within the source and stable over runs."""
    path: Path
    first: int = 0
    """Index of the first record (lines: number counted from 0)."""
    count: int | None = None
    """Number of records; none for all that follow."""
    offset: int = 0
    """Byte at which the first record begins (lines and JSON documents)."""
    contents: str = ""
    """Where records are files below ``path``: a hash that changes with them, see ``hash_of_files``."""


@dataclass(frozen=True)
class Skipped:
    """A record that gave no sample."""

    key: str
    reason: str
    """Short and stable: groups records in the manifest."""
    detail: str = ""


def unreadable(what: str, error: Exception) -> SkipSample:
    """The SkipSample for a file that cannot be read.

    An error of the disk or the network is raised again: it says nothing of the file, and the sample would be lost for
    good, since a finished shard is not read a second time.
    """
    if isinstance(error, OSError) and error.errno is not None and error.errno not in _FAULTS_OF_FILES:
        raise error
    return SkipSample("unreadable_file", f"{what}: {getattr(error, 'strerror', None) or error}")


def skipped(key: str, error: SkipSample) -> Skipped:
    """The record for a ``SkipSample`` that was raised while ``key`` was read."""
    return Skipped(key, error.reason, error.detail)


def require_file(path: Path, what: str) -> Path:
    """``path``, or DataError if it is no regular file."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; expected {what}")
    return path


def require_folder(path: Path, what: str) -> Path:
    """``path``, or DataError if it is no folder."""
    if not path.is_dir():
        raise DataError(f"{path}: no such folder; expected {what}")
    return path


def range_shards(path: Path, num_records: int, records_per_shard: int) -> list[Shard]:
    """Shards of consecutive records of one file."""
    if records_per_shard < 1:
        raise DataError(f"records_per_shard is {records_per_shard}, expected at least 1")
    firsts = range(0, num_records, records_per_shard)
    return [Shard(f"{path.name}:{first}", path, first, min(records_per_shard, num_records - first)) for first in firsts]


def slice_of(records: list[Any], shard: Shard) -> Iterator[tuple[int, Any]]:
    """The records of ``shard`` with their indices."""
    stop = len(records) if shard.count is None else shard.first + shard.count
    for index in range(shard.first, min(stop, len(records))):
        yield index, records[index]


def hash_of_files(files: Iterable[tuple[str, Path]]) -> str:
    """A hash of names, sizes and times of files; of one that is not there, of its name."""
    digest = hashlib.sha256()
    for name, path in files:
        state = path.stat() if path.exists() else None
        digest.update(f"{name!r} {state and (state.st_size, state.st_mtime_ns)}\n".encode())
    return digest.hexdigest()[:32]
