"""What ranks exchange in a step besides tensor parallelism: over which link, how much, and how long it takes.

Ranks are in the order tensor, data, pipeline (``parallel/topology.py``). So tensor-parallel ranks are neighbors inside
a node, data-parallel ones follow, and pipeline stages are furthest apart.

Data parallelism with the distributed optimizer reduces fp32 gradients (4 bytes a parameter) and gathers bf16 weights (2
bytes); without it, gradients are all-reduced, which moves 8 bytes. Of g ranks inside a node and k nodes, a GPU moves
(g - 1) / g of that over NVLink, and (k - 1) / k of it divided by g over its network card. Rings run through both at
once, so the slower link decides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_vl.config.batch import data_parallel_size
from megatron_vl.config.schema import RunConfig
from megatron_vl.planning.flops import FrozenParts
from megatron_vl.planning.gpus import Gpu, Link
from megatron_vl.planning.layout import StageLayout

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

    within: int
    """Ranks that NVLink connects."""
    nodes: int
    """Such groups of ranks."""

    @classmethod
    def of(cls, gpu: Gpu, size: int, stride: int, world_size: int) -> DataGroup:
        """Return the group of ``size`` ranks that are ``stride`` apart."""
        if world_size <= gpu.nvlink_domain:
            return cls(size, 1)
        within = math.gcd(size, max(1, gpu.nvlink_domain // stride))
        return cls(within, size // within)

    def exchange(self, gpu: Gpu, num_bytes: float, buckets: float) -> Exchange:
        """Return one all-gather or reduce-scatter of ``num_bytes``."""
        nvlink = num_bytes * (self.within - 1) / self.within
        network = num_bytes / self.within * (self.nodes - 1) / self.nodes
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
    size = group.within * group.nodes
    overlapped = parallel.overlap_grad_reduce
    buckets = max(1.0, math.ceil(trained / max(_BUCKET, _BUCKET_PER_RANK * size))) if overlapped else 1.0
    nothing = Exchange(0.0, 0.0, 0.0)
    if size == 1 or not trained:
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


def boundary_links(config: RunConfig, gpu: Gpu, world_size: int) -> Sequence[Link]:
    """Return the link from each pipeline rank to the next one; the last entry is that from the last to the first."""
    parallel = config.parallel
    tensor, size = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    stride = tensor * data_parallel_size(parallel, world_size)
    links = []
    for rank in range(size):
        first, second = rank * stride, (rank + 1) % size * stride
        together = world_size <= gpu.nvlink_domain or (
            stride < gpu.nvlink_domain and first // gpu.nvlink_domain == second // gpu.nvlink_domain
        )
        links.append(gpu.nvlink if together else gpu.network)
    return links
