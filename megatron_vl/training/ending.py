"""How a run has ended, in a file beside its checkpoints.

torchrun ends with status 1 whatever its ranks ended with, so who starts it finds here whether the run is done, wants to
go on, or never will. The file is not there while a run is at work, nor after one that was killed or failed by a bug.
"""

from __future__ import annotations

import contextlib
import json
import logging
from pathlib import Path

from megatron_vl.config.schema import RunConfig
from megatron_vl.errors import ExitStatus
from megatron_vl.log import log_rank_0
from megatron_vl.parallel.topology import Topology
from megatron_vl.training.state import TrainState

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
    if config.checkpoint.save and topology.rank == 0:
        with contextlib.suppress(OSError):
            (Path(config.checkpoint.save) / NAME).unlink()


def record(config: RunConfig, topology: Topology, status: ExitStatus, *, step: int, reason: str) -> None:
    """Note the end of this run; where that cannot be written, the exit status has to do."""
    if config.checkpoint.save and topology.rank == 0:
        content = {"exit_status": int(status), "meaning": status.name.lower(), "step": step, "reason": reason}
        with contextlib.suppress(OSError):
            (Path(config.checkpoint.save) / NAME).write_text(json.dumps(content) + "\n")
