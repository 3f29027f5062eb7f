"""The plan of a data set on the disk: all slices of its rows, and what completes the data set when they are written.

    rows-slice-<slice>.npz    what a worker needs to write the slice: a RowSlice, some 45 bytes a segment
    rows-plan.npz             the slices in order, the manifest without its files, and what the plan was made for

Each file is whole or absent, and the plan is written last. A worker gets the name of a slice and reads the slice
itself. So the process that hands out work sends a few bytes for each slice, and writing may begin in another process,
on another day, without planning again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_vl.config.records import Builder
from megatron_vl.data.dataset.columns import load_columns, store_columns
from megatron_vl.data.dataset.manifest import Manifest
from megatron_vl.data.dataset.rows import row_lengths
from megatron_vl.data.prepare.made_for import MadeFor
from megatron_vl.data.prepare.row_slices import RowSlice, write_slice
from megatron_vl.errors import DataError

IntArray = npt.NDArray[np.int64]
_NAME_BYTES = 16
_IN_HEADER = ("block", "token_begin", "image_begin", "names")


@dataclass(frozen=True)
class SliceShape:
    """What the indices of the files hold of a slice."""

    row_lengths: IntArray
    """int64[rows]: items of each stored row."""
    images_per_row: IntArray
    """int64[rows]"""
    image_sizes: npt.NDArray[np.int32]
    """int32[images that it stores]: bytes."""


@dataclass(frozen=True)
class StoredSlice:
    """A slice that is stored, and the room that its rows take."""

    name: str
    block: str
    """What follows the prefix in the names of the files of its block."""
    num_rows: int
    token_bytes: int
    image_bytes: int


@dataclass(frozen=True)
class StoredPlan:
    """A plan whose slices are stored."""

    folder: Path
    """The folder of parts."""
    slices: tuple[StoredSlice, ...]
    manifest: Manifest
    """That of the data set, without files and hashes."""
    made_for: MadeFor

    @cached_property
    def stem(self) -> Path:
        """The path prefix of all files of the plan, of which the name is the hash of its slices."""
        names = " ".join(item.name for item in self.slices)
        return self.folder / f"rows-{hashlib.sha256(names.encode()).hexdigest()[:16]}"


def slice_path(folder: Path, name: str) -> Path:
    """Return the path of a stored slice."""
    return folder / f"rows-slice-{name}.npz"


def plan_path(folder: Path) -> Path:
    """Return the path of the plan in a folder of parts."""
    return folder / "rows-plan.npz"


def shape_of(work: RowSlice) -> SliceShape:
    """Return what the indices hold of a slice."""
    segments, images = np.diff(work.row_splits), np.diff(work.image_splits)
    tokens = np.concatenate([np.zeros(1, np.int64), np.cumsum(work.stop - work.start, dtype=np.int64)])
    lengths = row_lengths(segments, images, np.diff(tokens[work.row_splits]))
    return SliceShape(lengths, images, work.image_size)


def store_slices(slices: Iterable[RowSlice], folder: Path) -> tuple[StoredSlice, ...]:
    """Store the slices that are not there yet, one at a time."""
    present = {path.name for path in folder.iterdir()}
    stored = []
    for work in slices:
        path = slice_path(folder, work.name)
        if path.name not in present or _read_slice(path, work.name) is None:
            _store_slice(path, work)
        shape = shape_of(work)
        room = (4 * int(shape.row_lengths.sum()), int(shape.image_sizes.sum(dtype=np.int64)))
        stored.append(StoredSlice(work.name, work.block, work.num_rows, *room))
    return tuple(stored)


def load_slice(folder: Path, name: str) -> RowSlice:
    """Return a stored slice. Raises DataError if it is absent or damaged."""
    work = _read_slice(slice_path(folder, name), name)
    if work is None:
        raise DataError(f"{slice_path(folder, name)}: gone or damaged; plan again (--phase plan, or start again)")
    return work


def write_stored_slice(folder: Path, name: str, stem: Path) -> int:
    """Write the rows of a stored slice; return their number. Raises DataError as ``load_slice`` and ``write_slice``."""
    return write_slice(load_slice(folder, name), stem)


def store_plan(plan: StoredPlan) -> None:
    """Write the plan, whose slices must be stored."""
    blocks = list(dict.fromkeys(item.block for item in plan.slices))
    header = {
        "blocks": blocks, "manifest": json.loads(plan.manifest.to_json()), "recipe": dict(plan.made_for.recipe),
    }  # fmt: skip
    store_columns(
        plan_path(plan.folder),
        {
            "header": np.frombuffer(json.dumps(header).encode(), np.uint8),
            "units": _to_bytes(plan.made_for.units),
            "slices": _to_bytes([item.name for item in plan.slices]),
            "block": np.array([blocks.index(item.block) for item in plan.slices], dtype=np.int32),
            "num_rows": np.array([item.num_rows for item in plan.slices], dtype=np.int64),
            "token_bytes": np.array([item.token_bytes for item in plan.slices], dtype=np.int64),
            "image_bytes": np.array([item.image_bytes for item in plan.slices], dtype=np.int64),
        },
    )


def load_plan(folder: Path) -> StoredPlan | None:
    """Return the plan of a folder of parts, or None if it is absent, damaged or of another version."""
    stored = load_columns(plan_path(folder))
    try:
        if stored is None:
            return None
        header = json.loads(stored["header"].tobytes())
        columns = [stored[name].tolist() for name in ("num_rows", "token_bytes", "image_bytes")]
        columns.insert(0, [header["blocks"][block] for block in stored["block"].tolist()])
        slices = tuple(StoredSlice(*facts) for facts in zip(_to_names(stored["slices"]), *columns, strict=True))
        manifest = Builder(DataError, ours=True).build(Manifest, header["manifest"], str(plan_path(folder)))
        return StoredPlan(folder, slices, manifest, MadeFor(header["recipe"], _to_names(stored["units"])))
    except (ValueError, KeyError, TypeError, DataError):
        return None


def _store_slice(path: Path, work: RowSlice) -> None:
    header = {name: getattr(work, name) for name in _IN_HEADER} | {"paths": [part.name for part in work.paths]}
    columns = {item.name: getattr(work, item.name) for item in dataclasses.fields(work)}
    arrays = {name: value for name, value in columns.items() if isinstance(value, np.ndarray)}
    store_columns(path, {"header": np.frombuffer(json.dumps(header).encode(), np.uint8), **arrays})


def _read_slice(path: Path, name: str) -> RowSlice | None:
    """Return a stored slice, or None if it is absent, or is not what its name says."""
    stored = load_columns(path)
    try:
        if stored is None:
            return None
        facts: dict[str, Any] = dict(stored)
        facts |= json.loads(facts.pop("header").tobytes())
        facts["names"] = tuple(facts["names"])
        facts["paths"] = tuple(path.with_name(part) for part in facts["paths"])
        work = RowSlice(**facts)
    except (ValueError, KeyError, TypeError):
        return None
    return work if work.name == name else None


def _to_bytes(names: Iterable[str]) -> npt.NDArray[np.uint8]:
    """Return names of 32 hexadecimal digits as uint8[names, 16]."""
    return np.frombuffer(bytes.fromhex("".join(names)), np.uint8).reshape(-1, _NAME_BYTES)


def _to_names(stored: npt.NDArray[np.uint8]) -> tuple[str, ...]:
    return tuple(row.tobytes().hex() for row in stored)
