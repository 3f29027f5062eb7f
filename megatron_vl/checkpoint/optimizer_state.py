"""The optimizer's part of a checkpoint, the same for each of Megatron-Core's optimizers.

For each parameter X that trains there are the tensors

    optimizer.state.exp_avg.X, optimizer.state.exp_avg_sq.X   its moments
    optimizer.state.fp32_param.X                              its master weight, where X itself is not fp32

in the shape of X, and for all of them together the number of updates. Learning rates, betas, epsilon and weight decay
are not stored. They come from the configuration of the run.

The sharded optimizer concatenates all parameters, and gives each data-parallel rank a range of them. So each rank holds
most parameters whole or not at all. A parameter is stored by the rank that holds most of it, and the ranks that hold
the rest send it their values over gloo. A rank loads the parameters of which it holds anything. Hence a save and a load
divide their work among the data-parallel ranks, and need host memory for a rank's own share only. Megatron-Core's own
way gathers the state of all ranks on one of them, which took 26 to 36 bytes a parameter there.
"""

from __future__ import annotations

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
    described: ShardedBase
    """What is stored of its weight."""

    @property
    def stored_by(self) -> int:
        """The data-parallel rank that stores it: the one that holds most of it."""
        return max(self.shares, key=lambda share: share.size).rank

    @property
    def names(self) -> list[str]:
        """The names of its stored tensors; an fp32 weight is its own master."""
        return [name for name in _KEYS if name != "param" or not _is_fp32(self.described)]

    def values(self) -> dict[str, Tensor]:
        """Return what this rank holds, flattened."""
        if isinstance(self.member, DistributedOptimizer):
            held = self.member._get_main_param_and_optimizer_states(self.parameter)
        else:
            main = getattr(self.parameter, "main_param", self.parameter)
            held = {"param": main, **self.member.optimizer.state[main]}
        return {name: held[name].detach().view(-1) for name in self.names}

    def entry(self, name: str, whole: Tensor, *, replica: int) -> ShardedBase:
        """Describe one of its stored tensors; of several ranks that describe it, the one with replica 0 counts."""
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
        for name, whole in _whole_values(placed).items():
            entry = placed.entry(name, whole, replica=0)
            state[entry.key] = entry
    return {"state": state, "param_groups": [{"step": step}]}


def load(optimizer: ChainedOptimizer, model: _Sharded, checkpoint: Path) -> None:
    """Load moments, masters and the step of a checkpoint into an optimizer of any kind.

    Args:
        model: the sharded state of this rank's chunks.

    Raises:
        CheckpointError: if the checkpoint lacks the state of a parameter that trains.
    """
    stored = dist_checkpointing.load_tensors_metadata(str(checkpoint)).keys()
    _make_ready(optimizer, 0)
    here = [(placed, *own) for placed in _placed(optimizer, model) if (own := _own_share(placed)) is not None]
    wanted: _Sharded = {}
    for number, (placed, _, replica) in enumerate(here):
        for name in placed.names:
            entry = placed.entry(name, torch.empty(placed.parameter.shape, dtype=torch.float32), replica=replica)
            if name == "param":  # a run in fp32 has stored no master beside the weight
                entry.key = _key_of_master(placed.described.key, stored)
            wanted[f"{number} {name}"] = entry
    _check_stored([entry.key for entry in wanted.values()], stored, checkpoint)
    loaded = dist_checkpointing.load({"wanted": wanted}, str(checkpoint))
    for number, (placed, share, _) in enumerate(here):
        for name, held in placed.values().items():
            held.copy_(loaded["wanted"][f"{number} {name}"].flatten()[share.start : share.end])
    _make_ready(optimizer, _stored_step(loaded["optimizer"], checkpoint))


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


def _placed(optimizer: ChainedOptimizer, model: _Sharded) -> Iterator[_Placed]:
    """Yield the parameters that train, in the same order on all data-parallel ranks."""
    described = {id(entry.data): entry for entry in model.values()}
    for member in optimizer.chained_optimizers:
        for buffer in member.buffers if isinstance(member, DistributedOptimizer) else ():
            for parameter in buffer.param_index_map:
                yield _Placed(member, parameter, _shares(buffer, parameter), described[id(parameter)])
        if not isinstance(member, DistributedOptimizer):
            mains = {id(main) for group in member.param_groups for main in group["params"]}
            for entry in model.values():
                if id(getattr(entry.data, "main_param", entry.data)) in mains:
                    yield _Placed(member, entry.data, (_Share(0, 0, entry.data.numel()),), entry)


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


def _own_share(placed: _Placed) -> tuple[_Share, int] | None:
    """Return this rank's share and its number among the shares, or None if it holds nothing."""
    if not isinstance(placed.member, DistributedOptimizer):
        return placed.shares[0], _data_parallel_rank(placed)
    own = [(share, number) for number, share in enumerate(placed.shares) if share.rank == _data_parallel_rank(placed)]
    return own[0] if own else None


def _data_parallel_rank(placed: _Placed) -> int:
    """Return this rank's number among those that hold the same part of the model."""
    return int(placed.described.replica_id[-1])


def _whole_values(placed: _Placed) -> dict[str, Tensor]:
    """Return the flattened tensors of a parameter on the rank that stores it, and nothing on the other ranks."""
    own = _own_share(placed)
    owner = placed.stored_by
    if own is None or (len(placed.shares) == 1 and owner != _data_parallel_rank(placed)):
        return {}
    values = placed.values()
    if len(placed.shares) == 1:
        return values
    group = placed.member.data_parallel_group_gloo
    ranks = dist.get_process_group_ranks(group)
    if owner != own[0].rank:
        for value in values.values():
            dist.send(value.cpu(), ranks[owner], group=group)
        return {}
    whole = {name: torch.empty(placed.parameter.numel(), dtype=torch.float32) for name in values}
    for share in placed.shares:
        for name, value in values.items():
            place = whole[name][share.start : share.end]
            if share == own[0]:
                place.copy_(value)
            else:
                dist.recv(place, ranks[share.rank], group=group)
    return whole


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
