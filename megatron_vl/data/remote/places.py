"""What readers ask of a path that is local or an address, where pathlib alone does not answer it.

A local path takes the way that it would take without addresses.
"""

from __future__ import annotations

import errno
import hashlib
import os
import posixpath
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import IO, Any, Protocol
from urllib.parse import unquote, urlsplit

from megatron_vl.data.remote.address import Address
from megatron_vl.errors import DataError

_COPY_BYTES = 2**23
_ABSENT = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EBADF, errno.ELOOP})


class Named(Protocol):
    """An entry of a folder, as ``os.scandir`` gives it."""

    @property
    def name(self) -> str: ...
    def is_file(self) -> bool: ...


def place_of(root: Path | None, text: str | Path) -> Path:
    """Return the path that a recipe gives. A relative path starts at ``root``, which may be an address.

    ``file:///a/b`` is the local path /a/b.

    Raises:
        ValueError: The address is not one that is read.
    """
    if isinstance(text, Path):
        return text if root is None else root / text
    if text.startswith("file:"):
        return _local(text)
    if "://" in text:
        return Address.parse(text)
    if root is None or os.path.isabs(text):
        return Path(text)
    return root / text


def _local(text: str) -> Path:
    parts = urlsplit(text)
    if parts.netloc not in ("", "localhost") or not os.path.isabs(parts.path) or parts.query or parts.fragment:
        raise ValueError(f"{text}: expected file:///FOLDER/FILE, or the path without file://")
    return Path(unquote(parts.path))


def state_of(path: Path) -> tuple[int, int | str] | None:
    """Return what changes with the contents of a file, or None if it is absent.

    This is its size, with its time or with the identity that its store gives. For a local folder, the time changes when
    a file is added or removed. For a folder of a store, it is the number of files, with a hash of their states.
    """
    if isinstance(path, Address):
        entry = path.found()
        if entry is None:
            return None
        if not entry.is_folder:
            return entry.size, entry.identity
        entries = sorted((item.name, item.entry()) for item in path.iterdir())
        return len(entries), hashlib.sha256(repr(entries).encode("utf-8", "backslashreplace")).hexdigest()[:32]
    try:
        found = path.stat()
    except OSError as error:
        if error.errno in _ABSENT:
            return None
        raise
    return found.st_size, found.st_mtime_ns


def scan(folder: Path) -> AbstractContextManager[Iterator[Named]]:
    """Return the entries of a folder, as ``os.scandir`` does: there may be a million."""
    return nullcontext(folder.iterdir()) if isinstance(folder, Address) else os.scandir(folder)


def for_library(path: Path) -> Any:
    """Return what a library opens by itself: a local path, or the stream of an address."""
    return path.open("rb") if isinstance(path, Address) else path


def open_whole(path: Path) -> IO[bytes]:
    """Open a file that is read more than once from end to end.

    From an address it is first copied to a temporary file without a name, so that every byte is fetched once.

    Raises:
        OSError: There is no such file.
        DataError: It cannot be read, or there is no room for it.
    """
    if not isinstance(path, Address):
        return path.open("rb")
    copy = tempfile.TemporaryFile()  # noqa: SIM115  it is returned
    try:
        with path.open("rb") as stream:
            shutil.copyfileobj(stream, copy, _COPY_BYTES)
        copy.seek(0)
    except OSError as error:
        copy.close()
        if error.errno != errno.ENOSPC:
            raise
        room = tempfile.gettempdir()
        raise DataError(
            f"{path}: {path.stat().st_size:,} bytes do not fit into {room}, where a tar is copied while it is read; "
            "let TMPDIR name a folder with room for one tar of each worker"
        ) from error
    except BaseException:
        copy.close()
        raise
    return copy


def below(root: Address, name: str) -> Address | None:
    """Return the file that a record names relative to ``root``, or None if the name leads elsewhere."""
    path = posixpath.normpath(name)
    leads_out = "://" in name or path.startswith(("/", "../")) or path in (".", "..") or "\0" in name
    return None if leads_out else root / path
