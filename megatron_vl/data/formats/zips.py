"""Paths that lead into a zip archive: ``coco/train2014.zip/train2014/COCO_train2014_000000000009.jpg``.

Data sets with hundreds of thousands of small files are published as zips, which can be read in place. The directory of
an archive is read once (some 700 bytes per member), then each member on its own. Nothing is unpacked. Members are found
by their exact name. So a name with ``..`` in the archive is used only if it is requested, and such requests are
refused. Links, encrypted members and members above a size limit are refused too. Declared sizes are not trusted: the
bytes are counted. A file whose name ends in ``.zip`` but is not a zip, or is truncated, is a DataError.
"""

from __future__ import annotations

import os
import stat
import zipfile
import zlib
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import IO

from megatron_vl.data.file_kinds import foreign_form, is_clutter
from megatron_vl.data.formats.shard import unreadable
from megatron_vl.data.remote.address import Address
from megatron_vl.data.remote.places import for_library, scan
from megatron_vl.errors import DataError, SkipSample

DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, OSError)
"""Exceptions that reading a damaged member raises."""


def split_zip(path: Path) -> tuple[Path, str] | None:
    """Return the archive and the member name ("" for the archive itself), or None if ``path`` leads into no zip."""
    for parent in (path, *path.parents):
        if parent.suffix.lower() == ".zip" and _is_file(parent):
            inside = path.relative_to(parent).as_posix()
            return parent, "" if inside == "." else inside
    return None


def read_member(archive: Path, name: str, max_bytes: int) -> bytes:
    """Return the contents of a member.

    Raises:
        FileNotFoundError: There is no member of this name.
        SkipSample: The member is unsafe, too large or damaged.
    """
    try:
        with _open_member(archive, name) as stream:
            data = stream.read(max_bytes + 1)
    except FileNotFoundError:
        raise
    except DAMAGED as error:
        raise unreadable(f"{archive}: {name[:80]!r}", error) from error
    if len(data) > max_bytes:
        raise SkipSample("member_too_large", f"{archive}: {name[:80]!r}: more than {max_bytes} bytes")
    return data


def open_file(path: Path) -> IO[bytes]:
    """Open a file, or a member of a zip, as a seekable stream for reading. Raises DataError."""
    inside = split_zip(path)
    try:
        return path.open("rb") if inside is None else _open_member(*inside)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except IsADirectoryError as error:
        raise DataError(f"{path}: is a folder, expected a file") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except SkipSample as error:
        raise DataError(f"{path}: {error.reason}: {error.detail}") from error


def list_folder(path: Path, suffix: str) -> list[str]:
    """Return the sorted names of a folder's files that end in ``suffix``, without subfolders; it may lie in a zip."""
    inside = split_zip(path)
    if inside is None:
        with scan(path) as entries:
            return sorted(e.name for e in entries if e.name.endswith(suffix) and not is_clutter(e.name))
    archive, folder = inside
    names = map(PurePosixPath, _open_zip(archive, os.getpid()).namelist())
    inside_folder = (name.name for name in names if str(name.parent) == (folder or "."))
    return sorted(name for name in inside_folder if name.endswith(suffix) and not is_clutter(name))


def list_members(archive: Path, suffixes: tuple[str, ...]) -> list[str]:
    """Return the sorted names of all members that end in one of ``suffixes``, in any folder."""
    names = _open_zip(archive, os.getpid()).namelist()
    return sorted(name for name in names if name.lower().endswith(suffixes) and not is_clutter(name))


def check_zip(archive: Path) -> None:
    """Raise DataError if the file is not a zip archive."""
    _open_zip(archive, os.getpid())


def _is_file(path: Path) -> bool:
    """Return whether a file is there; of an address, ask its store until it is, and then not for every member."""
    if not isinstance(path, Address):
        return path.is_file()
    try:
        _require_remote(path, os.getpid())
    except FileNotFoundError:
        return False
    return True


@lru_cache(maxsize=64)
def _require_remote(path: Address, process: int) -> None:
    """Raise FileNotFoundError, which is not kept, unless a file is there."""
    if not path.is_file():
        raise FileNotFoundError(path)


@lru_cache(maxsize=4)
def _open_zip(archive: Path, process: int) -> zipfile.ZipFile:
    """Open an archive once per process, because forked processes must not share the file position."""
    try:
        return zipfile.ZipFile(for_library(archive))
    except (OSError, zipfile.BadZipFile, ValueError) as error:
        said = foreign_form(archive, "a zip archive") if isinstance(error, zipfile.BadZipFile) else ""
        said = said or "is the download complete?"
        raise DataError(f"{archive}: no readable zip archive ({error}); {said}") from error


def _open_member(archive: Path, name: str) -> IO[bytes]:
    if ".." in PurePosixPath(name).parts or PurePosixPath(name).is_absolute():
        raise SkipSample("unsafe_member_name", f"{archive}: {name[:80]!r}")
    opened = _open_zip(archive, os.getpid())
    try:
        member = opened.getinfo(name)
    except KeyError as error:
        raise FileNotFoundError(f"{archive} has no member {name[:80]!r}") from error
    kind = stat.S_IFMT(member.external_attr >> 16)
    if member.is_dir() or kind not in (0, stat.S_IFREG):
        raise SkipSample("not_a_regular_file", f"{archive}: {name[:80]!r}")
    try:
        return opened.open(member)
    except (RuntimeError, zipfile.BadZipFile, OSError) as error:
        # Encrypted, compressed by a method that this Python lacks, or with a damaged header.
        raise unreadable(f"{archive}: {name[:80]!r}", error) from error
