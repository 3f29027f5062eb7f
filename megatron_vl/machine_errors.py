"""Describe errors of the machine in a line for a user: full or locked disks, and missing memory.

Any line of any library can raise such an error, with a message of its own. It is no bug, so it shows no traceback.
"""

from __future__ import annotations

import errno
import re

_OF_FILES = frozenset({
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOTDIR, errno.EISDIR,
    errno.EEXIST, errno.ENOENT, errno.ENAMETOOLONG, errno.ELOOP, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE,
})  # fmt: skip
_DISK_FULL = re.compile(
    r"PytorchStreamWriter failed writing|unexpected pos \d+ vs \d+|iostream error|No space left on device"
)
_NO_MEMORY = re.compile(
    r"CUDA out of memory|can't allocate memory|not enough memory|Cannot allocate memory|Unable to allocate"
)
_ASKED_FOR = re.compile(r"(?:[Tt]ried to allocate|Unable to allocate) ([\d.]+) ?(bytes|[KMGTPE]iB|\.)?")


def describe(error: BaseException, *, less_memory: str = "") -> str | None:
    """Return what a user should know of an error of the machine, or None for any other error.

    Args:
        less_memory: the flags that reduce memory.
    """
    text = str(error)
    if isinstance(error, MemoryError) or _NO_MEMORY.search(text) or type(error).__name__ == "OutOfMemoryError":
        asked = _ASKED_FOR.search(text)
        amount = f": {_amount(asked[1], asked[2])} were asked for" if asked else ""
        return f"out of memory{amount}. {less_memory or 'Use smaller batches, or more ranks; see --help'}"
    if isinstance(error, OSError) and error.errno in _OF_FILES:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}"
    if _DISK_FULL.search(text):
        said = text.strip().splitlines()[0][:200]
        return f"the disk is full, or a quota or limit on file sizes is reached ({said})"
    return None


def _amount(number: str, unit: str | None) -> str:
    if unit in (None, "bytes", "."):
        return f"{float(number.rstrip('.')) / 2**30:.2f} GiB"
    return f"{number} {unit}"
