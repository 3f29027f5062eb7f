"""The few exchanges between ranks that Megatron-Core does not make for us."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_vl.data.loading.batch import MicroBatch
from megatron_vl.parallel.topology import Topology

Key = TypeVar("Key", bound=Hashable)


def share_outlines(batches: Sequence[MicroBatch] | None, *, topology: Topology) -> list[MicroBatch] | None:
    """Tell the ranks of each tensor-parallel group what its first rank has read for a step.

    The other ranks get the same micro-batches with tensors that have a shape and a type but no contents. The contents
    follow when a micro-batch is due (``parallel/arrival.py``).

    Args:
        batches: the micro-batches of one step, or None at the end of the data; ignored on the other ranks.
    """
    if topology.tp_size == 1:
        return None if batches is None else list(batches)
    outlines = [None if batches is None else [_outline(batch) for batch in batches]]
    dist.broadcast_object_list(outlines, src=topology.tp_source, group=topology.tp_group, device=topology.device)
    if outlines[0] is None:
        return None
    return list(batches or []) if topology.tp_rank == 0 else outlines[0]


def _outline(batch: MicroBatch) -> MicroBatch:
    return with_tensors(batch, {name: value.to("meta") for name, value in tensors_of(batch).items()})


def tensors_of(batch: MicroBatch) -> dict[str, torch.Tensor]:
    """Return the fields of a micro-batch that are tensors, in order."""
    values = {item.name: getattr(batch, item.name) for item in fields(batch)}
    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


def with_tensors(batch: MicroBatch, tensors: dict[str, torch.Tensor]) -> MicroBatch:
    """Return the batch with other tensors under the same names."""
    replaced: dict[str, Any] = dict(tensors)
    return replace(batch, **replaced)


def from_last_stage(values: torch.Tensor, *, topology: Topology) -> torch.Tensor:
    """Broadcast a tensor of known shape from the last pipeline stage to all stages, in place."""
    if topology.pp_size > 1:
        dist.broadcast(values, src=topology.pp_last, group=topology.pp_group)
    return values


def from_head(values: torch.Tensor, *, topology: Topology) -> torch.Tensor:
    """Broadcast a tensor of known shape from the first rank of the last stage to all ranks of its replica, in place."""
    if topology.tp_size > 1 and topology.on_last_stage:
        dist.broadcast(values, src=topology.tp_source, group=topology.tp_group)
    return from_last_stage(values, topology=topology)


def first_of_replica(found: dict[int, str], *, topology: Topology) -> dict[int, str]:
    """Return what the ranks of a replica have found, by key; of several findings that of the lowest rank."""
    size = topology.mp_group.size()
    if size == 1:
        return found
    gathered = [found] * size
    dist.all_gather_object(gathered, found, group=topology.mp_group)
    return {key: text for own in reversed(gathered) for key, text in own.items()}


def sum_over_data_parallel(values: torch.Tensor, *, topology: Topology) -> torch.Tensor:
    """Sum a tensor over data-parallel ranks, in place."""
    if topology.dp_size > 1:
        dist.all_reduce(values, group=topology.dp_group)
    return values


def max_over_world(value: float, *, device: torch.device) -> float:
    """Return the largest value of any rank."""
    tensor = torch.tensor([value], dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return float(tensor.item())


def send(tensor: torch.Tensor, stage: int, *, topology: Topology) -> None:
    """Send a three-dimensional tensor, shape first, to the same rank of another pipeline stage."""
    peer = dist.get_process_group_ranks(topology.pp_group)[stage]
    dist.send(torch.tensor(tensor.shape, dtype=torch.int64, device=tensor.device), peer, group=topology.pp_group)
    dist.send(tensor.contiguous(), peer, group=topology.pp_group)


def receive(stage: int, *, dtype: torch.dtype, topology: Topology) -> torch.Tensor:
    """Receive what :func:`send` sends from another pipeline stage."""
    peer = dist.get_process_group_ranks(topology.pp_group)[stage]
    shape = torch.empty(3, dtype=torch.int64, device=topology.device)
    dist.recv(shape, peer, group=topology.pp_group)
    tensor = torch.empty(shape.tolist(), dtype=dtype, device=topology.device)
    dist.recv(tensor, peer, group=topology.pp_group)
    return tensor


def meet(group: dist.ProcessGroup) -> None:
    """Let the ranks of a group meet. NCCL needs it before the first messages in which not all of them take part."""
    if group.size() > 1:
        dist.barrier(group=group)


def to_first_stage(own: torch.Tensor, sizes: Sequence[int], *, topology: Topology) -> list[torch.Tensor]:
    """Bring blocks from all ranks of a model-parallel group to each rank of its first stage.

    Args:
        own: [n, ...], the block of this rank.
        sizes: the n of each rank of the group.

    Returns:
        On the first stage the blocks in the order of ranks, each with a memory of its own; elsewhere nothing.
    """
    me, first = topology.mp_group.rank(), range(topology.tp_size)
    messages = [_message(dist.isend, own, peer, topology) for peer in first if peer != me and len(own)]
    blocks = []
    if me in first:
        blocks = [own if peer == me else own.new_empty(size, *own.shape[1:]) for peer, size in enumerate(sizes)]
        messages += [
            _message(dist.irecv, block, peer, topology)
            for peer, block in enumerate(blocks)
            if peer != me and len(block)
        ]
    _exchange(messages)
    return blocks


def from_first_stage(
    blocks: Iterator[torch.Tensor] | None, sizes: Sequence[int], *, like: torch.Tensor, topology: Topology
) -> torch.Tensor:
    """Return to each rank of a model-parallel group its block [n, ...] of those that the first stage holds.

    All ranks of the first stage hold the same, so each sends to those of its own tensor-parallel rank.

    Args:
        blocks: on the first stage, the blocks in the order of ranks; each is dropped when it has been sent. None
            elsewhere.
        like: gives type, device and shape of a block, except for its length.
    """
    me, width = topology.mp_group.rank(), topology.tp_size
    own = like.new_empty(sizes[me] if blocks is None else 0, *like.shape[1:])
    if blocks is None and len(own):
        _exchange([_message(dist.irecv, own, me % width, topology)])
    for peer, block in enumerate(blocks or ()):
        if peer == me:
            own = block
        elif peer % width == me and len(block):
            _exchange([_message(dist.isend, block, peer, topology)])
    return own


def _message(kind: Callable[..., Any], tensor: torch.Tensor, peer: int, topology: Topology) -> dist.P2POp:
    group = topology.mp_group
    return dist.P2POp(kind, tensor, dist.get_process_group_ranks(group)[peer], group)


def _exchange(messages: list[dist.P2POp]) -> None:
    for request in dist.batch_isend_irecv(messages) if messages else ():
        request.wait()


def to_rank_0(pieces: Mapping[Key, torch.Tensor], *, topology: Topology) -> Iterator[tuple[Key, torch.Tensor]]:
    """Bring tensors on the CPU from the ranks that hold them to rank 0, one at a time.

    If several ranks hold a key, the lowest rank sends it. Every rank must exhaust the iterator. It yields on rank 0
    only.
    """
    held: list[dict[Key, torch.Tensor]] = [{} for _ in range(topology.world_size)]
    dist.all_gather_object(held, {key: piece.to("meta") for key, piece in pieces.items()})
    owners = {key: rank for rank in reversed(range(len(held))) for key in held[rank]}
    for key, rank in owners.items():
        if topology.rank == rank != 0:
            dist.send(pieces[key].to(topology.device).contiguous(), 0)
        elif rank == 0 == topology.rank:
            yield key, pieces[key]
        elif topology.rank == 0:
            outline = held[rank][key]
            piece = torch.empty(outline.shape, dtype=outline.dtype, device=topology.device)
            dist.recv(piece, rank)
            yield key, piece.cpu()
