"""Move micro-batches to the device: each one when it is due, while the next is copied ahead.

The first rank of a tensor-parallel group has read a step and holds it on the CPU. The other ranks know its shapes and
types (``share_outlines``). When a micro-batch is due, its tensors travel as one buffer of bytes. The reader copies it
from pinned memory to its device, on a separate stream while the previous micro-batch is computed. Then one broadcast
sends it to the group. So a device holds the pixels of two micro-batches and not those of a whole step. The group only
exchanges device tensors, which is all that NCCL can send.

The ranks of a group run one schedule, so all request the same micro-batch at the same place among their collectives.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vl.data.loading.batch import MicroBatch
from megatron_vl.parallel.collectives import tensors_of, with_tensors
from megatron_vl.parallel.topology import Topology

_ALIGNMENT = 256
"""Each tensor's offset in a buffer is a multiple of so many bytes, as in torch's own allocator."""


@dataclass(frozen=True)
class _Places:
    """The offsets of the tensors of a micro-batch in its buffer; the same on every rank, as is the outline."""

    begins: dict[str, int]
    size: int

    @classmethod
    def of(cls, batch: MicroBatch) -> _Places:
        begins, end = {}, 0
        for name, tensor in tensors_of(batch).items():
            begins[name] = end
            end += math.ceil(tensor.nbytes / _ALIGNMENT) * _ALIGNMENT
        return cls(begins, end)

    def views(self, buffer: Tensor, batch: MicroBatch) -> dict[str, Tensor]:
        """Return the tensors of ``batch`` as views of a buffer uint8[bytes], by name."""
        return {
            name: buffer[begin : begin + outline.nbytes].view(outline.dtype).view(outline.shape)
            for (name, outline), begin in zip(tensors_of(batch).items(), self.begins.values(), strict=True)
        }


def pack(batch: MicroBatch, *, pinned: bool) -> Tensor:
    """Return uint8[bytes]: all tensors of a micro-batch on the CPU."""
    places = _Places.of(batch)
    buffer = torch.empty(places.size, dtype=torch.uint8, pin_memory=pinned)
    for name, view in places.views(buffer, batch).items():
        view.copy_(getattr(batch, name))
    return buffer


def unpack(buffer: Tensor, outline: MicroBatch) -> MicroBatch:
    """Return the micro-batch whose tensors are views of a buffer uint8[bytes] that :func:`pack` has filled."""
    return with_tensors(outline, _Places.of(outline).views(buffer, outline))


@functools.cache
def _copies(device: torch.device) -> torch.cuda.Stream:
    """Return the stream for copies to a device. There is only one, since each stream keeps memory of its own."""
    return torch.cuda.Stream(device)


@dataclass
class Arrivals:
    """The micro-batches of a step, moved to this rank's device when they are taken.

    Every chunk of the rank iterates over them once. A micro-batch is dropped when the last chunk has taken it.
    """

    batches: Sequence[MicroBatch]
    """The micro-batches on the reader, their outlines on other ranks."""
    topology: Topology
    takers: int = 1
    """Number of chunks of this rank."""
    _here: dict[int, MicroBatch] = field(default_factory=dict, init=False)
    _taken: dict[int, int] = field(default_factory=dict, init=False)
    _ahead: dict[int, Tensor] = field(default_factory=dict, init=False)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[MicroBatch]:
        for number in range(len(self.batches)):
            yield self._take(number)

    def _take(self, number: int) -> MicroBatch:
        if number not in self._here:
            self._here[number] = self._bring(number)
        self._taken[number] = self._taken.get(number, 0) + 1
        return self._here.pop(number) if self._taken[number] == self.takers else self._here[number]

    def _bring(self, number: int) -> MicroBatch:
        topology, batch = self.topology, self.batches[number]
        if topology.tp_size == 1 and topology.device.type == "cpu":
            return batch
        buffer = self._ahead.pop(number, None)
        if buffer is None:
            buffer = self._start(number)
        self._await(buffer)
        if number + 1 < len(self.batches):
            self._ahead[number + 1] = self._start(number + 1)
        if topology.tp_size > 1:
            dist.broadcast(buffer, src=topology.tp_source, group=topology.tp_group)
        return unpack(buffer, batch)

    def _start(self, number: int) -> Tensor:
        """Return the buffer of a micro-batch: being filled on the reader, empty on other ranks."""
        batch, device = self.batches[number], self.topology.device
        if self.topology.tp_rank != 0:
            return torch.empty(_Places.of(batch).size, dtype=torch.uint8, device=device)
        packed = pack(batch, pinned=device.type == "cuda")
        if device.type == "cpu":
            return packed
        with torch.cuda.stream(_copies(device)):
            return packed.to(device, non_blocking=True)

    def _await(self, buffer: Tensor) -> None:
        """Let later computation wait for the buffer, and keep its memory from reuse until that computation ends."""
        if self.topology.device.type != "cpu" and self.topology.tp_rank == 0:
            torch.cuda.current_stream().wait_stream(_copies(self.topology.device))
            buffer.record_stream(torch.cuda.current_stream())
