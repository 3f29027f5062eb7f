"""The optimizer's part of a checkpoint, the same for each of Megatron-Core's optimizers.

For each parameter X that trains there are the tensors

    optimizer.state.exp_avg.X, optimizer.state.exp_avg_sq.X   its moments
    optimizer.state.fp32_param.X                              its master weight, where X itself is not fp32

in the shape of X, and for all of them together the number of updates. Learning rates, betas, epsilon and weight decay
are not stored. They come from the configuration of the run.

The sharded optimizer concatenates parameters, and gives each data-parallel rank a range of them. One of the ranks that
hold a large part of a parameter is its owner. The owner stores and loads the whole parameter. The other ranks send it
their parts, or receive them from it, over gloo. Owners are chosen so that all ranks own about the same amount. Hence a
save and a load divide their work among the data-parallel ranks, and need host memory for a rank's own amount only.
Megatron-Core's own way gathers the state of all ranks on one of them, which took 26 to 36 bytes a parameter there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedBase
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megatron_vl.errors import CheckpointError
from megatron_vl.parallel import agreement

_STATE = "optimizer.state"
_MASTER = f"{_STATE}.fp32_param"
_KEYS = {"param": _MASTER, "exp_avg": f"{_STATE}.exp_avg", "exp_avg_sq": f"{_STATE}.exp_avg_sq"}
"""Prefixes of the stored tensors, by the names that Megatron-Core's sharded optimizer has for them."""

_Sharded = dict[str, Any]


@dataclass(frozen=True)
class _Share:
    """The range of a flattened parameter whose state one data-parallel rank holds."""

    rank: int
    start: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class _Placed:
    """A parameter that trains, and who holds its state."""

    member: Any
    """The optimizer of Megatron-Core that updates it."""
    parameter: Tensor
    shares: tuple[_Share, ...]
    """In the order of ranks. An optimizer that is not sharded has one share, which all ranks hold."""
    owner: int
    """The data-parallel rank that stores it."""
    described: ShardedBase
    """What is stored of its weight."""

    @property
    def rank(self) -> int:
        """This rank's number among those that hold the same part of the model."""
        return int(self.described.replica_id[-1])

    @property
    def is_sharded(self) -> bool:
        return isinstance(self.member, DistributedOptimizer)

    @property
    def own_share(self) -> _Share | None:
        """What this rank holds of it."""
        held = [share for share in self.shares if share.rank == self.rank or not self.is_sharded]
        return held[0] if held else None

    @property
    def names(self) -> list[str]:
        """The names of its stored tensors; an fp32 weight is its own master."""
        return [name for name in _KEYS if name != "param" or not _is_fp32(self.described)]

    def values(self) -> dict[str, Tensor]:
        """Return this rank's share of its tensors, flattened."""
        share = self.own_share
        assert share is not None
        if self.is_sharded:
            held = self.member._get_main_param_and_optimizer_states(self.parameter)
        else:
            main = getattr(self.parameter, "main_param", self.parameter)
            held = {"param": main, **self.member.optimizer.state[main]}
        assert all(held[name].numel() == share.size for name in self.names)
        return {name: held[name].detach().view(-1) for name in self.names}

    def key(self, name: str, stored: Collection[str]) -> str:
        """Return the key of a stored tensor in a checkpoint with these keys."""
        if name == "param":  # a run in fp32 has stored no master beside the weight
            return _key_of_master(self.described.key, stored)
        return f"{_KEYS[name]}.{self.described.key}"

    def entry(self, name: str, whole: Tensor) -> ShardedBase:
        """Describe one of its stored tensors. Of several ranks that describe it, the one with replica 0 counts."""
        replica = 0 if self.is_sharded else self.rank
        described = replace(self.described, replica_id=(*self.described.replica_id[:-1], replica))
        return make_sharded_optimizer_tensor(described, whole.view(self.parameter.shape), _KEYS[name])


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
    for placed in _placed(optimizer, model):
        for name, whole in _collect(placed).items():
            entry = placed.entry(name, whole)
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
    every = _placed(optimizer, model)
    needed = [placed.key(name, stored) for placed in every for name in placed.names]
    agreement.together(lambda: _check_stored(needed, stored, checkpoint))
    wanted: _Sharded = {}
    for number, placed in enumerate(every):
        for name in placed.names if placed.rank == placed.owner or not placed.is_sharded else ():
            entry = placed.entry(name, torch.empty(placed.parameter.shape, dtype=torch.float32))
            entry.key = placed.key(name, stored)
            wanted[f"{number} {name}"] = entry
    loaded = dist_checkpointing.load({"wanted": wanted}, str(checkpoint))
    step = _stored_step(loaded["optimizer"], checkpoint)
    for number, placed in enumerate(every):
        for name in placed.names:
            _distribute(placed, name, loaded.get("wanted", {}).get(f"{number} {name}"))
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


