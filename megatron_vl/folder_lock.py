"""Hold a folder against a second process that would write to it.

The lock is the operating system's on an open file, so it goes with the process, however that ends: nothing is left that
somebody would have to remove. It holds between machines where their shared file system passes locks on (NFS 4 does); on
a file system without locks nobody is kept out.
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
    """Make the folder and hold it, by the file ``name`` in it, until the end of the context.

    Raises:
        FolderInUseError: another process holds it; names that process.
        OSError: the folder cannot be made or written to.
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
