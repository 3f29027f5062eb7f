"""Lock a folder against a second process that would write to it, or against all but the members of a group.

The lock is the operating system's on an open file. It ends with the process, however that ends, so nobody has to remove
anything. It works between machines if their shared file system supports locks (NFS 4 does). On a file system without
locks it has no effect.

A group is named in the file of the lock, by the member that finds nobody inside. It then shares the lock, and so does
every later member that finds the name of its own group there. Finding out and naming have to be one step. So members
come in one at a time, through a lock of its own (the gate) that each holds for a moment.

Whoever holds the lock may remove its files, the locked one last. A process that opened a file before it was removed
gets a lock that nobody else can see. So a lock counts only while its file is the one that the path names.
"""

from __future__ import annotations

import datetime
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from megatron_vl.errors import FolderInUseError

_TRIES = 100
"""How often a lock is taken anew because its file was removed meanwhile."""


@contextmanager
def hold(folder: Path, name: str) -> Iterator[None]:
    """Make the folder and lock it, by the file ``name`` in it, until the end of the context.

    Raises:
        FolderInUseError: if another process holds the lock; names that process.
        OSError: if the folder cannot be made or written to.
    """
    for _ in range(_TRIES):
        with _opened(folder, name) as lock:
            _take(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_current(lock):
                _sign(lock, "")
                yield
                return
    raise FolderInUseError(f"processes that remove {folder / name}")


@contextmanager
def join(folder: Path, name: str, group: str, member: str) -> Iterator[None]:
    """Make the folder, and share its lock with the other members of a group until the end of the context.

    Nobody else can then ``hold`` it by the same file ``name``, and no other group can join. ``group`` is a line of
    text. ``member`` is part of a file's name.

    Raises:
        FolderInUseError: if another process holds the lock, or is this member, or is in another group; names it.
        OSError: if the folder cannot be made or written to.
    """
    for _ in range(_TRIES):
        with _opened(folder, f"{name}-{member}") as own, _opened(folder, name) as lock:
            _take(own, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _sign(own, "")
            _enter(lock, group)
            if _is_current(own) and _is_current(lock):  # from now on nobody else can remove them
                yield
                return
    raise FolderInUseError(f"processes that remove {folder / name}")


def _enter(lock: IO[str], group: str) -> None:
    """Share an open lock with the members of a group. Raises FolderInUseError if others have it."""
    with _opened(Path(lock.name).parent, f"{Path(lock.name).name}-gate") as gate:
        _take(gate, fcntl.LOCK_EX)
        try:
            _take(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _sign(lock, f"{group}: ")
        except FolderInUseError as holder:
            if not str(holder).startswith(f"{group}: "):
                raise
        _take(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)


def _opened(folder: Path, name: str) -> IO[str]:
    """Make the folder, and open a file in it, also if another process removes the folder in between."""
    for _ in range(_TRIES):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            return (folder / name).open("a+")
        except FileNotFoundError:
            if folder.is_dir():
                raise
    raise FolderInUseError(f"processes that remove {folder}")


def _is_current(lock: IO[str]) -> bool:
    """Return whether an open file is still the one that its path names."""
    try:
        return os.path.samestat(os.fstat(lock.fileno()), os.stat(lock.name))
    except FileNotFoundError:
        return False


def _take(lock: IO[str], how: int) -> None:
    """Lock an open file, or change how it is locked. Raises FolderInUseError with what the holder wrote."""
    try:
        fcntl.flock(lock, how)
    except BlockingIOError as error:
        lock.seek(0)
        raise FolderInUseError(lock.read(400).strip() or "another process") from error
    except OSError:
        pass  # a file system without locks


def _sign(lock: IO[str], group: str) -> None:
    """Write who has the lock."""
    lock.truncate(0)
    now = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    lock.write(f"{group}process {os.getpid()} on {socket.gethostname()} since {now}\n")
    lock.flush()
