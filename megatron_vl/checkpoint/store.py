"""Store checkpoints in a directory, so that each one is either complete or invisible.

    DIR/iter_0000100/                     a committed checkpoint; never written to again
    DIR/latest_checkpointed_iteration.txt the newest step, for people and scripts (Megatron-LM's own name)
    DIR/.staging-iter_0000100-4f1c...     being written, or left by a dead run: never read, removed by the next save

A checkpoint is written into a fresh staging directory. When every rank has written and synchronized its files, a
manifest with the size and SHA-256 of each is added, and one rename makes it visible. So a directory with a final name
is always complete, and two saves can never mix. The tracker is also replaced by a rename, but never used to find a
checkpoint: if a run is killed before that, its newest checkpoint still counts. A tracker that names another step causes
a warning.

The manifest shows later changes, by a disk fault or by a person. Everything that is read from a checkpoint is first
compared with the manifest, and the manifest with its own digest.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import re
import shutil
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vl.config.load import load_config
from megatron_vl.config.schema import RunConfig
from megatron_vl.errors import CheckpointError, DamagedCheckpointError
from megatron_vl.files import drafts_beside, move, sha256_of_file, sync_path, write_whole
from megatron_vl.log import log_rank_0

CONFIG = "config.yaml"
TRACKER = "latest_checkpointed_iteration.txt"
MANIFEST = "manifest.json"
LOCK = ".lock"
"""A lock in a directory of checkpoints, held by the process that saves there."""
FORMAT_VERSION = 3
_DIGEST = "digest"
_THREADS = 4
"""Number of files that a process hashes at a time."""
_NAME = re.compile(r"iter_(\d{7,})")


@dataclass(frozen=True)
class FileRecord:
    """Size and contents of one file of a checkpoint."""

    name: str
    size: int
    sha256: str


def directory_of(root: Path, step: int) -> Path:
    """Return the directory of the checkpoint after ``step`` updates."""
    return root / f"iter_{step:07d}"


def open_staging(root: Path, step: int) -> Path:
    """Create a fresh staging directory, and remove those that earlier runs left.

    Raises:
        CheckpointError: if a checkpoint of this step is already committed; it would have to be overwritten.
    """
    if directory_of(root, step).exists():
        raise CheckpointError(f"{directory_of(root, step)} is already there; save to another directory, or remove it")
    root.mkdir(parents=True, exist_ok=True)
    for left in [*root.glob(".staging-*"), *root.glob(".trash-*")]:
        shutil.rmtree(left, ignore_errors=True)
    for draft in drafts_beside(root / TRACKER):
        draft.unlink(missing_ok=True)
    staging = root / f".staging-{directory_of(root, step).name}-{uuid.uuid4().hex[:8]}"
    staging.mkdir()
    return staging


def record_file(path: Path) -> FileRecord:
    """Synchronize a file with the disk, and return its size and SHA-256."""
    sync_path(path)
    return FileRecord(path.name, path.stat().st_size, sha256_of_file(path))


def commit(staging: Path, root: Path, *, step: int, files: list[FileRecord], facts: dict[str, Any]) -> Path:
    """Add the manifest and make the checkpoint visible under its final name.

    Args:
        files: every file of the staging directory.
        facts: further entries of the manifest (layout, versions).
    """
    manifest = {"format_version": FORMAT_VERSION, "step": step, **facts}
    manifest["files"] = {record.name: {"size": record.size, "sha256": record.sha256} for record in files}
    manifest[_DIGEST] = _digest(manifest)
    write_whole(staging / MANIFEST, json.dumps(manifest, indent=1), durable=True)
    sync_path(staging)
    final = directory_of(root, step)
    move((staging, final))
    write_whole(root / TRACKER, f"{step}\n", durable=True)
    sync_path(root)
    return final


def discard(staging: Path) -> None:
    """Remove a staging directory that will not be committed."""
    shutil.rmtree(staging, ignore_errors=True)


def steps_in(root: Path) -> list[int]:
    """Return the steps of the checkpoints of a directory that have a manifest, so were committed, in order."""
    return [step for step in steps_named(root) if (directory_of(root, step) / MANIFEST).is_file()]


def steps_named(root: Path) -> list[int]:
    """Return the steps of everything that has the name of a checkpoint, usable or not, in order."""
    if not root.is_dir():
        return []
    return sorted(int(match[1]) for path in root.iterdir() if (match := _NAME.fullmatch(path.name)))


def resolve(path: Path) -> Path:
    """Return the checkpoint at a path: itself, or the newest one in a directory of checkpoints, damaged or not.

    Raises:
        CheckpointError: if there is none.
    """
    if (path / MANIFEST).is_file() or (path.exists() and _NAME.fullmatch(path.name)):
        return path
    if not steps_in(path):
        what = "does not exist" if not path.exists() else "holds no committed checkpoint (iter_*/manifest.json)"
        raise CheckpointError(f"{path} {what}; give the directory that --save wrote to, or one iter_* directory in it")
    return directory_of(path, steps_named(path)[-1])


def choose(path: Path) -> Path:
    """Return the checkpoint at a path as :func:`resolve` does; warn if the tracker of a directory names another one."""
    checkpoint = resolve(path)
    if checkpoint != path:
        warn_of_tracker(path, steps_named(path)[-1])
    return checkpoint


def warn_of_tracker(root: Path, newest: int) -> None:
    """Warn if the tracker of a directory names another step than the newest, which is the one that counts."""
    named = read_tracker(root)
    if named is None or named == newest:
        return
    if named > newest:
        text = f"LOST CHECKPOINT: {root / TRACKER} names step {named}, which is not there; newest is step {newest}"
    else:
        text = (
            f"TRACKER NOT FOLLOWED: {root / TRACKER} names step {named}, but the newest checkpoint is that of step "
            f"{newest}, and the newest counts; to go back to another one, name its directory iter_*"
        )
    log_rank_0(text, level=logging.WARNING)


def read_tracker(root: Path) -> int | None:
    """Return the step that the tracker names, or None if there is none or it cannot be read."""
    try:
        return int((root / TRACKER).read_text())
    except (OSError, ValueError):
        return None


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Read the manifest of a committed checkpoint.

    Raises:
        DamagedCheckpointError: if it is missing, or not what was written.
        CheckpointError: if it is of another format version.
    """
    path = checkpoint / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise DamagedCheckpointError(f"{path}: missing; this is no checkpoint, or no longer one") from error
    except ValueError as error:  # damaged bytes may be no JSON, or not even text
        raise DamagedCheckpointError(f"{path}: cannot be read ({error})") from error
    if not isinstance(manifest, dict) or manifest.get(_DIGEST, _digest(manifest)) != _digest(manifest):
        raise DamagedCheckpointError(f"{path}: is not what was written: its digest differs")
    if (version := manifest.get("format_version")) != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format_version {version}, expected {FORMAT_VERSION}: written by another version of megatron_vl"
        )
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(
        isinstance(entry, dict) and {"size", "sha256"} <= entry.keys() for entry in files.values()
    ):
        raise DamagedCheckpointError(f"{path}: lists no files with their sizes and hashes")
    name = _NAME.fullmatch(checkpoint.name)
    if name and int(name[1]) != manifest.get("step"):
        raise DamagedCheckpointError(f"{path}: is of step {manifest.get('step')}, under the name of another one")
    return manifest


