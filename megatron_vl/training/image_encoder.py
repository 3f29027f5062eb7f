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
``vision_micro_batch_size`` images at a time. That costs one more forward pass.

Features and gradients are released as they are used. A text-only micro-batch gets features that fill no slot: its loss
needs a graph even if the language model is frozen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
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


class ImageEncoder:
    """The vision part of this rank."""

    def __init__(self, wrapped: DistributedDataParallel, config: RunConfig, topology: Topology) -> None:
        self.wrapped = wrapped
        self.topology = topology
        self._images_at_a_time = config.parallel.vision_micro_batch_size
        # What a resampler behind a frozen tower keeps is small, and the tower itself keeps nothing.
        self._recompute = config.parallel.vision_recompute and not config.training.freeze_vision
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
        topology, counts = self.topology, [int(batch.work.num_images) for batch in batches]
        backward = self.trains and not forward_only
        own = _OwnImages.of(batches, self.chunk, topology.device, size=self._images_at_a_time)
        kept = own.encode() if backward and not self._recompute else []
        features = [output.detach() for output in kept] if kept else own.encode_without_graph()
        group = topology.mp_group
        shares = [image_shares(counts, rank=rank, size=group.size()) for rank in range(group.size())]
        totals = [sum(map(len, share)) for share in shares]
        assert totals[group.rank()] == own.number, "the loader and the encoder divide the images alike"
        every = to_first_stage(_joined(features, own.empty()), totals, topology=topology)
        return EncodedStep(counts, totals, own, kept, backward=backward, topology=topology, every=every)

    def finish_gradients(self, num_tokens: int) -> None:
        """Sum the gradients over all ranks, and divide them by the supervised tokens of the global batch."""
        self.wrapped.finish_grad_sync()
        if num_tokens:
            self.wrapped.scale_gradients(1.0 / num_tokens)


@dataclass(frozen=True)
class _OwnImages:
    """The images of a step that this rank encodes, a few at a time."""

    pixels: Tensor
    """uint8[n, 3, H, W] on the device."""
    chunk: QwenVL
    size: int

    @classmethod
    def of(cls, batches: Sequence[MicroBatch], chunk: QwenVL, device: torch.device, *, size: int) -> _OwnImages:
        pixels = [batch.pixels for batch in batches if batch.pixels is not None]
        assert len(pixels) == len(batches), "every rank reads pixels"
        return cls(torch.cat(pixels).to(device, non_blocking=True), chunk, size)

    @property
    def number(self) -> int:
        return len(self.pixels)

    def parts(self) -> tuple[Tensor, ...]:
        """Return the pixels of those that are encoded together."""
        return self.pixels.split(self.size) if self.number else ()

    def encode(self) -> list[Tensor]:
        """Return [m, queries, h] for each part, with its graph."""
        return [self.chunk.see(None, part).transpose(0, 1) for part in self.parts()]

    @torch.no_grad()
    def encode_without_graph(self) -> list[Tensor]:
        """Return [m, queries, h] for each part."""
        return self.encode()

    def empty(self) -> Tensor:
        """Return the features of no image, [0, queries, h]."""
        assert self.chunk.resampler is not None
        query = self.chunk.resampler.query.detach()
        return query.new_empty(0, *query.shape)


@dataclass
class EncodedStep:
    """Features on their way to the micro-batches of a step, and gradients on their way back."""

    counts: Sequence[int]
    """The number of images of each micro-batch."""
    totals: Sequence[int]
    """The number of images that each rank of the model-parallel group has encoded."""
    own: _OwnImages
    kept: list[Tensor]
    """The features of the own images with their graph; empty if they are encoded again."""
    backward: bool
    topology: Topology
    every: Tensor | None
    """[images, queries, h] on the first stage, until they are handed over."""
    _gradients: dict[int, Tensor] = field(default_factory=dict, init=False)

    def hand_over(self) -> Iterator[Tensor]:
        """Yield the features of each micro-batch, [queries, n, h]; on the first stage only."""
        assert self.every is not None
        parts, self.every = list(self.every.split(list(self.counts))), None
        anchor = torch.zeros((), device=self.topology.device, requires_grad=self.backward)
        for number in range(len(parts)):
            features = parts[number].transpose(0, 1).contiguous()
            parts[number] = features.new_empty(0)
            yield _Handed.apply(anchor, features, self._keeper(number))

    def _keeper(self, number: int) -> Callable[[Tensor], None]:
        def keep(gradient: Tensor) -> None:
            self._gradients[number] = gradient

        return keep

    def go_backward(self) -> None:
        """Bring the gradients of the features to the ranks that have encoded them, and go backward there."""
        if not self.backward:
            return
        empty = self.own.empty()
        gradients = from_first_stage(self._all_gradients(empty), self.totals, like=empty, topology=self.topology)
        for number, gradient in enumerate(gradients.split(self.own.size) if self.own.number else ()):
            output = self.kept[number] if self.kept else self._again(number)
            torch.autograd.backward(output, gradient)
        self.kept.clear()

    def _again(self, number: int) -> Tensor:
        """Encode a part once more, with its graph."""
        return self.own.chunk.see(None, self.own.parts()[number]).transpose(0, 1)

    def _all_gradients(self, empty: Tensor) -> Tensor | None:
        """Return the gradients of all features, [images, queries, h], on the first stage."""
        if self.topology.pp_rank != 0:
            return None
        ordered = [self._gradients.pop(number) for number, count in enumerate(self.counts) if count]
        return _joined([gradient.transpose(0, 1) for gradient in ordered], empty)


def _joined(parts: Sequence[Tensor], empty: Tensor) -> Tensor:
    return torch.cat(list(parts)) if parts else empty


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
