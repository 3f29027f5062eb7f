"""Files that commands write for people: one is there as a whole or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_vl.errors import DataError


def check_writable(path: Path) -> None:
    """Make the folder of a file that is to be written when long work is done.

    Raises:
        DataError: a file cannot be written there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        raise _unwritable(path, error) from error


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A place to write to beside ``path``, in a folder that is made if need be; it gets the name in the end.

    Until then, and if the block fails, an older file stays.

    Raises:
        DataError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        with suppress(OSError):  # nothing was written, or it has its name
            temporary.unlink()


def write_whole(path: Path, text: str) -> None:
    """Write a text in one step; see :func:`whole_file`.

    Half a surrogate pair, which UTF-8 does not have, is written as JSON's escape of it.

    Raises:
        DataError: the file cannot be written.
    """
    with whole_file(path) as temporary:
        temporary.write_bytes(text.encode("utf-8", "backslashreplace"))


def _unwritable(path: Path, error: OSError) -> DataError:
    return DataError(f"--output {path}: cannot be written ({error.strerror or error})")
