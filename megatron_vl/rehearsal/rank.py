"""Rehearse ranks: make their process groups, build what they hold, run one training step, and report all of it.

The process must be prepared (``backends/platform.py``) on a machine without CUDA, or with its devices hidden.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer
from torch import Tensor

from megatron_vl.config.schema import RunConfig
from megatron_vl.launch import Launch
from megatron_vl.parallel.rng import seed_all
from megatron_vl.parallel.topology import Topology
from megatron_vl.rehearsal.batches import make_batches
from megatron_vl.rehearsal.hollow import Hollow
from megatron_vl.rehearsal.places import Grid, Place
from megatron_vl.rehearsal.recorder import Recorder
from megatron_vl.rehearsal.records import Held, Membership, Rehearsed
from megatron_vl.rehearsal.step import Step
from megatron_vl.training.parallel_model import ParallelModel, build_parallel_model
from megatron_vl.training.step import train_step


def memberships(config: RunConfig, grid: Grid, ranks: Sequence[int]) -> list[Membership]:
    """Make the groups of the run as each of these ranks in turn."""
    found = []
    for rank in ranks:
        recorder = Recorder()
        recorder.start(rank, grid.world_size)
        try:
            with Topology(config.parallel, Launch(rank, grid.world_size, rank)) as topology:
                place = Place(topology.dp_rank, topology.pp_rank, topology.tp_rank)
        finally:
            dist.destroy_process_group()
        found.append(Membership(rank, place, dict(recorder.groups)))
    return found


def said_by_all(config: RunConfig) -> list[bytes]:
    """Return what ranks say in the exchanges of objects at the start, as a rank that holds the whole model says it.

    Optimizers tell each other which groups of parameters there are anywhere, since a rank may hold nothing of a group.
    """
    parallel = replace(
        config.parallel,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        virtual_pipeline_model_parallel_size=None,
        pipeline_layout="auto",
    )
    recorder = Recorder()
    recorder.start(0, 1)
    try:
        with Topology(parallel, Launch(0, 1, 0)) as topology, Hollow():
            seed_all(config.training.seed)
            build_parallel_model(replace(config, parallel=parallel), topology, fresh_weights=False)
    finally:
        dist.destroy_process_group()
    return recorder.said


def rehearse_rank(step: Step, grid: Grid, place: Place, objects: Sequence[bytes]) -> Rehearsed:
    """Build the model of a rank and train it one step, as if the other ranks were there.

    Args:
        objects: the result of :func:`said_by_all`.
    """
    rank = grid.rank(place)
    shapes = step.shapes_to(place.pipeline)
    recorder = Recorder(
        {grid.rank(Place(place.data, sender, place.tensor)): told for sender, told in shapes.items()}, objects
    )
    recorder.start(rank, grid.world_size)
    try:
        with Topology(step.config.parallel, Launch(rank, grid.world_size, rank)) as topology, Hollow():
            seed_all(step.config.training.seed)
            model = build_parallel_model(step.config, topology, fresh_weights=False)
            start = len(recorder.program)
            batches = make_batches(step, grid, place)
            train_step(model, batches, config=step.config, topology=topology, step=0)
            held = _held(model, bf16=step.config.training.bf16)
    finally:
        dist.destroy_process_group()
    return Rehearsed(rank, place, held, dict(recorder.groups), tuple(recorder.program), start)


def _held(model: ParallelModel, *, bf16: bool) -> Held:
    parameters = [parameter for chunk in model.all_wrapped for parameter in chunk.parameters()]
    trained = _num_trained(model.all_wrapped)
    buffers = [buffer for chunk in model.all_wrapped for buffer in chunk.buffers]
    return Held(
        trained=trained,
        frozen=sum(parameter.numel() for parameter in parameters) - trained,
        padding=_padding(model.wrapped),
        vision_padding=_padding([model.encoder.wrapped] if model.encoder else []),
        buckets=frozenset(bucket.grad_data.numel() for buffer in buffers for bucket in buffer.buckets),
        norms=sum(
            value.numel()
            for chunk in model.wrapped
            for value in chunk.parameters()
            if value.requires_grad and getattr(value, "sequence_parallel", False)
        ),
        weight_bytes=_num_bytes(parameters),
        gradient_bytes=_num_bytes(buffer.grad_data for buffer in buffers),
        optimizer_bytes=_optimizer_bytes(model.optimizer, masters=bf16),
    )


def _num_trained(chunks: Sequence[DistributedDataParallel]) -> int:
    return sum(value.numel() for chunk in chunks for value in chunk.parameters() if value.requires_grad)


def _padding(chunks: Sequence[DistributedDataParallel]) -> int:
    return sum(buffer.grad_data.numel() for chunk in chunks for buffer in chunk.buffers) - _num_trained(chunks)


def _optimizer_bytes(optimizer: ChainedOptimizer, *, masters: bool) -> int:
    total = 0
    for member in optimizer.chained_optimizers:
        inner = member.optimizer
        if inner is None:  # nothing trains here
            continue
        total += _num_bytes(value for state in inner.state.values() for value in state.values())
        if masters:
            total += _num_bytes(value for group in inner.param_groups for value in group["params"])
    return total


def _num_bytes(values: Iterable[object]) -> int:
    return sum(value.numel() * value.element_size() for value in values if isinstance(value, Tensor))
