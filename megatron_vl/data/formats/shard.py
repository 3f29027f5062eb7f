"""Units of work, records without a sample, and checks of files and folders that every reader needs.

A record that cannot be used is *data*, not an exception. The reader yields ``Skipped`` in its place, with the reason
under which the manifest counts it. Exceptions are for faults that make the whole source useless, such as a missing
folder or a file of another format. ``DataError`` names the file, what was found and what was expected.
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vl.data.remote.places import state_of
from megatron_vl.errors import DataError, SkipSample

_FAULTS_OF_FILES = frozenset({
    errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.ENOENT, errno.EINVAL,
})  # fmt: skip


@dataclass(frozen=True)
class Shard:
    """A unit of work: a file, or some of its records."""

    name: str
    """Name that is unique within the source and the same in every run."""
    path: Path
    first: int = 0
    """Index of the first record. For lines: the line number counted from 0."""
    count: int | None = None
    """Number of records. None: all remaining records."""
    offset: int = 0
    """Byte offset of the first record (lines and JSON documents)."""
    contents: str = ""
    """If records are files below ``path``: a hash that changes with them, see ``hash_of_files``."""


@dataclass(frozen=True)
class Skipped:
    """A record without a sample."""

    key: str
    reason: str
    """Short, fixed text by which the manifest groups records."""
    detail: str = ""


def unreadable(what: str, error: Exception) -> SkipSample:
    """Return the SkipSample for a file that cannot be read.

    Disk and network errors are raised again. Such an error says nothing about the file. Skipping would lose the sample
    for good, because a finished shard is not read a second time.
    """
    if isinstance(error, OSError) and error.errno is not None and error.errno not in _FAULTS_OF_FILES:
        raise error
    return SkipSample("unreadable_file", f"{what}: {getattr(error, 'strerror', None) or error}")


def skipped(key: str, error: SkipSample) -> Skipped:
    """Return the record for a ``SkipSample`` that was raised while ``key`` was read."""
    return Skipped(key, error.reason, error.detail)


def require_file(path: Path, what: str) -> Path:
    """Return ``path``. Raises DataError if it is not a regular file."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; expected {what}")
    return path


def require_folder(path: Path, what: str) -> Path:
    """Return ``path``. Raises DataError if it is not a folder."""
    if not path.is_dir():
        raise DataError(f"{path}: no such folder; expected {what}")
    return path


def range_shards(path: Path, num_records: int, records_per_shard: int) -> list[Shard]:
    """Return shards of consecutive records of one file. Raises DataError if ``records_per_shard`` is below 1."""
    if records_per_shard < 1:
        raise DataError(f"records_per_shard is {records_per_shard}, expected at least 1")
    firsts = range(0, num_records, records_per_shard)
    return [Shard(f"{path.name}:{first}", path, first, min(records_per_shard, num_records - first)) for first in firsts]


def slice_of(records: list[Any], shard: Shard) -> Iterator[tuple[int, Any]]:
    """Yield the records of ``shard`` with their indices."""
    stop = len(records) if shard.count is None else shard.first + shard.count
    for index in range(shard.first, min(stop, len(records))):
        yield index, records[index]


def hash_of_files(files: Iterable[tuple[str, Path]]) -> str:
    """Return a hash of the names and states of files. An absent file contributes only its name."""
    digest = hashlib.sha256()
    for name, path in files:
        digest.update(f"{name!r} {state_of(path)}\n".encode())
    return digest.hexdigest()[:32]
