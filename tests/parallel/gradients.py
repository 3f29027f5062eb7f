"""Runs on a rank: loss and gradients of one step, and the weights after it, as whole tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vl.config.schema import RunConfig
from megatron_vl.data.batch import MicroBatch
from megatron_vl.parallel.rng import seed_all
from megatron_vl.parallel.topology import Topology
from megatron_vl.training.parallel_model import ParallelModel, build_parallel_model
from megatron_vl.training.step import forward_backward
from tests.helpers.ranks import Start


@dataclass(frozen=True)
class Piece:
    """A rank's part of a gradient."""

    gradient: Tensor
    dimension: int | None
    tp_rank: int


@dataclass(frozen=True)
class RankGradients:
    """What one rank reports."""

    loss: float
    num_tokens: int
    grad_norm: float
    pieces: dict[str, Piece]


def step_on_rank(start: Start, config: RunConfig, batches: list[MicroBatch]) -> RankGradients:
    """One training step over ``batches``, dealt in turn to the data-parallel ranks."""
    with start.topology(config.parallel) as topology:
        seed_all(config.training.seed)
        model = build_parallel_model(config, topology)
        for chunk in model.wrapped:
            chunk.zero_grad_buffer()
        mine = batches[topology.dp_rank :: topology.dp_size]
        loss, _ = forward_backward(model.wrapped, mine, topology=topology, forward_only=False)
        if config.parallel.use_distributed_optimizer:
            _gather_shards(model, topology)
        pieces = _pieces(model, topology.tp_rank)
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


def _pieces(model: ParallelModel, tp_rank: int) -> dict[str, Piece]:
    return {
        name: Piece(parameter.main_grad.float().clone(), _dimension(parameter), tp_rank)
        for chunk in model.chunks
        for name, parameter in chunk.named_parameters()
        if parameter.requires_grad
    }


def _dimension(parameter: Tensor) -> int | None:
    return parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None


def whole_gradients(ranks: list[RankGradients], *, vocab_size: int) -> dict[str, Tensor]:
    """Put the ranks' parts together; rows that pad the vocabulary are left out."""
    parts: dict[str, dict[int, Piece]] = {}
    for rank in ranks:
        for name, piece in rank.pieces.items():
            parts.setdefault(name, {})[piece.tp_rank] = piece
    whole = {name: _join(name, [pieces[rank] for rank in sorted(pieces)]) for name, pieces in parts.items()}
    for name in ("language_model.embedding.word_embeddings.weight", "language_model.output_layer.weight"):
        if name in whole:
            whole[name] = whole[name][:vocab_size]
    return whole


def _join(name: str, pieces: list[Piece]) -> Tensor:
    first = pieces[0]
    if first.dimension is None:
        for piece in pieces[1:]:
            assert torch.equal(piece.gradient, first.gradient), f"{name} differs between tensor-parallel ranks"
        return first.gradient
    if name.startswith("language_model.") and ".linear_fc1." in name:
        halves = [piece.gradient.chunk(2) for piece in pieces]
        return torch.cat([gate for gate, _ in halves] + [up for _, up in halves])
    return torch.cat([piece.gradient for piece in pieces], first.dimension)
