"""Lock a folder against a second process that would write to it.

The lock is the operating system's on an open file. It ends with the process, however that ends, so nobody has to remove
anything. It works between machines if their shared file system supports locks (NFS 4 does). On a file system without
locks it has no effect.
"""

from __future__ import annotations

import datetime
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            raise FolderInUseError(lock.read(200).strip() or "another process") from error
        except OSError:
            pass  # a file system without locks
        lock.truncate(0)
        now = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
        lock.write(f"process {os.getpid()} on {socket.gethostname()} since {now}\n")
        lock.flush()
        yield
