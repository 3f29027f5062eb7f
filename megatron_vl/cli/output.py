"""Write files for people: each one appears completely or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_vl import files
from megatron_vl.errors import DataError


def check_writable(path: Path, *, flag: str = "--output") -> None:
    """Make the folder of a file that will be written after long work, and check that it can be written.

    Args:
        flag: that names the file.

    Raises:
        DataError: if a file cannot be written there.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        files.try_folder(path.parent)
    except OSError as error:
        raise _unwritable(path, error, flag) from error


@contextmanager
def whole_file(path: Path, *, flag: str = "--output") -> Iterator[Path]:
    """Yield a path to write to beside ``path``; rename it to ``path`` at the end. The folder is made if necessary.

    Until then, and if the block fails, an older file stays.

    Raises:
        DataError: if the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.whole_file(path) as draft:
            yield draft
    except OSError as error:
        raise _unwritable(path, error, flag) from error


def write_whole(path: Path, text: str, *, flag: str = "--output") -> None:
    """Write a text as :func:`megatron_vl.files.write_whole` does; make the folder if necessary.

    Raises:
        DataError: if the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_whole(path, text)
    except OSError as error:
        raise _unwritable(path, error, flag) from error


def _unwritable(path: Path, error: OSError, flag: str = "--output") -> DataError:
    return DataError(f"{flag} {path}: cannot be written ({error.strerror or error})")
