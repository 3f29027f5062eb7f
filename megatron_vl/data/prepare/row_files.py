"""The files of an unfinished data set: allocation, rows from workers, indices, and the rename to the final data set.

Until then, the files lie in the folder of parts. Their names begin with ``rows-`` and the hash of their plan. So all
unfinished files are in one folder, and files of a given name and size belong to exactly this plan. An old manifest is
removed before the files are renamed, and the new manifest is renamed last. So after a crash at any point, the prefix
has either a complete data set or none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vl.data.dataset.indexed import FileRange, write_index
from megatron_vl.data.dataset.manifest import HASHES, FileEntry, Manifest, hash_lines, manifest_path, write_manifest
from megatron_vl.data.prepare.row_plan import Origins, RowPlan, plan_slices
from megatron_vl.data.prepare.row_slices import IMAGES, TOKENS, SliceRecord, read_record, record_path, write_slice
from megatron_vl.data.prepare.workers import Pool, hand_out
from megatron_vl.errors import DataError
from megatron_vl.files import move, sha256_of_file, sync

Progress = Callable[[int, int], None]
"""Callback with the number of finished rows and the number of all rows."""
_KEYS = ".keys"


def write_rows(plan: RowPlan, origins: Origins, folder: Path, *, pool: Pool, report: Progress) -> Path:
    """Write all missing slices and finish the files; return the path prefix of the files."""
    names = [work.name for work in plan_slices(plan, origins)]
    stem = folder / f"rows-{hashlib.sha256(' '.join(names).encode()).hexdigest()[:16]}"
    present = _make_room(plan, names, stem)
    num_done = 0

    def finish(_: str, num_rows: int) -> None:
        nonlocal num_done
        num_done += num_rows
        report(num_done, plan.packing.num_rows)

    def jobs() -> Iterator[tuple[str, Callable[..., int], tuple[Any, ...]]]:
        for work in plan_slices(plan, origins):
            if record_path(stem, work.name) in present and read_record(stem, work.name) is not None:
                finish(work.name, work.num_rows)
            else:
                yield f"rows of {stem}, slice {work.name}", write_slice, (work, stem)

    hand_out(pool, jobs(), finish)
    _finish_files(plan, names, stem)
    return stem


def is_of_rows(path: Path) -> bool:
    """Return whether a file among the parts is a file of rows."""
    return path.name.startswith("rows-")


def file_entries(stem: Path) -> tuple[tuple[FileEntry, ...], str]:
    """Return the manifest's facts about the finished files: their sizes, and the hash of their hashes."""
    kinds = [f"{suffix}{end}" for suffix in (TOKENS, IMAGES, _KEYS) for end in (".bin", ".idx")]
    entries = tuple(FileEntry(kind, Path(f"{stem}{kind}").stat().st_size) for kind in (*kinds, HASHES))
    return entries, sha256_of_file(Path(f"{stem}{HASHES}"))


def commit(prefix: Path, stem: Path, manifest: Manifest) -> None:
    """Rename the finished files so that they become the data set at ``prefix``."""
    write_manifest(stem, manifest)  # here first, so that a full disk is detected before anything is renamed
    manifest_path(prefix).unlink(missing_ok=True)
    suffixes = [entry.suffix for entry in manifest.files]
    files = [(Path(f"{stem}{suffix}"), Path(f"{prefix}{suffix}")) for suffix in suffixes]
    move(*files, (manifest_path(stem), manifest_path(prefix)))
    _remove(stem.parent, kept=())


def _make_room(plan: RowPlan, names: Sequence[str], stem: Path) -> set[Path]:
    """Set the files to their final size, and remove those of other plans; return the valid slice records."""
    sizes = {TOKENS: 4 * int(plan.lengths.sum()), IMAGES: int(plan.stored_sizes.sum(dtype=np.int64))}
    files = {Path(f"{stem}{suffix}.bin"): size for suffix, size in sizes.items()}
    as_left = all(path.is_file() and path.stat().st_size == size for path, size in files.items())
    wanted = {record_path(stem, name) for name in names if as_left}
    # Do not check for a file that another machine will make: NFS would cache that it is absent.
    present = wanted & set(stem.parent.iterdir())
    _remove(stem.parent, kept=present | files.keys())
    for path, size in files.items():
        with path.open("ab") as file:
            file.truncate(size)
    return present


def _remove(folder: Path, kept: Collection[Path]) -> None:
    for path in folder.iterdir():
        if is_of_rows(path) and path not in kept:
            path.unlink(missing_ok=True)


def _finish_files(plan: RowPlan, names: Sequence[str], stem: Path) -> None:
    """Write the keys, slice after slice, the indices and the hashes."""
    ranges: dict[str, list[FileRange]] = {TOKENS: [], IMAGES: [], _KEYS: []}
    key_lengths = []
    with Path(f"{stem}{_KEYS}.bin").open("wb") as file:
        for name in names:
            record = _finished(stem, name)
            ranges[TOKENS].append(record.tokens)
            ranges[IMAGES].append(record.images)
            ranges[_KEYS].append(FileRange(len(record.keys), hashlib.sha256(record.keys.data).hexdigest()))
            key_lengths.append(record.key_lengths)
            file.write(record.keys.data)
        sync(file)
    indices = {
        TOKENS: write_index(f"{stem}{TOKENS}", plan.lengths, "int32", plan.images_per_row),
        IMAGES: write_index(f"{stem}{IMAGES}", plan.stored_sizes, "uint8"),
        _KEYS: write_index(f"{stem}{_KEYS}", np.concatenate(key_lengths), "uint8"),
    }
    with Path(f"{stem}{HASHES}").open("wb") as file:
        for suffix, index in indices.items():
            for line in (*hash_lines(f"{suffix}.bin", ranges[suffix]), *hash_lines(f"{suffix}.idx", [index])):
                file.write(line.encode())
        sync(file)


def _finished(stem: Path, name: str) -> SliceRecord:
    record = read_record(stem, name)
    if record is None:
        raise DataError(f"{record_path(stem, name)}: gone or damaged; start again, and its rows are written again")
    return record
