"""Compare what ranks were found to hold and send with what ``planning/`` says of them.

Compared exactly are parameters, the bytes of the messages between stages, the collectives of tensor parallelism, the
features and their gradients of ``vision_parallel data``, and what data-parallel ranks reduce and gather. The buffers of
Megatron-Core are larger than the parameters by their padding, which the plan does not know and is told here. The plan
does not count two small things of a tensor-parallel group, which are shown and not compared: how a micro-batch comes to
its ranks, and the sum of the gradients of norms under sequence parallelism.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_vl.planning.activations import Keeping
from megatron_vl.planning.flops import Work
from megatron_vl.planning.gpus import find_gpu
from megatron_vl.planning.memory import Layout
from megatron_vl.planning.parameters import parameters_by_rank
from megatron_vl.planning.stage_cost import UnitCosts
from megatron_vl.planning.traffic import DataGroup, data_traffic, stage_messages
from megatron_vl.planning.vision_share import VisionShare
from megatron_vl.rehearsal.places import Grid, Place
from megatron_vl.rehearsal.records import Operation, Rehearsed
from megatron_vl.rehearsal.step import Step

_TOLERANCE = 1e-9
"""Rounding of the plan's fractions."""


@dataclass(frozen=True)
class Comparison:
    """One number of the plan, and what was found."""

    what: str
    planned: float
    found: float

    @property
    def agrees(self) -> bool:
        return abs(self.planned - self.found) <= _TOLERANCE * max(1.0, abs(self.planned))

    def __str__(self) -> str:
        return f"{self.what}: planned {self.planned:,.0f}, found {self.found:,.0f}"


@dataclass(frozen=True)
class Comparer:
    """Compares the ranks of one rehearsal."""

    step: Step
    grid: Grid

    def compare(self, one: Rehearsed) -> Iterator[Comparison]:
        """Yield every number that is compared of a rank; ``one.place`` says which micro-batches it had."""
        yield from self._parameters(one)
        yield from self._messages(one)
        yield from self._data(one)
        yield from self._tensor(one)
        if self.step.config.parallel.vision_parallel == "data":
            yield from self._features(one)

    def _parameters(self, one: Rehearsed) -> Iterator[Comparison]:
        plans = parameters_by_rank(self.step.config, self.step.layout)
        place = one.place
        planned = next(
            plan for plan in plans if (plan.pipeline_rank, plan.tensor_rank) == (place.pipeline, place.tensor)
        )
        yield Comparison(f"rank {one.rank}: parameters that train", planned.trained, one.held.trained)
        yield Comparison(f"rank {one.rank}: frozen parameters", planned.frozen, one.held.frozen)

    def _messages(self, one: Rehearsed) -> Iterator[Comparison]:
        layout = self.step.layout
        if layout.pipeline_size == 1:
            return
        works = [Work(max(count, 1)) for count in self.step.images]  # text alone brings a blank image
        planned = [stage_messages(self.step.config, layout, one.place.pipeline, work) for work in works]
        sent = [message for message in self.step.stage_messages(one.program) if message.kind == "send"]
        for peer in range(layout.pipeline_size):
            rank = self.grid.rank(Place(one.place.data, peer, one.place.tensor))
            found = sum(message.num_bytes for message in sent if message.peer == rank)
            expected = sum(messages[peer] for messages in planned)
            yield Comparison(f"rank {one.rank}: bytes to pipeline rank {peer}", expected, found)

    def _data(self, one: Rehearsed) -> Iterator[Comparison]:
        """Compare what is reduced and gathered over replicas, and over all ranks for a vision part that all hold."""
        config, gpu = self.step.config, find_gpu("h100")  # the kind decides times alone
        every = Layout.of(config, self.step.layout).everywhere
        planned = 0.0
        for size, elements in (
            (self.grid.data, one.held.trained - every + one.held.padding),
            (self.grid.world_size, every + one.held.vision_padding),
        ):
            traffic = data_traffic(config, elements, gpu, DataGroup((size,)))
            planned += traffic.reduce.nvlink + traffic.gather.nvlink
        found = sum(_moved(step, len(one.groups[step.group])) for step in _of_buffers(one))
        yield Comparison(f"rank {one.rank}: bytes of gradients and weights to other replicas", planned, found)

    def _tensor(self, one: Rehearsed) -> Iterator[Comparison]:
        """Compare what the layers, the embeddings, the resampler and the head exchange in a tensor-parallel group."""
        config, layout, size = self.step.config, self.step.layout, self.grid.tensor
        if size == 1:
            return
        planned = 0.0
        for number, images in enumerate(self.step.images):
            work = Work(max(images, 1), self.step.num_tokens, 0.0, self.step.num_supervised(number))
            units = UnitCosts.of(config, work, Keeping.of(config))
            for stage in layout.stages_of_rank(one.place.pipeline):
                planned += units.stage(stage, trained=0.0).gathered
        group = tuple(self.grid.rank(replace(one.place, tensor=tensor)) for tensor in range(size))
        left_out = {((one.held.norms,),), ((1,),)}  # the second is the norm of all gradients
        buffers = set(map(id, _of_buffers(one)))
        found = sum(
            _moved(step, size)
            for step in _collectives(one)
            if one.groups[step.group] == group and id(step) not in buffers and step.shapes not in left_out
        )
        yield Comparison(f"rank {one.rank}: bytes of tensor parallelism", planned, found)

    def _features(self, one: Rehearsed) -> Iterator[Comparison]:
        """Compare the features that ranks of the first stage receive, and those and the gradients that they send.

        Each of these ranks needs the features of all images, and has those of its own. Gradients are the same on all
        ranks of that stage. Each rank sends them to those of the other stages whose number in the tensor-parallel group
        is its own.
        """
        total, tensor = sum(self.step.images), self.grid.tensor
        if one.place.pipeline > 0 or total == 0:
            return
        share = VisionShare.of(self.step.config, Work(total, 0, 0.0, 0), 1, 1.0)
        assert share is not None
        size = tensor * self.grid.pipeline
        encoded = [(rank + 1) * total // size - rank * total // size for rank in range(size)]
        own = encoded[one.place.tensor]
        returned = sum(encoded[one.place.tensor + tensor :: tensor]) if share.exchanged_bytes[1] else 0
        sent = own * (tensor - 1) + returned  # its features to the others of the first stage, and gradients
        for kind, images in (("receive", total - own), ("send", sent)):
            messages = [message for message in self.step.feature_messages(one.program) if message.kind == kind]
            found = sum(message.num_bytes for message in messages)
            planned = share.feature_bytes * images / total
            yield Comparison(f"rank {one.rank}: bytes of features or their gradients to {kind}", planned, found)


def _collectives(one: Rehearsed) -> Iterator[Operation]:
    """Yield the reductions and gatherings of the step among several ranks."""
    for step in one.program[one.start :]:
        reduces = isinstance(step, Operation) and step.kind in ("all-reduce", "reduce-scatter", "all-gather")
        if isinstance(step, Operation) and reduces and len(one.groups[step.group]) > 1:
            yield step


def _of_buffers(one: Rehearsed) -> Iterator[Operation]:
    """Yield the collectives over buffers of gradients and weights, by their sizes."""
    for step in _collectives(one):
        times = len(one.groups[step.group]) if step.kind == "all-gather" else 1
        if all(len(shape) == 1 and times * shape[0] in one.held.buckets for shape in step.shapes):
            yield step


def _moved(step: Operation, size: int) -> float:
    """Return the bytes that a GPU sends in a ring."""
    return step.num_bytes * (2 if step.kind == "all-reduce" else 1) * (size - 1) / size
