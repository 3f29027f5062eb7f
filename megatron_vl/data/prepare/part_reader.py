"""Reading of bytes from parts, at positions that the columns give.

There may be more parts than a process may open files. So recently used files stay open, and others are reopened.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Sequence
from pathlib import Path

from megatron_vl.errors import DataError

_SPARE_FILES = 64
"""File descriptors that are left for other uses."""
_REMEDY = "if it is gone or damaged, plan again (--phase plan, which names the parts to make anew, or start again)"


class PartReader:
    """Random access to the files of parts."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Take the data files of the parts; a part is given by its index in ``paths``."""
        self._paths = paths
        self._open: dict[int, int] = {}
        self._most_open = max(resource.getrlimit(resource.RLIMIT_NOFILE)[0] - _SPARE_FILES, 1)

    def read(self, part: int, offset: int, size: int) -> bytes:
        """Return ``size`` bytes from ``offset`` on. Raises DataError if the file ends too early or cannot be opened."""
        data = os.pread(self._descriptor(part), size, offset)
        if len(data) != size:
            raise DataError(f"{self._paths[part]}: ends early; {_REMEDY}")
        return data

    def close(self) -> None:
        """Close all files."""
        while self._open:
            os.close(self._open.popitem()[1])

    def _descriptor(self, part: int) -> int:
        descriptor = self._open.pop(part, -1)
        if descriptor < 0:
            if len(self._open) >= self._most_open:
                os.close(self._open.pop(next(iter(self._open))))
            try:
                descriptor = os.open(self._paths[part], os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise DataError(f"{self._paths[part]}: cannot be opened ({error.strerror}); {_REMEDY}") from error
        self._open[part] = descriptor
        return descriptor
