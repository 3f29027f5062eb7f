"""The optimizer's part of a checkpoint, the same for each of Megatron-Core's optimizers.

For each parameter X that trains there are the tensors

    optimizer.state.exp_avg.X, optimizer.state.exp_avg_sq.X   its moments
    optimizer.state.fp32_param.X                              its master weight, where X itself is not fp32

in the shape of X, and for all of them together the number of updates. Learning rates, betas, epsilon and weight decay
are not stored. They come from the configuration of the run.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedBase
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.optimizer import ChainedOptimizer
from torch import Tensor

from megatron_vl.checkpoint.loading import load_state
from megatron_vl.checkpoint.optimizer_owners import STATE_NAMES, Placed, collect, distribute, place
from megatron_vl.errors import CheckpointError
from megatron_vl.parallel import agreement

_STATE = "optimizer.state"
_MASTER = f"{_STATE}.fp32_param"

_Sharded = dict[str, Any]


def own_step(optimizer: ChainedOptimizer) -> int:
    """Return the updates that this rank knows of: a fused optimizer does not count in groups that are empty here."""
    return max((int(group.get("step", 0)) for group in optimizer.param_groups), default=0)


def describe(optimizer: ChainedOptimizer, model: _Sharded, *, step: int) -> _Sharded:
    """Describe what this rank stores of an optimizer after ``step`` updates; all data-parallel ranks call it.

    Args:
        model: the sharded state of this rank's chunks.
    """
    _make_ready(optimizer, step)
    state = {}
    for placed in place(optimizer, model):
        for name in _names(placed):
            whole = collect(placed, name)
            if whole is not None:
                entry = _entry(placed, name, whole)
                state[entry.key] = entry
    # Without an empty dictionary: Megatron-Core would take it for a setting in which the ranks differ.
    return {"param_groups": [{"step": step}]} | ({"state": state} if state else {})


def load(optimizer: ChainedOptimizer, model: _Sharded, checkpoint: Path) -> None:
    """Load moments, masters and the step of a checkpoint into an optimizer of any kind; all ranks call it.

    Args:
        model: the sharded state of this rank's chunks.

    Raises:
        CheckpointError: on all ranks, if the checkpoint lacks the state of a parameter that trains on any of them.
    """
    stored = dist_checkpointing.load_tensors_metadata(str(checkpoint)).keys()
    _make_ready(optimizer, 0)
    every = [
        (placed, name, _key(placed, name, stored)) for placed in place(optimizer, model) for name in _names(placed)
    ]
    agreement.together(lambda: _check_stored([key for _, _, key in every], stored, checkpoint))
    wanted: _Sharded = {}
    for number, (placed, name, key) in enumerate(every):
        if placed.is_loaded_here:
            wanted[str(number)] = _entry(placed, name, torch.empty(placed.parameter.shape, dtype=torch.float32))
            wanted[str(number)].key = key
    loaded = load_state({"wanted": wanted}, checkpoint)
    step = _stored_step(loaded["optimizer"], checkpoint)
    for number, (placed, name, _) in enumerate(every):
        distribute(placed, name, loaded.get("wanted", {}).get(str(number)))
    _make_ready(optimizer, step)


def use_masters(model: _Sharded, checkpoint: Path) -> None:
    """Let fp32 weights be read from the masters if the checkpoint of a bf16 run has them."""
    stored = dist_checkpointing.load_tensors_metadata(str(checkpoint)).keys()
    for entry in model.values():
        if _is_fp32(entry):
            entry.key = _key_of_master(entry.key, stored)


def _make_ready(optimizer: ChainedOptimizer, step: int) -> None:
    """Set the number of updates. Make moments of zero where there are none, which is so before the first update."""
    for member in optimizer.chained_optimizers:
        if member.optimizer is not None:
            member.init_state_fn(member.optimizer, member.config)
    for group in optimizer.param_groups:
        group["step"] = step


def _names(placed: Placed) -> list[str]:
    """Return the names of a parameter's stored tensors; an fp32 weight is its own master."""
    return [name for name in STATE_NAMES if name != "param" or not _is_fp32(placed.described)]


def _key(placed: Placed, name: str, stored: Collection[str]) -> str:
    """Return the key of a stored tensor in a checkpoint with these keys."""
    if name == "param":  # a run in fp32 has stored no master beside the weight
        return _key_of_master(placed.described.key, stored)
    return f"{_STATE}.{name}.{placed.described.key}"


def _entry(placed: Placed, name: str, whole: Tensor) -> ShardedBase:
    """Describe one of a parameter's stored tensors. If several ranks describe it, the one with replica 0 counts."""
    prefix = _MASTER if name == "param" else f"{_STATE}.{name}"
    replica = 0 if placed.is_sharded else placed.rank
    described = replace(placed.described, replica_id=(*placed.described.replica_id[:-1], replica))
    return make_sharded_optimizer_tensor(described, whole.view(placed.parameter.shape), prefix)


def _is_fp32(entry: ShardedBase) -> bool:
    return getattr(entry.data, "dtype", None) == torch.float32


def _key_of_master(name: str, stored: Collection[str]) -> str:
    """Return the key under which a checkpoint keeps the most exact values of a parameter."""
    return f"{_MASTER}.{name}" if f"{_MASTER}.{name}" in stored else name


def _stored_step(common: _Sharded, checkpoint: Path) -> int:
    steps = {int(group["step"]) for group in common["param_groups"]}
    if len(steps) != 1:
        raise CheckpointError(
            f"{checkpoint}: the optimizer's number of updates is {sorted(steps) or 'missing'}, expected one number; "
            "start from the weights alone, with --no-load-optim or --pretrained-checkpoint"
        )
    return steps.pop()


def _check_stored(keys: Sequence[str], stored: Collection[str], checkpoint: Path) -> None:
    missing = sorted(key for key in keys if key not in stored)
    if missing:
        raise CheckpointError(
            f"{checkpoint}: holds no {missing[0]} ({len(missing)} such tensors of the optimizer): it was saved without "
            "an optimizer, or by a run in which these parameters were frozen. Freeze the same parts, or start from the "
            "weights alone, with --no-load-optim or --pretrained-checkpoint"
        )
