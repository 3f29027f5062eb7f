"""Record how a run has ended, in a file beside its checkpoints.

torchrun exits with status 1 whatever status its ranks exited with. So a script that starts torchrun reads in this file
whether the run is done, wants to continue, or never will. The file does not exist while a run is active, nor after a
run that was killed or that failed by a bug.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vl import folder_lock, machine_errors
from megatron_vl.checkpoint import store
from megatron_vl.config.schema import RunConfig
from megatron_vl.errors import ExitStatus, FolderInUseError, MegatronVLError, PeerError
from megatron_vl.files import write_whole
from megatron_vl.log import warn_loudly
from megatron_vl.training.state import TrainState

if TYPE_CHECKING:  # a refused run does not need torch
    from megatron_vl.parallel.topology import Topology

NAME = "last_run.json"


def warn_of_unsaved_steps(config: RunConfig, state: TrainState) -> None:
    """Warn, at the start and at the end of a run, that it will lose what it trains."""
    if config.checkpoint.save is None:
        steps = config.training.train_iters - state.step
        what = f"THE {steps} STEPS OF THIS RUN WILL BE LOST" if steps > 0 else "WHAT THIS RUN HAS TRAINED IS LOST"
        warn_loudly(f"{what}: --save names no directory, so no checkpoint is written")


def forget_last(config: RunConfig, topology: Topology) -> None:
    """Remove the record of the last run."""
    if topology.rank == 0:
        _forget(config)


def record(config: RunConfig, topology: Topology, status: ExitStatus, *, step: int | None, reason: str) -> None:
    """Record the end of this run.

    If the file cannot be written, only the exit status tells how the run has ended.

    Args:
        step: the last step; None before the first.
    """
    if topology.rank == 0:
        _write(config, status, step=step, reason=reason)


@contextlib.contextmanager
def recording_errors(config: RunConfig, topology: Topology, *, step: Callable[[], int | None]) -> Iterator[None]:
    """Record the end of a run by an error that is not a bug."""
    try:
        yield
    except BaseException as error:
        if (status := _status_of(error)) is not None:
            record(config, topology, status, step=step(), reason=machine_errors.describe(error) or str(error))
        raise


@contextlib.contextmanager
def recording_refusals(config: RunConfig, rank: int) -> Iterator[None]:
    """Record that a run was refused before it has started ranks. Do not write where another run is active."""
    if rank == 0:
        _forget(config)  # an active run has no record
    try:
        yield
    except MegatronVLError as error:
        root = Path(config.checkpoint.save or "")
        if rank == 0 and config.checkpoint.save and root.is_dir():
            with contextlib.suppress(FolderInUseError, OSError), folder_lock.hold(root, store.LOCK):
                _write(config, error.exit_status, step=None, reason=str(error))
        raise


def _status_of(error: BaseException) -> ExitStatus | None:
    """Return the exit status of a command for an error, or None for a bug on this rank or another one."""
    if isinstance(error, MegatronVLError):
        return None if isinstance(error, PeerError) else error.exit_status
    if isinstance(error, KeyboardInterrupt):
        return ExitStatus.INTERRUPTED
    return None if machine_errors.describe(error) is None else ExitStatus.USER_ERROR


def _forget(config: RunConfig) -> None:
    if config.checkpoint.save:
        with contextlib.suppress(OSError):
            (Path(config.checkpoint.save) / NAME).unlink()


def _write(config: RunConfig, status: ExitStatus, *, step: int | None, reason: str) -> None:
    if config.checkpoint.save:
        content = {"exit_status": int(status), "meaning": status.name.lower(), "step": step, "reason": reason}
        with contextlib.suppress(OSError):
            write_whole(Path(config.checkpoint.save) / NAME, json.dumps(content) + "\n")
