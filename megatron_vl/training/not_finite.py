"""Handle numbers that are not finite.

A step whose loss or gradient is not finite changes no weight on any rank (``training/step.py``). It is reported with
its rows. A checkpoint that is due during a sequence of such steps waits. If the run ends or is stopped during the
sequence, a checkpoint is written, but it replaces none: the last checkpoint that is known to work stays. The run ends
with an exit status of its own after ``training.max_skipped_steps`` of such steps in a row, or when all of its steps
were skipped. A checkpoint is neither written nor loaded if weights or moments in it are not finite.

All ranks decide alike. Progress is the same on every rank, and the findings of single ranks are gathered.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vl.config.schema import RunConfig
from megatron_vl.errors import CheckpointError, NotFiniteError
from megatron_vl.log import log_rank_0
from megatron_vl.parallel.topology import Topology
from megatron_vl.training.feed import Feed
from megatron_vl.training.parallel_model import ParallelModel
from megatron_vl.training.state import TrainState
from megatron_vl.training.step import StepResult

_MAX_NAMED = 3
_HINT = (
    "Look at the rows that were named with tools/inspect_data.py PREFIX --first ROW --rows 1; if the weights are the "
    "cause, go on from an earlier checkpoint with a lower --lr, a longer --lr-warmup-iters or other data"
)


def describe_skipped(result: StepResult, before: TrainState, feed: Feed) -> None:
    """Report on rank 0 which step was skipped, why, and which rows it read; ``before`` is the state before it."""
    if result.culprits:
        what = f"loss of {len(result.culprits)} micro-batches not finite"
    else:
        what = f"loss {result.loss.mean:.6g}, but gradient norm {result.grad_norm}"
    rows = feed.name_rows(before.consumed_rows, result.culprits)
    log_rank_0(f"step {before.step + 1} skipped on all ranks: {what}; {rows}", level=logging.WARNING)


def describe_validation(losses: Mapping[str, float], state: TrainState) -> None:
    """Warn on rank 0 of validation losses that are not finite. They change no weight, so the run continues."""
    for name, loss in losses.items():
        if not math.isfinite(loss):
            log_rank_0(
                f"validation loss of {name} after step {state.step} is {loss}, and training goes on: a row of that set "
                "cannot be computed, or the weights are growing without bound",
                level=logging.WARNING,
            )


def check_progress(state: TrainState, config: RunConfig) -> None:
    """End a run that only skips steps.

    Raises:
        NotFiniteError: on all ranks, if too many steps in a row or all steps of the run were skipped.
    """
    limit, count = config.training.max_skipped_steps, state.skipped_in_a_row
    nothing_learned = state.step == config.training.train_iters == count
    if count < limit and not nothing_learned:
        return
    save = config.checkpoint.save
    saved = f"the weights in {save} are those before these steps" if save else "nothing is saved"
    raise NotFiniteError(
        f"step {state.step}: loss or gradient was not finite in {count} steps in a row, all of which were skipped "
        f"(training.max_skipped_steps is {limit}); {saved}. {_HINT}"
    )


def find_not_finite(model: ParallelModel, topology: Topology) -> list[str]:
    """Return the names of weights and moments that are not finite on some rank; the same list on all ranks."""
    named = list(_tensors(model))
    finite = torch.stack([tensor.isfinite().all() for _, tensor in named]).tolist() if named else []
    own = [name for (name, _), good in zip(named, finite, strict=True) if not good]
    gathered: list[list[str]] = [[] for _ in range(topology.world_size)]
    dist.all_gather_object(gathered, own)
    return sorted({name for names in gathered for name in names})


def check_before_save(model: ParallelModel, topology: Topology, step: int) -> None:
    """Refuse to save a model with values that are not finite.

    Raises:
        NotFiniteError: on all ranks; names the tensors.
    """
    if names := find_not_finite(model, topology):
        raise NotFiniteError(
            f"step {step}: {describe(names)} not finite, so no checkpoint is written; earlier ones stay. {_HINT}"
        )


def check_loaded(model: ParallelModel, topology: Topology, path: Path) -> None:
    """Refuse loaded weights or moments that are not finite, whatever their source.

    Raises:
        CheckpointError: on all ranks; names the tensors.
    """
    if names := find_not_finite(model, topology):
        raise CheckpointError(f"{path}: {describe(names)} not finite; start from another checkpoint")


def describe(names: list[str]) -> str:
    """Return the first few names and the total number."""
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return f"{', '.join(names[:_MAX_NAMED])}{more} {'is' if len(names) == 1 else 'are'}"


def _tensors(model: ParallelModel) -> Iterator[tuple[str, Tensor]]:
    for chunk in model.chunks:
        yield from ((name, parameter.detach()) for name, parameter in chunk.named_parameters())
    for optimizer in model.optimizer.chained_optimizers:
        if optimizer.optimizer is not None:  # a rank whose parameters are all frozen has none
            yield from _moments(optimizer.optimizer)


def _moments(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of the optimizer's state, named by kind. A shard does not know the names of its parameters."""
    for state in optimizer.state.values():
        for kind, value in state.items():
            if isinstance(value, Tensor):
                yield f"optimizer {kind}", value