def read_config(checkpoint: Path) -> RunConfig:
    """Read the resolved configuration that was saved with a checkpoint.

    Raises:
        DamagedCheckpointError: if it is not what was written.
    """
    _compare_size(checkpoint, record := _files(checkpoint)[CONFIG])
    _compare_contents(checkpoint, record)
    return load_config(checkpoint / CONFIG)


def verify(checkpoint: Path) -> None:
    """Compare every file with the manifest. Raises as :func:`verify_sizes` and :func:`verify_contents`."""
    verify_sizes(checkpoint)
    verify_contents(checkpoint)


def verify_sizes(checkpoint: Path) -> str:
    """Compare the size of every file with the manifest. Return a string that identifies this checkpoint uniquely.

    Raises:
        DamagedCheckpointError: if a size differs; names the file, what was found and what was expected.
        CheckpointError: if a file cannot be read, so that nothing is known of it, or is of another version.
    """
    with _errors_of_reading(checkpoint):
        for record in _files(checkpoint).values():
            _compare_size(checkpoint, record)
        return _digest(read_manifest(checkpoint))


def verify_contents(checkpoint: Path, *, rank: int = 0, world_size: int = 1) -> None:
    """Compare the contents of this rank's share of the files with the manifest. Raises as :func:`verify_sizes`."""
    with _errors_of_reading(checkpoint):
        mine = share_out(list(_files(checkpoint).values()), world_size)[rank]
        with ThreadPoolExecutor(_THREADS) as threads:
            list(threads.map(_compare_contents, [checkpoint] * len(mine), mine))


