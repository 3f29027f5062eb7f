"""Bytes of parts, read where a column says that they are.

There may be more parts than a process may open files, so the ones used last stay open and the others are opened again.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Sequence
from pathlib import Path

from megatron_vl.errors import DataError

_SPARE_FILES = 64
"""Descriptors that are left for everything else."""


class PartReader:
    """Random access to the files of parts."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """``paths`` are the parts' data files, which are named by number."""
        self._paths = paths
        self._open: dict[int, int] = {}
        self._most_open = max(resource.getrlimit(resource.RLIMIT_NOFILE)[0] - _SPARE_FILES, 1)

    def read(self, part: int, offset: int, size: int) -> bytes:
        """``size`` bytes from ``offset`` on. Raises DataError if they are not there."""
        data = os.pread(self._descriptor(part), size, offset)
        if len(data) != size:
            raise DataError(f"{self._paths[part]}: ends early; remove it and prepare the data again.")
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
                raise DataError(f"{self._paths[part]}: cannot be opened ({error.strerror}).") from error
        self._open[part] = descriptor
        return descriptor
