"""The optimizer's part of a checkpoint, the same for each of Megatron-Core's optimizers.

For each parameter X that trains there are the tensors

    optimizer.state.exp_avg.X, optimizer.state.exp_avg_sq.X   its moments
    optimizer.state.fp32_param.X                              its master weight, where X itself is not fp32

and for all of them together the number of updates. Megatron-Core's optimizers differ in more. The sharded one stores
masters under another name, and also where the weight is its own master. Each nests what it stores in its own way. Each
takes learning rates, betas, epsilon and weight decay from the stored parameter groups, which it recognizes by their
multiples. Here tensors are matched by name alone, and only the step is read from stored groups. Everything else in a
group comes from the configuration of the run.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_items_iter
from megatron.core.dist_checkpointing.mapping import ShardedBase
from megatron.core.optimizer import ChainedOptimizer

from megatron_vl.errors import CheckpointError

_FORMAT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    # Gathered over gloo to one rank of each data-parallel group. Otherwise every rank would hold the whole optimizer
    # of its model shard in host memory, and whole buckets of it on its GPU. The keys are the same.
    "distrib_optim_fully_reshardable_mem_efficient": True,
}
_STATE = "optimizer.state."
_MASTER = f"{_STATE}fp32_param."
_SHARDED_MASTER = f"{_STATE}param."
"""Megatron-Core's sharded optimizer keeps masters under this name."""

_Sharded = dict[str, Any]


def own_step(optimizer: ChainedOptimizer) -> int:
    """Return the updates that this rank knows of: a fused optimizer does not count in groups that are empty here."""
    return max((int(group.get("step", 0)) for group in optimizer.param_groups), default=0)


def describe(optimizer: ChainedOptimizer, model: _Sharded, *, step: int) -> _Sharded:
    """Describe what to store of an optimizer after ``step`` updates.

    Args:
        model: the sharded state of this rank's chunks.
    """
    for member in optimizer.chained_optimizers:
        if member.optimizer is not None:  # moments exist from the first update on; before it they are zero
            member.init_state_fn(member.optimizer, member.config)
    for group in optimizer.param_groups:
        group["step"] = step
    state = _sharded_state(optimizer, model, is_loading=False)
    is_master = {entry.key for entry in model.values() if _is_fp32(entry)}
    for holder, place, entry in _sharded_tensors(state):
        name = _of_master(entry.key)
        if name in is_master:
            del holder[place]
        elif name is not None:
            entry.key = _MASTER + name
    return state


def load(optimizer: ChainedOptimizer, model: _Sharded, checkpoint: Path) -> None:
    """Load moments, masters and the step of a checkpoint into an optimizer of any kind.

    Args:
        model: the sharded state of this rank's chunks.

    Raises:
        CheckpointError: if the checkpoint lacks the state of a parameter that trains.
    """
    stored = dist_checkpointing.load_tensors_metadata(str(checkpoint)).keys()
    state = _sharded_state(optimizer, model, is_loading=True)
    places = list(_sharded_tensors(state))
    for _, _, entry in places:
        name = _of_master(entry.key)
        entry.key = entry.key if name is None else _key_of_master(name, stored)
    _check_stored([entry.key for _, _, entry in places], stored, checkpoint)
    wanted = {str(number): entry for number, (_, _, entry) in enumerate(places)}
    loaded = dist_checkpointing.load({"wanted": wanted}, str(checkpoint))
    for number, (holder, place, _) in enumerate(places):
        holder[place] = loaded["wanted"][str(number)]
    step = _stored_step(loaded["optimizer"], checkpoint)
    groups = optimizer.optimizer.state_dict()["param_groups"]
    _groups_of(state)["param_groups"] = [group | {"step": step} for group in groups]
    with torch.no_grad():
        optimizer.load_state_dict(state)


def use_masters(model: _Sharded, checkpoint: Path) -> None:
    """Let fp32 weights be read from the masters if the checkpoint of a bf16 run has them."""
    stored = dist_checkpointing.load_tensors_metadata(str(checkpoint)).keys()
    for entry in model.values():
        if _is_fp32(entry):
            entry.key = _key_of_master(entry.key, stored)


def _sharded_state(optimizer: ChainedOptimizer, model: _Sharded, *, is_loading: bool) -> _Sharded:
    """Return what Megatron-Core stores of an optimizer, or expects when loading.

    Its sharded optimizer gathers a buffer without the padding at the end of its buckets. But it splits the buffer at
    offsets that include the padding. So after a padded bucket, each parameter would be stored with the values of later
    ones. To avoid that, the padding is counted here as if it were values.
    """
    for member in optimizer.chained_optimizers:
        for buffer in getattr(member, "buffers", ()):
            buffer.numel_unpadded = buffer.numel
            for bucket in buffer.buckets:
                bucket.numel_unpadded = bucket.grad_data.numel()
    state: _Sharded = optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=_FORMAT)
    return state


def _is_fp32(entry: ShardedBase) -> bool:
    return getattr(entry.data, "dtype", None) == torch.float32


def _key_of_master(name: str, stored: Collection[str]) -> str:
    """Return the key under which a checkpoint keeps the most exact values of a parameter."""
    return _MASTER + name if _MASTER + name in stored else name


def _sharded_tensors(state: _Sharded) -> Iterator[tuple[Any, Any, Any]]:
    """Yield every tensor of an optimizer's state: its container, its key there, its description."""
    yield from [item for item in nested_items_iter(state) if isinstance(item[2], ShardedBase)]


def _of_master(key: str) -> str | None:
    """Return the parameter whose master a key names; None if the key names something else."""
    prefix = next((prefix for prefix in (_MASTER, _SHARDED_MASTER) if key.startswith(prefix)), None)
    return key.removeprefix(prefix) if prefix else None


def _groups_of(state: _Sharded) -> _Sharded:
    """Return the holder of the parameter groups: the top level, or one level down in optimizers that keep masters."""
    return state if "param_groups" in state else state["optimizer"]


def _stored_step(common: _Sharded, checkpoint: Path) -> int:
    steps = {int(group["step"]) for group in _groups_of(common)["param_groups"] if "step" in group}
    if len(steps) != 1:
        raise CheckpointError(
            f"{checkpoint}: the optimizer's number of updates is {sorted(steps) or 'missing'}, expected one number; "
            "start from the weights alone, with --no-load-optim or --pretrained-checkpoint"
        )
    return steps.pop()


def _check_stored(keys: list[str], stored: Collection[str], checkpoint: Path) -> None:
    missing = sorted(key for key in keys if key not in stored)
    if missing:
        raise CheckpointError(
            f"{checkpoint}: holds no {missing[0]} ({len(missing)} such tensors of the optimizer): it was saved without "
            "an optimizer, or by a run in which these parameters were frozen. Freeze the same parts, or start from the "
            "weights alone, with --no-load-optim or --pretrained-checkpoint"
        )
