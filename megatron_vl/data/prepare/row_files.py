"""The files of an unfinished data set: allocation, indices, and the rename to the final data set.

Until then, the files lie in the folder of parts. Their names begin with ``rows-`` and the hash of their plan. So all
unfinished files are in one folder, and files of a given name and size belong to exactly this plan. An old manifest is
removed before the files are renamed, and the new manifest is renamed last. So after a crash at any point, the prefix
has either a complete data set or none.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from megatron_vl.config.records import Builder
from megatron_vl.data.dataset.indexed import FileRange, write_index
from megatron_vl.data.dataset.manifest import HASHES, FileEntry, Manifest, hash_lines, manifest_path, write_manifest
from megatron_vl.data.prepare.row_slices import IMAGES, TOKENS, SliceRecord
from megatron_vl.data.prepare.stored_plan import SliceShape
from megatron_vl.errors import DataError
from megatron_vl.files import move, sha256_of_file, sync

_KEYS = ".keys"
_KINDS = tuple(f"{suffix}{end}" for suffix in (TOKENS, IMAGES, _KEYS) for end in (".bin", ".idx"))
_SUFFIX = re.compile(rf"(\.\d{{5,}}-of-\d{{5,}})?({'|'.join(map(re.escape, _KINDS))})")
"""Suffixes of the files of rows, of any number of blocks."""


def is_of_rows(path: Path) -> bool:
    """Return whether a file among the parts is a file of rows."""
    return path.name.startswith("rows-")


def file_entries(stem: Path, blocks: Sequence[str]) -> tuple[tuple[FileEntry, ...], str]:
    """Return the manifest's facts about the finished files of blocks: their sizes, and the hash of their hashes."""
    suffixes = [f"{block}{kind}" for block in blocks for kind in _KINDS]
    entries = tuple(FileEntry(suffix, Path(f"{stem}{suffix}").stat().st_size) for suffix in (*suffixes, HASHES))
    return entries, sha256_of_file(Path(f"{stem}{HASHES}"))


def commit(prefix: Path, stem: Path, manifest: Manifest) -> None:
    """Rename the finished files so that they become the data set at ``prefix``.

    Files that were renamed by a process that was killed stay where they are.

    Raises:
        DataError: A file is neither at the one place nor at the other, or the places are on different file systems. The
            data set that is there stays as it is.
    """
    check_renames(stem.parent, prefix)
    for path in lost_files(prefix, stem, manifest):
        raise DataError(f"{path}: gone; plan again (--phase plan, or start again), and the rows are written again")
    write_manifest(stem, manifest)  # here first, so that a full disk is detected before anything is renamed
    manifest_path(prefix).unlink(missing_ok=True)
    _remove_outdated(prefix, {entry.suffix for entry in manifest.files})
    pairs = [(Path(f"{stem}{entry.suffix}"), Path(f"{prefix}{entry.suffix}")) for entry in manifest.files]
    move(*((old, new) for old, new in pairs if old.exists()), (manifest_path(stem), manifest_path(prefix)))


def check_renames(folder: Path, prefix: Path) -> None:
    """Check that files of the folder of parts can be renamed to ``prefix``, if the folder is there already.

    Raises:
        DataError: The folder is on another file system than the data set: a link, or a mount.
    """
    if folder.exists() and folder.stat().st_dev != prefix.parent.stat().st_dev:
        raise DataError(
            f"{folder}: is in {folder.resolve()}, on another file system than {prefix.parent}. Finished files could "
            f"not be renamed to {prefix}.*; make it a folder of that file system (copy what is in it, and it is used "
            f"again), or choose an --output in {folder.resolve().parent}"
        )


def lost_files(prefix: Path, stem: Path, manifest: Manifest) -> list[Path]:
    """Return the finished files that are, in their size, neither in the folder of parts nor at ``prefix``."""
    lost = []
    for entry in manifest.files:
        old, new = Path(f"{stem}{entry.suffix}"), Path(f"{prefix}{entry.suffix}")
        found = old if old.exists() else new
        if not found.is_file() or found.stat().st_size != entry.size:
            lost.append(old)
    return lost


