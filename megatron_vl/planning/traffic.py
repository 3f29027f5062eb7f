"""What ranks exchange in a step besides tensor parallelism: over which link, how much, and how long it takes.

Which ranks are on the same host says ``hosts.py``.

Data parallelism with the distributed optimizer reduces fp32 gradients (4 bytes a parameter) and gathers bf16 weights (2
bytes); without it, gradients are all-reduced, which moves 8 bytes. Of g ranks on each of k hosts, a GPU moves
(g - 1) / g of that over NVLink, and (k - 1) / k of it divided by g over its network card. Where hosts have different
numbers of the ranks, the host with fewest needs most of its cards: all but its own part comes through them. Rings run
through both links at once, so the slower one decides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_vl.config.schema import RunConfig
from megatron_vl.planning.activations import Keeping, boundary_bytes
from megatron_vl.planning.flops import FrozenParts, Work
from megatron_vl.planning.gpus import Gpu, Link
from megatron_vl.planning.hosts import Hosts
from megatron_vl.planning.layout import PipelineLayout, StageLayout

_BUCKET, _BUCKET_PER_RANK = 40e6, 1e6
"""Parameters of a bucket of Megatron-Core: at least the first, and the second for each data-parallel rank."""


@dataclass(frozen=True)
class Exchange:
    """One collective of a group: bytes that a GPU sends over each link, and its time."""

    nvlink: float
    network: float
    seconds: float


@dataclass(frozen=True)
class DataGroup:
    """The data-parallel ranks that hold the same part of the model."""

    by_host: tuple[int, ...]
    """Ranks of each host."""

    @property
    def size(self) -> int:
        return sum(self.by_host)

    def exchange(self, gpu: Gpu, num_bytes: float, buckets: float) -> Exchange:
        """Return one all-gather or reduce-scatter of ``num_bytes``, on the GPU that sends most over each link."""
        most, fewest = max(self.by_host), min(self.by_host)
        nvlink = num_bytes * (most - 1) / most
        network = num_bytes / fewest * (self.size - fewest) / self.size
        seconds = max(gpu.nvlink.seconds(nvlink, buckets), gpu.network.seconds(network, buckets))
        return Exchange(nvlink, network, seconds)


@dataclass(frozen=True)
class DataTraffic:
    """Gradients and weights of one rank in a step."""

    reduce: Exchange
    gather: Exchange
    buckets: float

    @property
    def nvlink(self) -> float:
        """Bytes that a GPU sends over NVLink."""
        return self.reduce.nvlink + self.gather.nvlink

    @property
    def network(self) -> float:
        """Bytes that a GPU sends over the network."""
        return self.reduce.network + self.gather.network

    def exposed(self, *, forward: float, backward: float, config: RunConfig) -> tuple[float, float]:
        """Return the seconds that the reduction and the gathering add to a step.

        With overlap they run behind the last backward pass and the first forward pass; the first or last bucket has
        nothing to hide behind.
        """
        parallel = config.parallel
        reduce, gather = self.reduce.seconds, self.gather.seconds
        if parallel.overlap_grad_reduce:
            reduce = max(reduce - backward, reduce / self.buckets)
        if parallel.overlap_param_gather:
            gather = max(gather - forward, gather / self.buckets)
        return reduce, gather


def data_traffic(config: RunConfig, trained: float, gpu: Gpu, group: DataGroup) -> DataTraffic:
    """Return what a rank with ``trained`` parameters exchanges with ``group``."""
    parallel, element = config.parallel, 2 if config.training.bf16 else 4
    overlapped = parallel.overlap_grad_reduce
    buckets = max(1.0, math.ceil(trained / max(_BUCKET, _BUCKET_PER_RANK * group.size))) if overlapped else 1.0
    nothing = Exchange(0.0, 0.0, 0.0)
    if group.size == 1 or not trained:
        return DataTraffic(nothing, nothing, buckets)
    if parallel.use_distributed_optimizer:
        reduce = group.exchange(gpu, 4 * trained, buckets)
        return DataTraffic(reduce, group.exchange(gpu, element * trained, buckets), buckets)
    return DataTraffic(group.exchange(gpu, 2 * 4 * trained, 2 * buckets), nothing, buckets)


def returns_gradient(config: RunConfig, before: StageLayout) -> bool:
    """Return whether the stage after ``before`` sends back more than a zero."""
    frozen = FrozenParts.of(config.training)
    if before.language_layers or before.word_embedding:
        return True
    return not (frozen.vision and (frozen.resampler or not before.resampler))


def stage_messages(config: RunConfig, stages: PipelineLayout, rank: int, work: Work) -> dict[int, float]:
    """Return the bytes that a GPU of a pipeline rank sends for a micro-batch, by the pipeline rank that it sends to.

    Where nothing before a stage trains, it sends back one zero.
    """
    keeping, size = Keeping.of(config), stages.pipeline_size
    sent = dict.fromkeys(range(size), 0.0)
    for number in range(rank, len(stages.stages), size):
        if number < len(stages.stages) - 1:
            sent[(rank + 1) % size] += boundary_bytes(config, stages.stages[number], work, keeping)
        if number > 0:
            before = stages.stages[number - 1]
            back = (
                boundary_bytes(config, before, work, keeping) if returns_gradient(config, before) else keeping.element
            )
            sent[(rank - 1) % size] += back
    return sent


def boundary_links(hosts: Hosts, gpu: Gpu) -> Sequence[Link]:
    """Return the link from each pipeline rank to the next one; the last entry is that from the last to the first.

    It is the network where any replica needs it.
    """
    return [gpu.network if hosts.leaves(stage) else gpu.nvlink for stage in range(hosts.pipeline)]
