"""Load what a sharded state describes, on all ranks or on none.

Megatron-Core 0.16.1 reads on all ranks together. With 0.19.2 each rank reads alone, so only the rank that cannot read
would fail, and its peers would wait for it in their next collective.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from megatron.core import dist_checkpointing

from megatron_vl import machine_errors
from megatron_vl.errors import CheckpointError
from megatron_vl.parallel import agreement

if TYPE_CHECKING:
    from torch.distributed.checkpoint.api import CheckpointException


def load_state(wanted: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    """Return ``wanted`` with the tensors of a checkpoint, and what it holds besides tensors; all ranks call it.

    Raises:
        CheckpointError: on all ranks, if one of them cannot read.
    """
    # It derives from BaseException, so it must be caught by name.
    from torch.distributed.checkpoint.api import CheckpointException

    def load() -> dict[str, Any]:
        try:
            loaded: dict[str, Any] = dist_checkpointing.load(wanted, str(checkpoint))
        except CheckpointException as error:
            raise CheckpointError(f"{checkpoint}: cannot be loaded: {reason_of(error)}") from error
        except (OSError, RuntimeError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"{checkpoint}: cannot be loaded: {error}") from error
        return loaded

    return agreement.together(load)


def reason_of(error: CheckpointException) -> str:
    """Return which rank failed and why.

    Where torch works on all ranks together, it raises on all if one fails, but only the first learns the reason. Where
    each works alone, each is rank 0 to torch.

    Raises:
        KeyboardInterrupt: if that is the reason. torch wraps every error of its work, and an interrupt is no damage.
    """
    reasons = {rank or dist.get_rank(): reason for rank, (reason, _) in error.failures.items()}
    if any(isinstance(reason, KeyboardInterrupt) for reason in reasons.values()):
        raise KeyboardInterrupt from error
    told = "; ".join(f"rank {rank}: {machine_errors.describe(reason) or reason}" for rank, reason in reasons.items())
    return told or "another rank has failed, and rank 0 says why"
