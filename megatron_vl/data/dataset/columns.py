"""Columns of numbers in a file, which is either complete or absent."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_vl.files import whole_file

Columns = Mapping[str, npt.NDArray[Any]]


def store_columns(path: Path, columns: Columns) -> None:
    """Write an ``.npz`` durably and atomically, even if another process writes the same file."""
    with whole_file(path, durable=True) as draft, draft.open("wb") as file:
        np.savez(file, allow_pickle=False, **columns)


def load_columns(path: Path) -> Columns | None:
    """Return the columns of an ``.npz``, or None if the file is absent or damaged."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            return dict(stored)
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        return None
