"""The address of raw data in a store, as a path: ``s3://bucket/folder/00000.tar``.

Readers take any ``Path``. An ``Address`` is one, and answers the few questions that readers ask of files with requests
to its store: what is there, what it holds, its bytes. So there is one reader for both, and a local path never passes
through fsspec. The rest of pathlib (``/``, ``name``, ``parent``, ``relative_to``) works on the text. Whatever needs a
file on the disk, by its name, gets an error that says so (``__fspath__``).

A path from a listing keeps what the listing says about it: its size and its identity, which is the tag or the time that
the store gives. Planning asks once for each folder and not for each file. Where the path is opened later, maybe by
another process, the file must still be the same. There are no links in a store, and ``..`` is not a part of a key.

``Path`` may be subclassed from Python 3.12 on. In 3.11 this works for ``PosixPath``, whose methods make new paths in
the same way. universal_pathlib 0.3 has such paths for every store, but they are no ``Path``, forget what a listing
says, and repeat nothing.
"""

from __future__ import annotations

import errno
import fnmatch
import io
import os
import stat
from collections.abc import Generator, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PosixPath, PurePosixPath
from typing import IO, Any, Self

from megatron_vl.config.suggestions import suggestion
from megatron_vl.data.remote.blocks import BLOCK_BYTES, BlockStream
from megatron_vl.data.remote.store import PACKAGES, ask, changed, open_store
from megatron_vl.errors import DataError

_IDENTITIES = ("ETag", "etag", "blob_id", "LastModified", "last_modified", "mtime", "updated", "created")
"""What the stores call the tag or the time of a file; the first that there is."""


@dataclass(frozen=True)
class Entry:
    """What a store says about a name."""

    is_folder: bool
    size: int = 0
    """Bytes of a file."""
    identity: str = ""
    """Tag or time of a file; another content has another."""


