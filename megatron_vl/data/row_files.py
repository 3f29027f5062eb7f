"""The files of a data set in the making: room for all of it, rows by workers, indices, and the step to a data set.

Until then they lie among the parts, under names that begin with ``rows``, so that what is unfinished is in one folder.
An old manifest goes before the files are renamed, the new one comes last: whatever happens, there is a whole data set
under the prefix, or none.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vl.data.indexed import Stretch, write_index
from megatron_vl.data.manifest import FileEntry, Manifest, manifest_path, write_manifest
from megatron_vl.data.pool import Pool, hand_out
from megatron_vl.data.row_plan import Origins, RowPlan, plan_slices
from megatron_vl.data.row_slices import IMAGES, TOKENS, SliceRecord, read_record, record_path, write_slice
from megatron_vl.errors import DataError

Progress = Callable[[int, int], None]
"""Called with the number of rows done and the number of all rows."""
_KEYS = "rows.keys"


def write_rows(
    plan: RowPlan, origins: Origins, folder: Path, *, pool: Pool, report: Progress
) -> tuple[FileEntry, ...]:
    """Have all slices written that are not, and finish the files; returns what the manifest says of them."""
    names = [work.name for work in plan_slices(plan, origins)]
    _make_room(plan, names, folder)
    num_done = 0

    def finish(_: str, num_rows: int) -> None:
        nonlocal num_done
        num_done += num_rows
        report(num_done, plan.packing.num_rows)

    def jobs() -> Iterator[tuple[str, Callable[..., int], tuple[Any, ...]]]:
        for work in plan_slices(plan, origins):
            if read_record(folder, work.name) is None:
                yield work.name, write_slice, (work, folder)
            else:
                finish(work.name, work.num_rows)

    hand_out(pool, jobs(), finish)
    return _finish_files(plan, names, folder)


def is_of_rows(path: Path) -> bool:
    """Whether a file among the parts is one of these."""
    return path.name.startswith("rows")


def commit(prefix: Path, folder: Path, manifest: Manifest) -> None:
    """Make the finished files of ``folder`` the data set at ``prefix``."""
    manifest_path(prefix).unlink(missing_ok=True)
    for entry in manifest.files:
        os.replace(folder / f"rows{entry.suffix}", f"{prefix}{entry.suffix}")
    write_manifest(prefix, manifest)
    descriptor = os.open(prefix.parent, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    _remove(folder, kept=())


def _make_room(plan: RowPlan, names: Sequence[str], folder: Path) -> None:
    """Make the files as long as they will be. Only records of this plan's slices stay, and only if the files are those
    that they tell of."""
    sizes = {TOKENS: 4 * int(plan.lengths.sum()), IMAGES: int(plan.stored_sizes.sum(dtype=np.int64))}
    files = {folder / f"{name}.bin": size for name, size in sizes.items()}
    as_left = all(path.is_file() and path.stat().st_size == size for path, size in files.items())
    _remove(folder, kept={*files, *(record_path(folder, name) for name in names if as_left)})
    for path, size in files.items():
        with path.open("ab") as file:
            file.truncate(size)


def _remove(folder: Path, kept: Collection[Path]) -> None:
    for path in folder.iterdir():
        if is_of_rows(path) and path not in kept:
            path.unlink()


def _finish_files(plan: RowPlan, names: Sequence[str], folder: Path) -> tuple[FileEntry, ...]:
    """Write the keys, one slice after the other, and the indices; describe all files."""
    stretches: dict[str, list[Stretch]] = {TOKENS: [], IMAGES: [], _KEYS: []}
    key_lengths = []
    with (folder / f"{_KEYS}.bin").open("wb") as file:
        for name in names:
            record = _finished(folder, name)
            stretches[TOKENS].append(record.tokens)
            stretches[IMAGES].append(record.images)
            stretches[_KEYS].append(Stretch(len(record.keys), hashlib.sha256(record.keys.data).hexdigest()))
            key_lengths.append(record.key_lengths)
            file.write(record.keys.data)
        file.flush()
        os.fsync(file.fileno())
    indices = {
        TOKENS: write_index(folder / TOKENS, plan.lengths, "int32", plan.images_per_row),
        IMAGES: write_index(folder / IMAGES, plan.stored_sizes, "uint8"),
        _KEYS: write_index(folder / _KEYS, np.concatenate(key_lengths), "uint8"),
    }
    entries: list[FileEntry] = []
    for name, index in indices.items():
        suffix = name.removeprefix("rows")
        entries += [FileEntry(f"{suffix}.bin", tuple(stretches[name])), FileEntry(f"{suffix}.idx", (index,))]
    return tuple(entries)


def _finished(folder: Path, name: str) -> SliceRecord:
    record = read_record(folder, name)
    if record is None:
        raise DataError(f"{record_path(folder, name)}: gone or damaged; start again, and its rows are written again")
    return record
