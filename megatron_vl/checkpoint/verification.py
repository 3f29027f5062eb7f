"""Whether a checkpoint is what was written: every byte of it, at any size, before anything of it is used.

The ranks share the files out by size and each hashes its share, so that the time does not grow with the world. All of
them then know what any has found, and take the same decision.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_vl.checkpoint import store
from megatron_vl.errors import CheckpointError, DamagedCheckpointError
from megatron_vl.parallel.topology import Topology


@dataclass(frozen=True)
class Verified:
    """A checkpoint whose every file is what its manifest says, which all ranks know."""

    path: Path


def verify_together(checkpoint: Path, topology: Topology) -> Verified:
    """Compare a checkpoint with its manifest; every rank calls it and takes a share of the work.

    Raises:
        DamagedCheckpointError: on all ranks, a file is not what was written.
        CheckpointError: on all ranks, a file cannot be read, or is of another version: it may be sound all the same.
    """
    outcome: tuple[type[CheckpointError], str] | None = None
    try:
        store.verify(checkpoint, rank=topology.rank, world_size=topology.world_size)
    except CheckpointError as error:
        outcome = (type(error), str(error))
    gathered: list[Any] = [None] * topology.world_size
    dist.all_gather_object(gathered, outcome)
    found = [outcome for outcome in gathered if outcome is not None]
    # A file that one rank cannot read may be sound, so nobody calls the checkpoint damaged then.
    for kind, text in sorted(found, key=lambda outcome: outcome[0] is DamagedCheckpointError):
        raise kind(text)
    return Verified(checkpoint)
