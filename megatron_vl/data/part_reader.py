"""Tokens, keys and images of gathered samples, read one by one from the files of all parts.

There may be more parts than a process may open files, so the ones used last stay open and the others are opened again.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_vl.data.gather import Images, Samples
from megatron_vl.data.part_files import data_path
from megatron_vl.errors import DataError

_SPARE_FILES = 64
"""Descriptors that are left for everything else."""


class PartReader:
    """Random access to what the parts hold."""

    def __init__(self, prefixes: Sequence[Path], samples: Samples, images: Images) -> None:
        """``prefixes`` are those of the parts that ``samples`` and ``images`` name by number."""
        self._paths = [data_path(prefix) for prefix in prefixes]
        self._samples = samples
        self._images = images
        self._open: dict[int, int] = {}
        self._most_open = max(resource.getrlimit(resource.RLIMIT_NOFILE)[0] - _SPARE_FILES, 1)

    def tokens(self, sample: int, *, start: int, stop: int) -> npt.NDArray[np.int32]:
        """int32[stop - start]: stored tokens of a sample."""
        offset = int(self._samples.offset[sample]) + 4 * start
        return np.frombuffer(self._read(int(self._samples.part[sample]), offset, 4 * (stop - start)), dtype="<i4")

    def key(self, sample: int) -> str:
        """The key of a sample."""
        offset = int(self._samples.offset[sample]) + 4 * int(self._samples.length[sample])
        data = self._read(int(self._samples.part[sample]), offset, int(self._samples.key_size[sample]))
        return data.decode("utf-8", "surrogatepass")

    def image(self, number: int) -> bytes:
        """One of the different images."""
        images = self._images
        return self._read(int(images.part[number]), int(images.offset[number]), int(images.size[number]))

    def close(self) -> None:
        """Close all files."""
        while self._open:
            os.close(self._open.popitem()[1])

    def _read(self, part: int, offset: int, size: int) -> bytes:
        data = os.pread(self._descriptor(part), size, offset)
        if len(data) != size:
            raise DataError(f"{self._paths[part]}: ends early; remove it and prepare the data again.")
        return data

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
