"""Files that are whole, files that are on the disk, and the hashes of files.

No other module renames or synchronizes. Three promises, each of which includes the one before:

* *whole* (:func:`write_whole`, :func:`whole_file`, :func:`whole_folder`): a reader finds the old content or the new
  one, never a part of it, whoever else writes there, and whether the writer fails or is killed. Until it is complete,
  the content lies beside its place under a name of its own, ``NAME.RANDOM.draft``.
* the same with ``durable=True``: the content is on the disk before it gets its name. After a power failure too,
  whatever bears the name is whole, but it may be the old content.
* :func:`sync_path` of the folder afterwards, or :func:`move`: the new name is on the disk as well.

A file that several processes fill in place (the rows of a data set) can be seen half-written. Its writers call
:func:`sync`, and then write a whole file that says what is there.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

_CHUNK_BYTES = 2**20
_HASHED_BESIDE = 2**16
"""Writes of at least so many bytes may be hashed by another thread; for smaller ones that costs more than it saves."""


def draft_of(path: Path) -> Path:
    """Return a name beside ``path`` that no other writer uses."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.draft")


def drafts_beside(path: Path) -> list[Path]:
    """Return what writers of ``path`` have left behind, or are writing."""
    return [other for other in path.parent.glob("*.draft") if other.name.rsplit(".", 2)[0] == path.name]


@contextmanager
def whole_file(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yield the place to write a file at; it becomes ``path`` at the end, and is removed after an error."""
    draft = draft_of(path)
    try:
        yield draft
        if durable:
            sync_path(draft)
        os.replace(draft, path)
    finally:
        with suppress(OSError):  # nothing was written, or it has its name
            draft.unlink()


def write_whole(path: Path, content: str | bytes, *, durable: bool = False) -> None:
    """Replace a file.

    Half a surrogate pair, which UTF-8 does not have, is written as JSON's escape of it.
    """
    with whole_file(path, durable=durable) as draft:
        draft.write_bytes(content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content)


@contextmanager
def whole_folder(folder: Path, draft: Path, *, durable: bool = False) -> Iterator[None]:
    """Make the folder ``draft``; it becomes ``folder`` at the end, and is removed after an error."""
    draft.mkdir(parents=True)
    try:
        yield
        if durable:
            for path in (*draft.iterdir(), draft):
                sync_path(path)
        os.replace(draft, folder)
        if durable:
            sync_path(folder.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)  # there is none if all went well


def move(*pairs: tuple[Path, Path]) -> None:
    """Rename each first file or folder to the second, in this order, and bring the new names to the disk."""
    for old, new in pairs:
        os.replace(old, new)
    for folder in dict.fromkeys(new.parent for _, new in pairs):
        sync_path(folder)


def sync(file: IO[bytes]) -> None:
    """Bring what was written to the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_path(path: Path) -> None:
    """Bring a file that is closed, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def try_folder(folder: Path, *, keep: bool = True) -> None:
    """Make a folder, and write and remove a file in it; raises OSError where that cannot be done.

    Args:
        keep: if false, folders that were made are removed again.
    """
    made = [] if keep else [path for path in (folder, *folder.parents) if not path.exists()]
    probe = draft_of(folder / "probe")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"\0" * 4096)
    finally:
        with suppress(OSError):  # where there is no folder, there is no file
            probe.unlink()
        with suppress(OSError):  # another process has written there
            for path in made:
                path.rmdir()


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_next(file: IO[bytes], size: int) -> str:
    """Return the SHA-256 of the next ``size`` bytes, or of all that there are."""
    digest = hashlib.sha256()
    while size and (data := file.read(min(size, _CHUNK_BYTES))):
        digest.update(data)
        size -= len(data)
    return digest.hexdigest()


class HashedWriter:
    """Writes to a file, and knows the size and the SHA-256 of what it has written without reading it again."""

    def __init__(self, file: IO[bytes], hasher: Executor | None = None) -> None:
        """``hasher``: a thread that hashes while this one writes."""
        self._file = file
        self._hasher = hasher
        self._sha256 = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes | memoryview) -> int:
        """Write; the bytes are only lent, so file and hash are both done with them at the end."""
        self.size += len(data)
        if self._hasher is None or len(data) < _HASHED_BESIDE:
            self._sha256.update(data)
            return self._file.write(data)
        hashed = self._hasher.submit(self._sha256.update, data)
        written = self._file.write(data)
        hashed.result()
        return written

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()
