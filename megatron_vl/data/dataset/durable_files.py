"""Files that are on the disk when we say so, and columns of numbers that are there in full or not at all."""

from __future__ import annotations

import os
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

Columns = Mapping[str, npt.NDArray[Any]]


def sync(file: IO[bytes]) -> None:
    """Bring what was written to the disk."""
    file.flush()
    os.fsync(file.fileno())


def store_columns(path: Path, columns: Columns) -> None:
    """Write an ``.npz`` in one step, whoever else does the same."""
    descriptor, name = tempfile.mkstemp(".tmp", path.stem + ".", path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            np.savez(file, allow_pickle=False, **columns)
            sync(file)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def load_columns(path: Path) -> Columns | None:
    """The columns of an ``.npz``, or None if it is not there or damaged."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            return dict(stored)
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        return None
