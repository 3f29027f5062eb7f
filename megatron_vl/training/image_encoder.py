"""Encode the images of a step on every rank of a model-parallel group (``vision_parallel data``).

Each rank holds vision tower and resampler whole. The images of a step are cut into equal shares, one for each tensor x
pipeline rank, whatever their number in each micro-batch:

    1. Before the schedule each rank encodes its share. The ranks of the first stage, which hold the word embedding,
       receive the features of all images.
    2. The schedule runs over the language model alone. Each micro-batch takes its features, and leaves their gradient.
    3. After the schedule the gradients return to the ranks that have encoded, and go backward through the vision part.

So the vision part has no tensor and no pipeline parallelism, and no stage waits for the images of another. Its
gradients are summed over all ranks once a step.

The backward pass of an image needs much memory (2.8 GB at 448 pixels in bf16), and here all images of a step would need
it at once. With ``vision_recompute``, step 1 keeps the features alone, and step 3 encodes again,
``vision_micro_batch_size`` images at a time. Or, with ``vision_recompute_granularity layers``, step 1 keeps the input
of each layer, and step 3 computes layers again. Either costs one more forward pass.

A first stage holds the features of all images of the step once. Those of a rank's share are released when the last of
them has been handed over, and the gradients when they have been sent back. A text-only micro-batch gets features that
fill no slot: its loss needs a graph even if the language model is frozen.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from megatron_vl.config.schema import RunConfig
from megatron_vl.data.loading.balance import image_shares
from megatron_vl.data.loading.batch import MicroBatch
from megatron_vl.model.qwen_vl import QwenVL
from megatron_vl.parallel.collectives import from_first_stage, meet, to_first_stage
from megatron_vl.parallel.topology import Topology
from megatron_vl.planning.vision_share import encodes_again

FORWARD, BACKWARD = "vision-forward-compute", "vision-backward-compute"
"""Names of the timers of what a rank computes for its share, without exchanges."""


class ImageEncoder:
    """The vision part of this rank."""

    def __init__(self, wrapped: DistributedDataParallel, config: RunConfig, topology: Topology) -> None:
        self.wrapped = wrapped
        self.topology = topology
        self._images_at_a_time = config.parallel.vision_micro_batch_size
        # A frozen tower keeps nothing, and the resampler behind it a twenty-fifth of what a trained tower keeps.
        self._encodes_again = encodes_again(config)
        meet(topology.mp_group)

    @property
    def chunk(self) -> QwenVL:
        """Vision tower and resampler."""
        chunk: QwenVL = self.wrapped.module
        return chunk

    @property
    def trains(self) -> bool:
        """Whether anything in the vision part trains."""
        return any(parameter.requires_grad for parameter in self.chunk.parameters())

    def encode(self, batches: Sequence[MicroBatch], *, forward_only: bool) -> EncodedStep:
        """Encode the images of a step; all ranks of the model-parallel group call it together.

        Args:
            batches: the micro-batches of this data-parallel rank, with the pixels of the images that this rank encodes.
        """
        if not forward_only:
            self.wrapped.set_is_first_microbatch()  # FP8 weights: no schedule runs this chunk (backends/fp8.py)
        topology, counts = self.topology, [int(batch.work.num_images) for batch in batches]
        backward = self.trains and not forward_only
        own = _OwnImages.of(batches, self.chunk, topology.device, size=self._images_at_a_time)
        kept: list[Tensor] = []
        with _timed(self.chunk, FORWARD):
            features = own.encode(kept if backward and not self._encodes_again else None)
        group = topology.mp_group
        shares = [image_shares(counts, rank=rank, size=group.size()) for rank in range(group.size())]
        totals = [sum(map(len, share)) for share in shares]
        assert totals[group.rank()] == own.number, "the loader and the encoder divide the images alike"
        blocks = deque(to_first_stage(features, totals, topology=topology))
        return EncodedStep(counts, totals, own, kept, backward=backward, topology=topology, blocks=blocks)

    def finish_gradients(self, num_tokens: int) -> None:
        """Sum the gradients over all ranks, and divide them by the supervised tokens of the global batch."""
        self.wrapped.finish_grad_sync()
        if num_tokens:
            self.wrapped.scale_gradients(1.0 / num_tokens)


@dataclass(frozen=True)
class _OwnImages:
    """The images of a step that this rank encodes, a few at a time."""

    parts: tuple[Tensor, ...]
    """uint8[m, 3, H, W] each, in the memory of the host: the images that are encoded together."""
    chunk: QwenVL
    device: torch.device

    @classmethod
    def of(cls, batches: Sequence[MicroBatch], chunk: QwenVL, device: torch.device, *, size: int) -> _OwnImages:
        pixels = [batch.pixels for batch in batches if batch.pixels is not None]
        assert len(pixels) == len(batches), "every rank reads pixels"
        whole = torch.cat(pixels)
        return cls(whole.split(size) if len(whole) else (), chunk, device)

    @property
    def number(self) -> int:
        return sum(map(len, self.parts))

    def encode(self, kept: list[Tensor] | None) -> Tensor:
        """Return [images, queries, h]. Append each part's features with their graph to ``kept``, if it is given."""
        features = self.empty(self.number)
        for part, place in zip(self.parts, features.split(list(map(len, self.parts))), strict=True):
            with torch.set_grad_enabled(kept is not None):
                output = self.see(part)
            if kept is not None:
                kept.append(output)
            place.copy_(output.detach())
        return features

    def see(self, part: Tensor) -> Tensor:
        """Encode one part; return [m, queries, h]."""
        return self.chunk.see(None, part.to(self.device)).transpose(0, 1)

    def empty(self, number: int) -> Tensor:
        """Return room for the features of so many images, [number, queries, h]."""
        assert self.chunk.resampler is not None
        query = self.chunk.resampler.query.detach()
        return query.new_empty(number, *query.shape)