def _placed(optimizer: ChainedOptimizer, model: _Sharded) -> list[_Placed]:
    """Return the parameters that train, in the same order and with the same owners on all data-parallel ranks."""
    described = {id(entry.data): entry for entry in model.values()}
    owned: Counter[int] = Counter()
    placed = []
    for member in optimizer.chained_optimizers:
        for parameter, shares in _divided(member, model):
            owner = _owner(shares, owned)
            owned[owner] += parameter.numel()
            placed.append(_Placed(member, parameter, shares, owner, described[id(parameter)]))
    return placed


def _divided(member: Any, model: _Sharded) -> Iterator[tuple[Tensor, tuple[_Share, ...]]]:
    """Yield the parameters of one optimizer, and who holds their state."""
    if isinstance(member, DistributedOptimizer):
        for buffer in getattr(member, "buffers", ()):  # there are none where nothing trains
            for parameter in buffer.param_index_map:
                yield parameter, _shares(buffer, parameter)
    else:
        mains = {id(main) for group in member.param_groups for main in group["params"]}
        for entry in model.values():
            if id(getattr(entry.data, "main_param", entry.data)) in mains:
                yield entry.data, (_Share(0, 0, entry.data.numel()),)


def _owner(shares: tuple[_Share, ...], owned: Counter[int]) -> int:
    """Choose, among the ranks that hold a large part, the one that owns least so far."""
    largest = max(share.size for share in shares)
    return min((share.rank for share in shares if 2 * share.size >= largest), key=lambda rank: (owned[rank], rank))


def _shares(buffer: Any, parameter: Tensor) -> tuple[_Share, ...]:
    """Return the ranges of a parameter on each data-parallel rank: a bucket is divided into equal parts."""
    start, end, bucket_id = buffer.param_index_map[parameter]
    bucket = buffer.buckets[bucket_id]
    part = bucket.grad_data.numel() // buffer.data_parallel_world_size
    first, last = start - bucket.offset, end - bucket.offset
    return tuple(
        _Share(rank, max(first, rank * part) - first, min(last, (rank + 1) * part) - first)
        for rank in range(first // part, (last - 1) // part + 1)
    )


def _collect(placed: _Placed) -> dict[str, Tensor]:
    """Return the flattened tensors of a parameter on its owner, and nothing on the other ranks."""
    own = placed.own_share
    if own is None or (not placed.is_sharded and placed.rank != placed.owner):
        return {}
    values = placed.values()
    if len(placed.shares) == 1:
        return values
    group, ranks = _group(placed)
    if placed.rank != placed.owner:
        for value in values.values():
            dist.send(value.cpu(), ranks[placed.owner], group=group)
        return {}
    whole = {name: torch.empty(placed.parameter.numel(), dtype=torch.float32) for name in values}
    for share in placed.shares:
        for name, value in values.items():
            place = whole[name][share.start : share.end]
            if share == own:
                place.copy_(value)
            else:
                dist.recv(place, ranks[share.rank], group=group)
    return whole


def _distribute(placed: _Placed, name: str, whole: Tensor | None) -> None:
    """Copy one tensor of a parameter from its owner, which has it whole, to all ranks that hold a share of it."""
    own = placed.own_share
    if own is None:
        return
    held = placed.values()[name]
    if whole is None:
        group, ranks = _group(placed)
        part = torch.empty(own.size, dtype=torch.float32)
        dist.recv(part, ranks[placed.owner], group=group)
        held.copy_(part)
        return
    for share in placed.shares:
        part = whole.flatten()[share.start : share.end]
        if share == own:
            held.copy_(part)
        else:
            group, ranks = _group(placed)
            dist.send(part, ranks[share.rank], group=group)


def _group(placed: _Placed) -> tuple[Any, list[int]]:
    """Return the data-parallel ranks as a group over gloo, and their numbers in the world."""
    group = placed.member.data_parallel_group_gloo
    return group, dist.get_process_group_ranks(group)


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


def _check_stored(keys: list[str], stored: Collection[str], checkpoint: Path) -> None:
    missing = sorted(key for key in keys if key not in stored)
    if missing:
        raise CheckpointError(
            f"{checkpoint}: holds no {missing[0]} ({len(missing)} such tensors of the optimizer): it was saved without "
            "an optimizer, or by a run in which these parameters were frozen. Freeze the same parts, or start from the "
            "weights alone, with --no-load-optim or --pretrained-checkpoint"
        )
