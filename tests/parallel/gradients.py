"""Runs on a rank: loss and gradients of one step, and the weights after it, as whole tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_vl.checkpoint import contents
from megatron_vl.config.schema import RunConfig
from megatron_vl.data.loading.balance import image_shares
from megatron_vl.data.loading.batch import MicroBatch
from megatron_vl.parallel.rng import seed_all
from megatron_vl.parallel.topology import Topology
from megatron_vl.training.parallel_model import ParallelModel, build_parallel_model
from megatron_vl.training.step import forward_backward
from tests.helpers.pieces import Piece, take_pieces, whole_tensors
from tests.helpers.ranks import Start


@dataclass(frozen=True)
class RankGradients:
    """What one rank reports."""

    loss: float
    num_tokens: int
    grad_norm: float
    pieces: dict[str, Piece]


def step_on_rank(
    start: Start, config: RunConfig, batches: list[MicroBatch], checkpoint: Path | None = None
) -> RankGradients:
    """One training step over ``batches``, dealt in turn to the data-parallel ranks, from fresh or stored weights."""
    with start.topology(config.parallel) as topology:
        seed_all(config.training.seed)
        model = build_parallel_model(config, topology, fresh_weights=checkpoint is None)
        if checkpoint:
            contents.load(contents.Trained(model.chunks, None), checkpoint, config=config, topology=topology)
        model.zero_grad()
        mine = own_images(batches[topology.dp_rank :: topology.dp_size], config, topology)
        loss, _ = forward_backward(model.wrapped, mine, topology=topology, forward_only=False, encoder=model.encoder)
        if config.parallel.use_distributed_optimizer:
            _gather_shards(model, topology)
        pieces = _pieces(model, topology)
        _, grad_norm, _ = model.optimizer.step()
        return RankGradients(loss.mean, loss.num_tokens, float(grad_norm), pieces if topology.dp_rank == 0 else {})


def _pieces(model: ParallelModel, topology: Topology) -> dict[str, Piece]:
    """This rank's gradients; of a vision part that every rank holds whole, those of the first tensor-parallel rank."""

    def gradient(parameter: nn.Parameter) -> Tensor | None:
        return parameter.main_grad if parameter.requires_grad else None

    pieces = take_pieces([wrapped.module for wrapped in model.wrapped], topology.tp_rank, gradient)
    if model.encoder:
        vision = take_pieces([model.encoder.chunk], 0, gradient)
        for piece in vision.values():
            every = [torch.empty_like(piece.value) for _ in range(topology.world_size)]
            dist.all_gather(every, piece.value)
            assert all(torch.equal(one, piece.value) for one in every), "the vision part differs between ranks"
        pieces |= vision if topology.tp_rank == 0 else {}
    return pieces


def own_images(batches: list[MicroBatch], config: RunConfig, topology: Topology) -> list[MicroBatch]:
    """The micro-batches as a rank reads them: under ``vision_parallel data`` with its share of the images alone."""
    if config.parallel.vision_parallel == "pipeline":
        return batches
    group = topology.mp_group
    shares = image_shares([batch.work.num_images for batch in batches], rank=group.rank(), size=group.size())
    return [
        replace(batch, pixels=batch.pixels[own.start : own.stop]) for batch, own in zip(batches, shares, strict=True)
    ]


def _gather_shards(model: ParallelModel, topology: Topology) -> None:
    """The distributed optimizer leaves each data-parallel rank its shard of the reduced gradient; fill in the rest."""
    for chunk in model.all_wrapped:
        for buffer in chunk.buffers:
            group = buffer.data_parallel_group
            for bucket in buffer.buckets:
                shard = bucket.grad_data.chunk(group.size())[group.rank()].clone()
                parts = [torch.empty_like(shard) for _ in range(group.size())]
                dist.all_gather(parts, shard, group=group)
                bucket.grad_data.copy_(torch.cat(parts))


def whole_gradients(ranks: list[RankGradients], *, vocab_size: int) -> dict[str, Tensor]:
    """Put the ranks' parts together; rows that pad the vocabulary are left out."""
    return whole_tensors([rank.pieces for rank in ranks], vocab_size=vocab_size)