@dataclass
class EncodedStep:
    """Features on their way to the micro-batches of a step, and gradients on their way back."""

    counts: Sequence[int]
    """The number of images of each micro-batch."""
    totals: Sequence[int]
    """The number of images that each rank of the model-parallel group has encoded."""
    own: _OwnImages
    kept: list[Tensor]
    """The features of the own images with their graph, by part; empty if they are encoded again."""
    backward: bool
    topology: Topology
    blocks: deque[Tensor]
    """On the first stage [n, queries, h] of each rank, what has not been handed over."""
    _gradients: dict[int, Tensor] = field(default_factory=dict, init=False)
    """[n, queries, h] of each micro-batch whose backward pass has ended."""

    def hand_over(self) -> Iterator[Tensor]:
        """Yield the features of each micro-batch, [queries, n, h]; on the first stage only."""
        anchor = torch.zeros((), device=self.topology.device, requires_grad=self.backward)
        for number, count in enumerate(self.counts):
            features = torch.cat([self.own.empty(0), *take(self.blocks, count)])
            yield _Handed.apply(anchor, features.transpose(0, 1).contiguous(), partial(self._keep, number))

    def _keep(self, number: int, gradient: Tensor) -> None:
        self._gradients[number] = gradient.transpose(0, 1)

    def go_backward(self) -> None:
        """Bring the gradients of the features to the ranks that have encoded them, and go backward there."""
        if not self.backward:
            return
        room = self.own.empty(0)
        blocks = None
        if self.topology.pp_rank == 0:
            left = deque(self._gradients.pop(number) for number, count in enumerate(self.counts) if count)
            blocks = (torch.cat([room, *take(left, total)]) for total in self.totals)
        own = from_first_stage(blocks, self.totals, like=room, topology=self.topology)
        with _timed(self.own.chunk, BACKWARD):
            for number, (part, gradient) in enumerate(zip(self.own.parts, self._by_part(own), strict=True)):
                output = self.kept[number] if self.kept else self.own.see(part)
                torch.autograd.backward(output, gradient)
        self.kept.clear()

    def _by_part(self, gradients: Tensor) -> Sequence[Tensor]:
        return gradients.split(list(map(len, self.own.parts)))


@contextmanager
def _timed(chunk: QwenVL, name: str) -> Iterator[None]:
    """Call Megatron-Core's timers, as its schedules do; a run has them while it is profiled."""
    timers = chunk.config.timers
    if timers is None:
        yield
        return
    timers(name).start()
    yield
    timers(name).stop()


def take(blocks: deque[Tensor], count: int) -> list[Tensor]:
    """Remove the first ``count`` entries along axis 0 from blocks in order, and return them in pieces.

    A block is dropped when its last entry has been taken.
    """
    pieces = []
    while count:
        block = blocks.popleft()
        pieces.append(block[:count])
        if len(block) > count:
            blocks.appendleft(block[count:])
        count -= len(pieces[-1])
    return pieces


class _Handed(torch.autograd.Function):
    """The identity on features; their gradient is kept instead of sent back.

    The features need no gradient themselves, so nothing holds them after their last use in the forward pass.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, features: Tensor, keep: Callable[[Tensor], None]) -> Tensor:
        """Return the features; ``anchor`` alone decides whether they are part of a graph."""
        ctx.keep = keep
        return features.view_as(features)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:
        """Keep the gradient of the features."""
        ctx.keep(gradients[0])
        return None, None, None
