"""How a run has ended, in a file beside its checkpoints.

torchrun ends with status 1 whatever its ranks ended with, so who starts it finds here whether the run is done, wants to
go on, or never will. The file is not there while a run is at work, nor after one that was killed or failed by a bug.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vl import folder_lock, machine_errors
from megatron_vl.checkpoint import store
from megatron_vl.config.schema import RunConfig
from megatron_vl.errors import ExitStatus, FolderInUseError, MegatronVLError, PeerError
from megatron_vl.files import write_whole
from megatron_vl.log import log_rank_0
from megatron_vl.training.state import TrainState

if TYPE_CHECKING:  # a refusal does without torch
    from megatron_vl.parallel.topology import Topology

NAME = "last_run.json"


def warn_of_loss(config: RunConfig, state: TrainState) -> None:
    """Say, in a way that is not missed, that what is trained is lost at the end; at the start and at the end."""
    if config.checkpoint.save is None:
        steps = config.training.train_iters - state.step
        what = f"THE {steps} STEPS OF THIS RUN WILL BE LOST" if steps > 0 else "WHAT THIS RUN HAS TRAINED IS LOST"
        line = f"{what}: --save names no directory, so no checkpoint is written"
        for text in ("!" * len(line), line, "!" * len(line)):
            log_rank_0(text, level=logging.WARNING)


def forget_last(config: RunConfig, topology: Topology) -> None:
    """Remove what the last run has left."""
    if topology.rank == 0:
        _forget(config)


def record(config: RunConfig, topology: Topology, status: ExitStatus, *, step: int | None, reason: str) -> None:
    """Note the end of this run, at which step, None before the first; where that cannot be written, the exit status
    has to do."""
    if topology.rank == 0:
        _write(config, status, step=step, reason=reason)


@contextlib.contextmanager
def recording_errors(config: RunConfig, topology: Topology, *, step: Callable[[], int | None]) -> Iterator[None]:
    """Note the end of a run by an error that is no bug."""
    try:
        yield
    except BaseException as error:
        if (status := _status_of(error)) is not None:
            record(config, topology, status, step=step(), reason=machine_errors.describe(error) or str(error))
        raise


@contextlib.contextmanager
def recording_refusals(config: RunConfig, rank: int) -> Iterator[None]:
    """Note that a run was refused before it has started ranks; not in a directory where another one is at work."""
    if rank == 0:
        _forget(config)  # while a run is at work there is none
    try:
        yield
    except MegatronVLError as error:
        root = Path(config.checkpoint.save or "")
        if rank == 0 and config.checkpoint.save and root.is_dir():
            with contextlib.suppress(FolderInUseError, OSError), folder_lock.hold(root, store.LOCK):
                _write(config, error.exit_status, step=None, reason=str(error))
        raise


def _status_of(error: BaseException) -> ExitStatus | None:
    """The exit status that a command gives to an error; None for a bug, here or on another rank."""
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
