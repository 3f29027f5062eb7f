"""Where checkpoints lie, and the promise that one is either complete or invisible.

    DIR/iter_0000100/                     a committed checkpoint; never written to again
    DIR/latest_checkpointed_iteration.txt the newest step, a hint (Megatron-LM's own name)
    DIR/.staging-iter_0000100-4f1c...     being written, or left by a dead run: never read, removed by the next save

A checkpoint is written into a fresh staging directory. When every rank has written and synchronised its files, a
manifest with the size and SHA-256 of each is added, and one rename makes it visible. So nothing that carries its final
name can be torn, and two saves can never mix. The tracker is replaced by a rename too; when it is missing or wrong,
the newest committed directory counts.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vl.config.load import load_config
from megatron_vl.config.schema import RunConfig
from megatron_vl.errors import CheckpointError

CONFIG = "config.yaml"
TRACKER = "latest_checkpointed_iteration.txt"
MANIFEST = "manifest.json"
FORMAT_VERSION = 1
_NAME = re.compile(r"iter_(\d{7,})")


@dataclass(frozen=True)
class FileRecord:
    """Size and contents of one file of a checkpoint."""

    name: str
    size: int
    sha256: str


def directory_of(root: Path, step: int) -> Path:
    """The directory of the checkpoint after ``step`` updates."""
    return root / f"iter_{step:07d}"


def open_staging(root: Path, step: int) -> Path:
    """Make a fresh staging directory, and remove those that earlier runs left behind.

    Raises:
        CheckpointError: a checkpoint of this step is already committed; it would have to be written to again.
    """
    if directory_of(root, step).exists():
        raise CheckpointError(f"{directory_of(root, step)} is already there; save to another directory, or remove it")
    root.mkdir(parents=True, exist_ok=True)
    for left in [*root.glob(".staging-*"), *root.glob(".trash-*")]:
        shutil.rmtree(left, ignore_errors=True)
    staging = root / f".staging-{directory_of(root, step).name}-{uuid.uuid4().hex[:8]}"
    staging.mkdir()
    return staging


def record_file(path: Path) -> FileRecord:
    """Synchronise a file with the disk, and note its size and SHA-256."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
    return FileRecord(path.name, path.stat().st_size, _sha256(path))


def commit(staging: Path, root: Path, *, step: int, files: list[FileRecord], facts: dict[str, Any]) -> Path:
    """Add the manifest and make the checkpoint visible under its final name.

    Args:
        files: every file of the staging directory.
        facts: what the manifest says beside them (layout, versions).
    """
    manifest = {"format_version": FORMAT_VERSION, "step": step, **facts}
    manifest["files"] = {record.name: {"size": record.size, "sha256": record.sha256} for record in files}
    _write_durably(staging / MANIFEST, json.dumps(manifest, indent=1))
    _sync_directory(staging)
    final = directory_of(root, step)
    staging.rename(final)
    _sync_directory(root)
    temporary = root / f".{TRACKER}.new"
    _write_durably(temporary, f"{step}\n")
    temporary.rename(root / TRACKER)
    _sync_directory(root)
    return final


def discard(staging: Path) -> None:
    """Remove a staging directory that will not be committed."""
    shutil.rmtree(staging, ignore_errors=True)


def steps_in(root: Path) -> list[int]:
    """Steps of the committed checkpoints of a directory, in order."""
    if not root.is_dir():
        return []
    names = ((_NAME.fullmatch(path.name), path) for path in root.iterdir())
    return sorted(int(match[1]) for match, path in names if match and (path / MANIFEST).is_file())


def resolve(path: Path) -> Path:
    """The checkpoint that a path means: itself, or the newest one in a directory of checkpoints.

    Raises:
        CheckpointError: there is none.
    """
    if (path / MANIFEST).is_file():
        return path
    steps = steps_in(path)
    if not steps:
        what = "does not exist" if not path.exists() else "holds no committed checkpoint (iter_*/manifest.json)"
        raise CheckpointError(f"{path} {what}; give the directory that --save wrote to, or one iter_* directory in it")
    hinted = _read_tracker(path / TRACKER)
    return directory_of(path, hinted if hinted in steps else steps[-1])


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a committed checkpoint.

    Raises:
        CheckpointError: it cannot be read, or is of another format version.
    """
    path = checkpoint / MANIFEST
    try:
        manifest = json.loads(path.read_text())
    except (OSError, ValueError) as error:  # damaged bytes may be no JSON, or not even text
        raise CheckpointError(f"{path}: cannot be read ({error}); the checkpoint is not usable") from error
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format_version {version}, expected {FORMAT_VERSION}: written by another version of megatron_vl"
        )
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(
        isinstance(entry, dict) and {"size", "sha256"} <= entry.keys() for entry in files.values()
    ):
        raise CheckpointError(f"{path}: lists no files with their sizes and hashes; it is damaged, use an earlier one")
    return dict(manifest)


def read_config(checkpoint: Path) -> RunConfig:
    """The resolved configuration that was saved with a checkpoint."""
    return load_config(checkpoint / CONFIG)


def verify(checkpoint: Path, *, hashes: bool) -> None:
    """Compare every file with the manifest: its size, and with ``hashes`` its contents.

    Raises:
        CheckpointError: names the file, what was found and what was expected.
    """
    for name, expected in read_manifest(checkpoint)["files"].items():
        path = checkpoint / name
        if not path.is_file():
            raise CheckpointError(f"{path}: missing; the checkpoint is incomplete, use an earlier one")
        size = path.stat().st_size
        if size != expected["size"]:
            raise CheckpointError(
                f"{path}: {size} bytes, but {expected['size']} were written; the file is truncated or was changed, "
                "use an earlier checkpoint"
            )
        if hashes and (found := _sha256(path)) != expected["sha256"]:
            raise CheckpointError(
                f"{path}: SHA-256 {found[:16]}..., but {str(expected['sha256'])[:16]}... was written; the file is "
                "corrupt, use an earlier checkpoint"
            )


def retain(root: Path, keep_last: int | None) -> None:
    """Remove all but the newest ``keep_last`` checkpoints."""
    for step in steps_in(root)[: -keep_last if keep_last else 0]:
        doomed = directory_of(root, step)
        trash = root / f".trash-{doomed.name}-{uuid.uuid4().hex[:8]}"
        doomed.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read_tracker(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _write_durably(path: Path, text: str) -> None:
    with path.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
