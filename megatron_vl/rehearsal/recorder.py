"""A process group that writes down what it is asked for, and answers at once.

The rehearsal starts ``torch.distributed`` with this backend. So everything that a rank exchanges is recorded where it
leaves the rank, whoever asks for it: Megatron-Core, torch or this project.

What a rank receives has no contents, with two exceptions, which :class:`Recorder` is told beforehand: the shape of the
message that comes next, which ``matching.py`` compares with what was sent, and objects that all ranks exchange.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from math import prod
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vl.rehearsal.records import Operation, Shape, Wait


@dataclass
class Recorder:
    """The program of one rank, while it grows."""

    shapes_from: Mapping[int, Iterable[Shape]] = field(default_factory=dict)
    """By global rank, the shapes of the messages that come from it."""
    objects: Sequence[bytes] = ()
    """What each other rank says in the exchanges of objects, in order."""
    said: list[bytes] = field(default_factory=list, init=False)
    """What this rank says there."""
    program: list[Operation | Wait] = field(default_factory=list, init=False)
    groups: dict[str, tuple[int, ...]] = field(default_factory=dict, init=False)
    """The global ranks of each group of which this rank is a member."""
    _told: dict[int, deque[Shape]] = field(default_factory=lambda: defaultdict(deque), init=False)

    def __post_init__(self) -> None:
        for peer, shapes in self.shapes_from.items():
            self._told[peer] = deque(shapes)

    def start(
        self, rank: int, world_size: int, *, group: type[RecordingGroup] | None = None, init_method: str | None = None
    ) -> None:
        """Start ``torch.distributed`` as this rank, with groups that write into this recorder.

        Args:
            group: the class of the groups.
            init_method: where the ranks meet, if there are others.
        """
        name, make = f"recorder_{uuid4().hex}", group or RecordingGroup  # torch keeps every backend under its name
        dist.Backend.register_backend(name, lambda about, _: make(about, self), extended_api=True, devices=["cpu"])
        store = None if init_method else dist.HashStore()
        dist.init_process_group(name, init_method=init_method, store=store, rank=rank, world_size=world_size)

    def note(self, operation: Operation) -> dist.Work:
        """Append an operation; return what the caller waits for."""
        self.program.append(operation)
        return _Done(self, len(self.program) - 1)

    def gather(self, own: Tensor, place: Tensor, *, mine: bool) -> None:
        """Fill the place of a rank in an all-gather: with the length of an object, or with the object."""
        place.copy_(own)
        if mine or own.dtype.is_floating_point or len(self.said) >= len(self.objects):
            return
        told = self.objects[len(self.said)]
        if own.dtype == torch.uint8:
            place[: len(told)] = torch.frombuffer(bytearray(told), dtype=torch.uint8)
        else:
            place.fill_(len(told))

    def next_shape(self, peer: int) -> Shape:
        """Return the shape that the next message of ``peer`` announces."""
        return self._told[peer].popleft() if self._told[peer] else (1, 1, 1)


class _Done(dist.Work):
    """An operation that is complete; waiting for it is noted."""

    def __init__(self, recorder: Recorder, step: int) -> None:
        super().__init__()
        self._recorder, self._step = recorder, step

    def wait(self, timeout: timedelta | None = None) -> bool:
        self._recorder.program.append(Wait(self._step))
        return True

    def is_completed(self) -> bool:
        return True


class RecordingGroup(dist.ProcessGroup):
    """One process group. torch and Megatron-Core call these methods, each in one of the forms that torch allows."""

    def __init__(self, about: Any, recorder: Recorder) -> None:
        super().__init__(about.group_rank, about.group_size)  # type: ignore[call-arg] # the other form has a store
        self._ranks = tuple(about.global_ranks_in_group) or tuple(range(about.group_size))
        self._rank, self._name, self._recorder = about.group_rank, about.group_id, recorder
        recorder.groups[self._name] = self._ranks

    def size(self) -> int:
        return len(self._ranks)

    def rank(self) -> int:
        return self._rank

    def getBackendName(self) -> str:  # noqa: N802 - torch's name
        return "recorder"

    def _collective(self, kind: str, tensors: Sequence[Tensor], times: int = 1, root: int | None = None) -> dist.Work:
        return self._recorder.note(operation(kind, self._name, tensors, times=times, peer=root))

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> dist.Work:  # type: ignore[override]
        return self._collective("all-reduce", tensors)

    def allreduce_coalesced(self, tensors: list[Tensor], opts: Any = None) -> dist.Work:
        return self._collective("all-reduce", tensors)

    def broadcast(self, tensors: list[Tensor], opts: Any) -> dist.Work:  # type: ignore[override]
        for tensor in tensors:
            if opts.rootRank != self._rank:
                tensor.zero_()  # it may be read
        return self._collective("broadcast", tensors, root=self._ranks[opts.rootRank])

    def allgather(  # type: ignore[override]
        self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None
    ) -> dist.Work:
        (places,), (own,) = outputs, inputs
        for rank, place in enumerate(places):
            self._recorder.gather(own, place, mine=rank == self._rank)
        if own.dtype == torch.uint8:
            self._recorder.said.append(own.numpy().tobytes())
        return self._collective("all-gather", inputs, times=self.size())

    def all_gather_single(self, output: Tensor, own: Tensor, opts: Any = None) -> dist.Work:
        return self._collective("all-gather", [own], times=self.size())

    def all_gather_single_coalesced(self, outputs: list[Tensor], own: list[Tensor], opts: Any = None) -> dist.Work:
        return self._collective("all-gather", own, times=self.size())

    def reduce_scatter_single(self, output: Tensor, source: Tensor, opts: Any = None) -> dist.Work:
        return self._collective("reduce-scatter", [source])

    def reduce_scatter_single_coalesced(
        self, outputs: list[Tensor], sources: list[Tensor], opts: Any = None
    ) -> dist.Work:
        return self._collective("reduce-scatter", sources)

    # Before torch 2.13 these four had other names.
    _allgather_base: Any = all_gather_single
    allgather_into_tensor_coalesced: Any = all_gather_single_coalesced
    _reduce_scatter_base: Any = reduce_scatter_single
    reduce_scatter_tensor_coalesced: Any = reduce_scatter_single_coalesced

    def barrier(self, opts: Any = None) -> dist.Work:
        return self._collective("barrier", [])

    def send(self, tensors: list[Tensor], peer: int, tag: int) -> dist.Work:
        return self._recorder.note(operation("send", self._name, tensors, peer=self._ranks[peer]))

    def recv(self, tensors: list[Tensor], peer: int, tag: int) -> dist.Work:
        source = self._ranks[peer]
        for tensor in tensors:
            if not tensor.dtype.is_floating_point:  # the shape of the message that follows
                tensor.copy_(torch.tensor(self._recorder.next_shape(source)))
        return self._recorder.note(operation("receive", self._name, tensors, peer=source))


def operation(
    kind: str, group: str, tensors: Sequence[Tensor], *, times: int = 1, peer: int | None = None
) -> Operation:
    """Return what is noted of a call; ``times``: the bytes of the whole in those of ``tensors``."""
    shapes = tuple(tuple(tensor.shape) for tensor in tensors)
    dtype = str(tensors[0].dtype).removeprefix("torch.") if tensors else "nothing"
    num_bytes = times * sum(prod(tensor.shape) * tensor.element_size() for tensor in tensors)
    return Operation(kind, group, shapes, dtype, num_bytes, peer)
