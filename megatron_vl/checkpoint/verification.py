"""Choose the checkpoint that all ranks read, and verify every byte of it before anything of it is used.

Rank 0 chooses for all, since a training may save a newer one between the reads of two ranks. Then every rank compares
every file's size, and hashes a share of the files, so that the time does not grow with the world. The findings of all
ranks are gathered, and all ranks take the same decision.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from megatron_vl.checkpoint import store
from megatron_vl.errors import CheckpointError, DamagedCheckpointError
from megatron_vl.parallel.agreement import by_all, by_rank_0
from megatron_vl.parallel.topology import Topology

T = TypeVar("T")


@dataclass(frozen=True)
class Verified:
    """A checkpoint whose every file is what its manifest says; all ranks know that."""

    path: Path


@dataclass(frozen=True)
class _Finding:
    """What a rank has found: a value, or an error."""

    value: str | None = None
    error: type[CheckpointError] | None = None
    text: str = ""


def choose_together(path: Path, topology: Topology) -> Verified:
    """Choose the checkpoint at a path, the same one on every rank, and verify it; every rank calls it.

    Raises:
        CheckpointError: on all ranks, if there is none, or under the conditions of :func:`verify_together`.
    """
    return verify_together(by_rank_0(lambda: store.choose(path)), topology)


def verify_together(checkpoint: Path, topology: Topology) -> Verified:
    """Compare a checkpoint with its manifest; every rank calls it and takes a share of the work.

    Raises:
        DamagedCheckpointError: on all ranks, if a file is not what was written.
        CheckpointError: on all ranks, if a file cannot be read, is of another version, or is not seen alike by all
            ranks. Such a checkpoint may be undamaged.
    """
    findings = _gather(lambda: store.verify_sizes(checkpoint))
    _raise_if_views_differ(findings, checkpoint)
    _raise_first(findings)
    _raise_first(_gather(lambda: store.verify_contents(checkpoint, rank=topology.rank, world_size=topology.world_size)))
    return Verified(checkpoint)


def _gather(look: Callable[[], str | None]) -> list[_Finding]:
    """Return what each rank has found."""

    def attempt() -> _Finding:
        try:
            return _Finding(value=look())
        except CheckpointError as error:
            return _Finding(error=type(error), text=str(error))

    return by_all(attempt)


def _raise_if_views_differ(findings: list[_Finding], checkpoint: Path) -> None:
    """Refuse a checkpoint that ranks see differently.

    Damage on one disk is the same for all who read it. Otherwise they read different disks, or see one at different
    times.

    Raises:
        CheckpointError: names a rank that finds damage where another finds none, or another checkpoint.
    """
    sound = [rank for rank, finding in enumerate(findings) if finding.error is None]
    others = [rank for rank, finding in enumerate(findings) if finding.error is DamagedCheckpointError]
    others += [rank for rank in sound if findings[rank].value != findings[sound[0]].value]
    if sound and others:
        found = findings[others[0]].text or "a sound checkpoint that is another one"
        raise CheckpointError(
            f"{checkpoint}: rank {others[0]} finds {found}; rank {sound[0]} finds it sound. Their machines do not see "
            "the same files there: mount one file system on all of them, or wait until it shows them the same"
        )


def _raise_first(found: list[_Finding]) -> None:
    # A file that one rank cannot read may be undamaged, so no rank reports damage then.
    for finding in sorted(found, key=lambda finding: finding.error is DamagedCheckpointError):
        if finding.error is not None:
            raise finding.error(finding.text)