class Address(PosixPath):
    """A file or a folder of a store."""

    _entry: Entry | None = None
    """What a listing said, if the path comes from one."""

    @classmethod
    def parse(cls, text: str) -> Address:
        """Return the address that a text gives. Raises ValueError that says what is wrong with it."""
        protocol, _, rest = text.partition("://")
        if "::" in text:
            raise ValueError(f"{text}: chained addresses are not read; give the address of the file itself")
        if protocol in ("http", "https"):
            raise ValueError(f"{text}: web servers have no list of their files; download it first")
        if protocol not in PACKAGES:
            raise ValueError(
                f"{text}: unknown protocol {protocol!r}{suggestion(protocol, PACKAGES)}; known are "
                f"{', '.join(sorted(PACKAGES))}. Copy the files to a disk"
            )
        parts = rest.removesuffix("/").split("/")
        if not all(part not in ("", ".", "..") for part in parts):
            raise ValueError(f"{text}: has a part that is empty, . or .., expected {protocol}://NAME/NAME")
        return cls(f"{protocol}:", *parts)

    def __str__(self) -> str:
        protocol, colon, rest = (text := super().__str__()).partition(":/")
        return f"{protocol}://{rest}" if colon and protocol in PACKAGES else text

    def __fspath__(self) -> str:
        raise DataError(f"{self}: an address is not read here, expected a path on a disk; copy it to one")

    def __reduce__(self) -> Any:
        return _restored, (self.parts, self._entry)

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        """Return kind and size; no store has the other fields. Raises FileNotFoundError."""
        entry = self.entry()
        mode = stat.S_IFDIR if entry.is_folder else stat.S_IFREG
        return os.stat_result((mode, 0, 0, 0, 0, 0, entry.size, 0, 0, 0))

    def entry(self) -> Entry:
        """Return what the listing said, or what the store says. Raises FileNotFoundError."""
        if self._entry is not None:
            return self._entry
        protocol, key = self._place()
        return _entry_of(self, ask(str(self), lambda: open_store(protocol).info(key), "look it up"))

    def found(self) -> Entry | None:
        """Return the entry, or None if there is nothing."""
        with suppress(FileNotFoundError, NotADirectoryError):
            return self.entry()
        return None

    def exists(self, *, follow_symlinks: bool = True) -> bool:
        return self.found() is not None

    def is_file(self, *, follow_symlinks: bool = True) -> bool:
        entry = self.found()
        return entry is not None and not entry.is_folder

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:
        entry = self.found()
        return entry is not None and entry.is_folder

    def is_symlink(self) -> bool:
        return False

    def iterdir(self) -> Generator[Self, None, None]:
        """Yield what lies in the folder, with its entry. Raises FileNotFoundError."""
        protocol, key = self._place()
        for found in ask(str(self), lambda: open_store(protocol).ls(key, detail=True), "list it"):
            name = str(found["name"]).strip("/")
            if name != key:
                yield self._listed(PurePosixPath(name).name, found)
            elif found["type"] == "directory":  # a file of this name is only a mark that there is a folder
                raise DataError(f"{self}: holds a name with an empty part (//), which no path has; rename it")

    def glob(self, pattern: str) -> Iterator[Self]:  # type: ignore[override]
        """Yield what matches a pattern in which every part is of one name: ``*/refs(*).p``."""
        first, _, rest = pattern.partition("/")
        for path in self.iterdir():
            if fnmatch.fnmatchcase(path.name, first):
                yield from path.glob(rest) if rest and path.is_dir() else () if rest else (path,)

    def rglob(self, pattern: str) -> Iterator[Self]:  # type: ignore[override]
        """Yield all files below the folder whose names match."""
        protocol, key = self._place()
        found = ask(str(self), lambda: open_store(protocol).find(key, detail=True), "list it")
        for name, said in found.items():
            below = name.lstrip("/").removeprefix(f"{key}/")
            if "//" in below:
                raise DataError(f"{self}: holds {below!r}, with an empty part (//), which no path has; rename it")
            if not name.endswith("/") and fnmatch.fnmatchcase(PurePosixPath(below).name, pattern):
                yield self._listed(below, said)

    def open(self, mode: str = "r", *_: Any, **text: Any) -> IO[Any]:  # type: ignore[override]
        """Open a file for reading, as a stream that can seek.

        Raises:
            OSError: There is no such file, or it is a folder.
            DataError: It cannot be read, or is not the one that was listed.
        """
        if mode not in ("r", "rb"):
            raise DataError(f"{self}: nothing is written to an address")
        stream = io.BufferedReader(BlockStream(*self._fetcher()), BLOCK_BYTES // 2)
        return stream if mode == "rb" else io.TextIOWrapper(stream, **text)

    def read_bytes(self) -> bytes:
        """Return a file in one request. Raises as ``open`` does."""
        protocol, key = self._place()
        data: bytes = ask(str(self), lambda: open_store(protocol).cat_file(key), "read it")
        return data

    def read_text(self, encoding: str | None = None, errors: str | None = None, newline: str | None = None) -> str:
        with self.open("r", encoding=encoding, errors=errors, newline=newline) as stream:
            text: str = stream.read()
        return text

    def _place(self) -> tuple[str, str]:
        """Return protocol and key. Raises FileNotFoundError for what is above the top of a store."""
        if len(self.parts) < 2 or self.parts[0].removesuffix(":") not in PACKAGES:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        return self.parts[0].removesuffix(":"), "/".join(self.parts[1:])

    def _listed(self, below: str, said: Mapping[str, Any]) -> Self:
        path = self / below
        path._entry = _entry_of(path, said)
        return path

    def _fetcher(self) -> tuple[Any, int]:
        """Return what fetches bytes from ... to ... of the file, and its size."""
        protocol, key = self._place()
        store = ask(str(self), lambda: open_store(protocol), "open it")
        entry = _entry_of(self, ask(str(self), lambda: store.info(key), "look it up"))
        if entry.is_folder:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(self))
        if self._entry not in (None, entry):
            raise changed(str(self))
        file = ask(str(self), lambda: store.open(key, "rb", cache_type="none"), "open it")

        def fetch(begin: int, end: int) -> bytes:
            def request() -> bytes:
                file.seek(begin)
                data: bytes = file.read(end - begin)
                if len(data) != end - begin:
                    raise OSError(f"the store sent {len(data):,} bytes of {end - begin:,}")
                return data

            return ask(str(self), request, f"read it from byte {begin:,} on")

        return fetch, entry.size


def _restored(parts: tuple[str, ...], entry: Entry | None) -> Address:
    """Return a path from another process."""
    path = Address(*parts)
    path._entry = entry
    return path


def _entry_of(path: Path, said: Mapping[str, Any]) -> Entry:
    """Return an entry from what fsspec says. Raises DataError if a change of the file could not be noticed."""
    if said["type"] == "directory":
        return Entry(is_folder=True)
    identity = next((said[name] for name in _IDENTITIES if said.get(name)), None)
    if identity is None or said.get("size") is None:
        raise DataError(f"{path}: the store tells no size, or neither tag nor time of it; copy it to a disk")
    # A listing and a question may differ in the quotes of a tag, and in the form of a time.
    text = str(identity.timestamp()) if isinstance(identity, datetime) else str(identity).strip('"')
    return Entry(is_folder=False, size=int(said["size"]), identity=text)