def _remove_outdated(prefix: Path, wanted: set[str]) -> None:
    """Remove the files of an earlier data set at ``prefix`` that the new one, of other blocks, does not replace."""
    for path in list(prefix.parent.iterdir()):
        suffix = path.name.removeprefix(prefix.name)
        if path.name.startswith(prefix.name) and _SUFFIX.fullmatch(suffix) and suffix not in wanted:
            path.unlink(missing_ok=True)


def renaming(stem: Path) -> bool:
    """Return whether the files of a plan were all finished, and their renaming has begun."""
    return manifest_path(stem).exists()


def read_renaming(stem: Path) -> Manifest | None:
    """Return the manifest of files whose renaming has begun, or None."""
    if not renaming(stem):
        return None
    path = manifest_path(stem)
    return Builder(DataError, ours=True).build(Manifest, json.loads(path.read_bytes()), str(path))


def make_room(sizes: Mapping[str, int], stem: Path, records: Collection[Path], kept: Collection[Path]) -> None:
    """Set the files of rows to their final sizes, by suffix, and remove what belongs to other plans.

    ``records`` are the records of the slices. They stay if the files are as they were left. ``kept`` stays too.
    """
    files = {Path(f"{stem}{suffix}.bin"): size for suffix, size in sizes.items()}
    valid = records if has_room(sizes, stem) else ()
    remove_rows(stem.parent, kept={*valid, *kept, *files})
    for path, size in files.items():
        with path.open("ab") as file:
            file.truncate(size)


def has_room(sizes: Mapping[str, int], stem: Path) -> bool:
    """Return whether the files of rows are there in their final sizes, by suffix."""
    files = {Path(f"{stem}{suffix}.bin"): size for suffix, size in sizes.items()}
    return all(path.is_file() and path.stat().st_size == size for path, size in files.items())


def remove_rows(folder: Path, kept: Collection[Path] = ()) -> None:
    """Remove all files of rows but ``kept``."""
    for path in list(folder.iterdir()):
        if is_of_rows(path) and path not in kept:
            path.unlink(missing_ok=True)


def finish_files(stem: Path, slices: Iterable[tuple[str, SliceRecord, SliceShape]]) -> list[str]:
    """Write the keys, slice after slice, the indices and the hashes; return the names of the blocks.

    ``slices`` are given with the names of their blocks, block after block.
    """
    blocks = []
    with Path(f"{stem}{HASHES}").open("wb") as file:
        for block, members in itertools.groupby(slices, key=lambda item: item[0]):
            for line in _finish_block(stem, block, ((record, shape) for _, record, shape in members)):
                file.write(line.encode())
            blocks.append(block)
        sync(file)
    return blocks


def _finish_block(stem: Path, block: str, slices: Iterable[tuple[SliceRecord, SliceShape]]) -> Iterator[str]:
    """Write the keys and the indices of a block; yield the lines of its hashes."""
    ranges: dict[str, list[FileRange]] = {TOKENS: [], IMAGES: [], _KEYS: []}
    key_lengths, shapes = [], []
    with Path(f"{stem}{block}{_KEYS}.bin").open("wb") as file:
        for record, shape in slices:
            ranges[TOKENS].append(record.tokens)
            ranges[IMAGES].append(record.images)
            ranges[_KEYS].append(FileRange(len(record.keys), hashlib.sha256(record.keys.data).hexdigest()))
            key_lengths.append(record.key_lengths)
            shapes.append(shape)
            file.write(record.keys.data)
        sync(file)
    row_lengths = np.concatenate([shape.row_lengths for shape in shapes])
    images_per_row = np.concatenate([shape.images_per_row for shape in shapes])
    image_sizes = np.concatenate([shape.image_sizes for shape in shapes])
    indices = {
        TOKENS: write_index(f"{stem}{block}{TOKENS}", row_lengths, "int32", images_per_row),
        IMAGES: write_index(f"{stem}{block}{IMAGES}", image_sizes, "uint8"),
        _KEYS: write_index(f"{stem}{block}{_KEYS}", np.concatenate(key_lengths), "uint8"),
    }
    for kind, index in indices.items():
        yield from hash_lines(f"{block}{kind}.bin", ranges[kind])
        yield from hash_lines(f"{block}{kind}.idx", [index])
