"""Runs on a rank: loss and gradients of one step, and the weights after it, as whole tensors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vl.checkpoint import contents
from megatron_vl.config.schema import RunConfig
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
        for chunk in model.wrapped:
            chunk.zero_grad_buffer()
        mine = batches[topology.dp_rank :: topology.dp_size]
        loss, _ = forward_backward(model.wrapped, mine, topology=topology, forward_only=False)
        if config.parallel.use_distributed_optimizer:
            _gather_shards(model, topology)
        pieces = take_pieces(
            model.chunks, topology.tp_rank, lambda parameter: parameter.main_grad if parameter.requires_grad else None
        )
        _, grad_norm, _ = model.optimizer.step()
        return RankGradients(loss.mean, loss.num_tokens, float(grad_norm), pieces if topology.dp_rank == 0 else {})


def _gather_shards(model: ParallelModel, topology: Topology) -> None:
    """The distributed optimizer leaves each data-parallel rank its shard of the reduced gradient; fill in the rest."""
    for chunk in model.wrapped:
        for buffer in chunk.buffers:
            for bucket in buffer.buckets:
                shard = bucket.grad_data.chunk(topology.dp_size)[topology.dp_rank].clone()
                parts = [torch.empty_like(shard) for _ in range(topology.dp_size)]
                dist.all_gather(parts, shard, group=topology.dp_group)
                bucket.grad_data.copy_(torch.cat(parts))


def whole_gradients(ranks: list[RankGradients], *, vocab_size: int) -> dict[str, Tensor]:
    """Put the ranks' parts together; rows that pad the vocabulary are left out."""
    return whole_tensors([rank.pieces for rank in ranks], vocab_size=vocab_size)
