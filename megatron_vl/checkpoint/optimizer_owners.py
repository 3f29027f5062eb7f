"""Who stores the optimizer's state of a parameter, and how it gets there.

Megatron-Core's sharded optimizer concatenates parameters, and gives each data-parallel rank a range of them. One of the
ranks that hold a large part of a parameter is its owner. The owner stores and loads the whole parameter. The other
ranks send it their parts, or receive them from it, over gloo. Owners are chosen so that all ranks own about the same
amount. Hence a save and a load divide their work among the data-parallel ranks, and need host memory for a rank's own
amount only. Megatron-Core's own way gathers the state of all ranks on one of them, which took 26 to 36 bytes a
parameter there.

Without the sharded optimizer, all data-parallel ranks hold everything. The first one stores it, and each loads it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedBase
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

STATE_NAMES = ("param", "exp_avg", "exp_avg_sq")
"""What the optimizer keeps of a parameter, by the names of Megatron-Core's sharded optimizer: master and moments."""


@dataclass(frozen=True)
class Share:
    """The range of a flattened parameter whose state one data-parallel rank holds."""

    rank: int
    start: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Placed:
    """A parameter that trains, and who holds its state."""

    member: Any
    """The optimizer of Megatron-Core that updates it."""
    parameter: Tensor
    shares: tuple[Share, ...]
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
    def is_loaded_here(self) -> bool:
        """Whether this rank reads it from a checkpoint."""
        return self.rank == self.owner or not self.is_sharded

    @property
    def own_share(self) -> Share | None:
        """What this rank holds of it."""
        held = [share for share in self.shares if share.rank == self.rank or not self.is_sharded]
        return held[0] if held else None

    def values(self) -> Mapping[str, Tensor]:
        """Return this rank's share of the tensors of ``STATE_NAMES``, flattened."""
        share = self.own_share
        assert share is not None
        if self.is_sharded:
            held = self.member._get_main_param_and_optimizer_states(self.parameter)
        else:
            main = getattr(self.parameter, "main_param", self.parameter)
            held = {"param": main, **self.member.optimizer.state[main]}
        assert all(held[name].numel() == share.size for name in STATE_NAMES)
        return {name: held[name].detach().view(-1) for name in STATE_NAMES}

    def group(self) -> tuple[Any, list[int]]:
        """Return the data-parallel ranks as a group over gloo, and their numbers in the world."""
        group = self.member.data_parallel_group_gloo
        return group, dist.get_process_group_ranks(group)


def place(optimizer: ChainedOptimizer, model: Mapping[str, Any]) -> list[Placed]:
    """Return the parameters that train, in the same order and with the same owners on all data-parallel ranks.

    Args:
        model: the sharded state of this rank's chunks.
    """
    described = {id(entry.data): entry for entry in model.values()}
    placed = []
    for member in optimizer.chained_optimizers:
        owned: Counter[int] = Counter()  # of this member: the ranks that must agree are those of its own group
        for parameter, shares in _divided(member, model):
            owner = _owner(shares, owned)
            owned[owner] += parameter.numel()
            placed.append(Placed(member, parameter, shares, owner, described[id(parameter)]))
    return placed


def collect(placed: Placed, name: str) -> Tensor | None:
    """Return one flattened tensor of a parameter on its owner, and None on the other ranks."""
    own = placed.own_share
    if own is None or (not placed.is_sharded and placed.rank != placed.owner):
        return None
    value = placed.values()[name]
    if len(placed.shares) == 1:
        return value
    group, ranks = placed.group()
    if placed.rank != placed.owner:
        dist.send(value.cpu(), ranks[placed.owner], group=group)
        return None
    whole = torch.empty(placed.parameter.numel(), dtype=torch.float32)
    for share in placed.shares:
        part = whole[share.start : share.end]
        if share == own:
            part.copy_(value)
        else:
            dist.recv(part, ranks[share.rank], group=group)
    return whole


def distribute(placed: Placed, name: str, whole: Tensor | None) -> None:
    """Copy one tensor of a parameter into the optimizer of each rank that holds a share of it.

    Args:
        whole: on the ranks that have loaded it.
    """
    own = placed.own_share
    if own is None:
        return
    held = placed.values()[name]
    if whole is None:
        group, ranks = placed.group()
        part = torch.empty(own.size, dtype=torch.float32)
        dist.recv(part, ranks[placed.owner], group=group)
        held.copy_(part)
        return
    for share in placed.shares:
        part = whole.flatten()[share.start : share.end]
        if share == own:
            held.copy_(part)
        else:
            group, ranks = placed.group()
            dist.send(part, ranks[share.rank], group=group)


def _divided(member: Any, model: Mapping[str, Any]) -> Iterator[tuple[Tensor, tuple[Share, ...]]]:
    """Yield the parameters of one optimizer, and who holds their state."""
    if isinstance(member, DistributedOptimizer):
        for buffer in getattr(member, "buffers", ()):  # there are none where nothing trains
            for parameter in buffer.param_index_map:
                yield parameter, _shares(buffer, parameter)
    else:
        mains = {id(main) for group in member.param_groups for main in group["params"]}
        for entry in model.values():
            if id(getattr(entry.data, "main_param", entry.data)) in mains:
                yield entry.data, (Share(0, 0, entry.data.numel()),)


def _shares(buffer: Any, parameter: Tensor) -> tuple[Share, ...]:
    """Return the ranges of a parameter on each data-parallel rank: a bucket is divided into equal parts."""
    start, end, bucket_id = buffer.param_index_map[parameter]
    bucket = buffer.buckets[bucket_id]
    part = bucket.grad_data.numel() // buffer.data_parallel_world_size
    first, last = start - bucket.offset, end - bucket.offset
    return tuple(
        Share(rank, max(first, rank * part) - first, min(last, (rank + 1) * part) - first)
        for rank in range(first // part, (last - 1) // part + 1)
    )


def _owner(shares: tuple[Share, ...], owned: Counter[int]) -> int:
    """Choose, among the ranks that hold a large part, the one that owns least so far."""
    largest = max(share.size for share in shares)
    return min((share.rank for share in shares if 2 * share.size >= largest), key=lambda rank: (owned[rank], rank))