@contextmanager
def _errors_of_reading(checkpoint: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = error.filename or checkpoint
        if error.errno == errno.EIO:
            raise DamagedCheckpointError(f"{where}: the disk cannot read it ({error.strerror})") from error
        raise CheckpointError(f"{where}: cannot be read ({error.strerror or error}); mend access to it") from error


def share_out(files: Sequence[FileRecord], world_size: int) -> list[list[FileRecord]]:
    """Return shares of about equal size: each file, from the largest on, goes to the rank that has the least."""
    shares: list[list[FileRecord]] = [[] for _ in range(world_size)]
    load = [0] * world_size
    for file in sorted(files, key=lambda file: (-file.size, file.name)):
        rank = load.index(min(load))
        shares[rank].append(file)
        load[rank] += file.size
    return shares


def set_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint to a name that no run reads, writes or removes. Return the name."""
    aside = checkpoint.with_name(f"damaged-{checkpoint.name}-{uuid.uuid4().hex[:8]}")
    move((checkpoint, aside))
    return aside


def retain(root: Path, keep_last: int | None) -> None:
    """Remove all but the newest ``keep_last`` checkpoints."""
    for step in steps_in(root)[: -keep_last if keep_last else 0]:
        doomed = directory_of(root, step)
        trash = root / f".trash-{doomed.name}-{uuid.uuid4().hex[:8]}"
        move((doomed, trash))
        shutil.rmtree(trash, ignore_errors=True)


def _files(checkpoint: Path) -> dict[str, FileRecord]:
    files = read_manifest(checkpoint)["files"]
    return {name: FileRecord(name, entry["size"], entry["sha256"]) for name, entry in files.items()}


def _compare_size(checkpoint: Path, expected: FileRecord) -> None:
    path = checkpoint / expected.name
    if not path.is_file():
        raise DamagedCheckpointError(f"{path}: missing, {expected.size} bytes were written")
    if (size := path.stat().st_size) != expected.size:
        raise DamagedCheckpointError(
            f"{path}: {size} bytes, but {expected.size} were written; the file is truncated or was changed"
        )


def _compare_contents(checkpoint: Path, expected: FileRecord) -> None:
    path = checkpoint / expected.name
    if (found := sha256_of_file(path)) != expected.sha256:
        raise DamagedCheckpointError(
            f"{path}: SHA-256 {found[:16]}..., but {str(expected.sha256)[:16]}... was written; the file was changed"
        )


def _digest(manifest: dict[str, Any]) -> str:
    """Return the SHA-256 of a manifest without its digest."""
    said = {name: value for name, value in manifest.items() if name != _DIGEST}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
