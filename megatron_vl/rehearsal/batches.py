"""Make the micro-batches of a rehearsal, as a rank gets them from its loader.

Rows are full, and all text is supervised. Each row is one attention span, since no message depends on the spans. Tokens
are zeros, and pixels have no contents.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from megatron_vl.config.schema import RunConfig
from megatron_vl.data.loading.balance import image_shares
from megatron_vl.data.loading.batch import MicroBatch
from megatron_vl.parallel.collectives import tensors_of, with_tensors
from megatron_vl.rehearsal.places import Grid, Place
from megatron_vl.rehearsal.step import Step


def make_batches(step: Step, grid: Grid, place: Place) -> list[MicroBatch]:
    """Return what a rank reads or, as outlines, what the first rank of its tensor-parallel group tells it."""
    batches = [_batch(step, number) for number in range(len(step.images))]
    if step.config.parallel.vision_parallel == "data":
        me, size = place.tensor + grid.tensor * place.pipeline, grid.tensor * grid.pipeline
        shares = image_shares(step.images, rank=me, size=size)
        return [
            replace(batch, pixels=_pixels(step.config, len(share)))
            for batch, share in zip(batches, shares, strict=True)
        ]
    if not any(stage.patch_embed for stage in step.layout.stages_of_rank(place.pipeline)):
        batches = [replace(batch, pixels=None) for batch in batches]
    return batches if place.tensor == 0 else list(map(_outline, batches))


def _batch(step: Step, number: int) -> MicroBatch:
    config, images, tokens = step.config, step.images[number], step.num_tokens
    rows, length = config.training.micro_batch_size, config.data.seq_length
    text = torch.zeros(step.num_supervised(number), dtype=torch.int64)
    return MicroBatch(
        tokens=torch.zeros(tokens, dtype=torch.int64),
        positions=torch.arange(length).repeat(rows),
        cu_seqlens=torch.arange(0, tokens + 1, length, dtype=torch.int32),
        span_lengths=(length,) * rows,
        supervised=text,
        targets=text,
        slots=torch.zeros(images * config.model.resampler.num_queries, dtype=torch.int64),
        pixels=_pixels(config, max(images, 1)),
        span_images=torch.zeros(images, dtype=torch.int64),
        num_images=max(images, 1),
        num_samples=rows,
        num_tokens=tokens,
        squared_spans=rows * length**2,
    )


def _pixels(config: RunConfig, number: int) -> torch.Tensor:
    side = config.model.image_size
    return torch.empty(number, 3, side, side, dtype=torch.uint8, device="meta")


def _outline(batch: MicroBatch) -> MicroBatch:
    return with_tensors(batch, {name: tensor.to("meta") for name, tensor in tensors_of(batch).items()})
