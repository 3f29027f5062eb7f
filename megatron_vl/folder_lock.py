"""Lock a folder against a second process that would write to it, or against all but the members of a group.

The lock is the operating system's on an open file. It ends with the process, however that ends, so nobody has to remove
anything. It works between machines if their shared file system supports locks (NFS 4 does). On a file system without
locks it has no effect.

A group is named in the file of the lock, by the member that finds nobody inside. It then shares the lock, and so does
every later member that finds the name of its own group there. Finding out and naming have to be one step. So members
come in one at a time, through a lock of its own (the gate) that each holds for a moment.
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


@contextmanager
def hold(folder: Path, name: str) -> Iterator[None]:
    """Make the folder and lock it, by the file ``name`` in it, until the end of the context.

    Raises:
        FolderInUseError: if another process holds the lock; names that process.
        OSError: if the folder cannot be made or written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("a+") as lock:
        _take(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _sign(lock, "")
        yield


@contextmanager
def join(folder: Path, name: str, group: str, member: str) -> Iterator[None]:
    """Make the folder, and share its lock with the other members of a group until the end of the context.

    Nobody else can then ``hold`` it by the same file ``name``, and no other group can join. ``group`` is a line of
    text. ``member`` is part of a file's name.

    Raises:
        FolderInUseError: if another process holds the lock, or is this member, or is in another group; names it.
        OSError: if the folder cannot be made or written to.
    """
    with hold(folder, f"{name}-{member}"), (folder / name).open("a+") as lock:
        with (folder / f"{name}-gate").open("a+") as gate:
            _take(gate, fcntl.LOCK_EX)
            try:
                _take(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _sign(lock, f"{group}: ")
            except FolderInUseError as holder:
                if not str(holder).startswith(f"{group}: "):
                    raise
            _take(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield


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
