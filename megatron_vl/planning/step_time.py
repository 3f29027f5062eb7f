"""How long a step takes, and why.

1. Each stage's passes take the time of their operations, memory traffic and collectives (``stage_cost.py``) at the
   rates of the GPU, or that of the CPU that launches them.
2. The schedule runs with these times and the messages between stages (``simulation.py``). Where every rank holds the
   vision part, its time comes before and after the schedule (``vision_share.py``).
3. What data parallelism exchanges and cannot hide comes before and after it (``traffic.py``).
4. The optimizer reads and writes its state. In bytes a parameter: gradients are scaled by the number of tokens (8)
   and set to zero (4) on each rank; their norm (4), clipping (8), AdamW (28) and the bf16 copy (6) on its share.

All data-parallel ranks are taken to have equal work: rows are assigned to ranks by cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_vl.config.batch import data_parallel_size, num_microbatches
from megatron_vl.config.schema import RunConfig
from megatron_vl.planning.activations import Keeping, boundary_bytes
from megatron_vl.planning.flops import FrozenParts, Work, step_flops
from megatron_vl.planning.gpus import Gpu, PartFactors
from megatron_vl.planning.hosts import Hosts
from megatron_vl.planning.memory import Layout
from megatron_vl.planning.rows import Row
from megatron_vl.planning.schedule import Pipeline
from megatron_vl.planning.simulation import StageTimes, Timeline, simulate_repeating
from megatron_vl.planning.stage_cost import StageCost, UnitCosts
from megatron_vl.planning.traffic import DataGroup, DataTraffic, boundary_links, data_traffic, stage_messages
from megatron_vl.planning.vision_share import VisionShare

_PER_GRADIENT, _PER_STATE = 12, 46


@dataclass(frozen=True)
class Traffic:
    """Bytes that a GPU sends in a step, on the rank that sends most of each kind."""

    tensor: float
    """Over NVLink."""
    pipeline_nvlink: float
    pipeline_network: float
    data_nvlink: float
    data_network: float


@dataclass(frozen=True)
class StepTime:
    """A step of a layout, in seconds."""

    seconds: float
    busiest: float
    """Time in which the busiest rank computes, collectives of tensor parallelism included."""
    bubble: float
    """Time in which that rank waits for others."""
    exposed_tensor: float
    """Time of collectives inside ``busiest``."""
    exposed_data: float
    vision: float
    """Time in which ranks encode their share of the images and exchange features, where each holds the vision part."""
    vision_launches: float
    """Time inside ``vision`` in which the GPU waits for the CPU."""
    optimizer: float
    launches: float
    """Time inside ``busiest`` in which the GPU waits for the CPU."""
    traffic: Traffic
    timeline: Timeline
    stages: tuple[StageTimes, ...]
    """Durations of each stage for a micro-batch."""
    required: float
    """Operations that the step requires, over all ranks."""
    tokens: float
    """Tokens of the step, without padding."""

    @property
    def exposed(self) -> float:
        """Time of communication that nothing hides."""
        return self.exposed_tensor + self.exposed_data


def stage_costs(config: RunConfig, layout: Layout, work: Work, factors: PartFactors) -> tuple[StageCost, ...]:
    """Return the cost of a micro-batch of ``work`` in each stage."""
    units = UnitCosts.of(config, work, Keeping.of(config))
    stages = zip(layout.stages.stages, layout.trained, strict=True)
    return tuple(units.stage(stage, trained=trained, factors=factors) for stage, trained in stages)


def step_time(config: RunConfig, layout: Layout, row: Row, gpu: Gpu, world_size: int) -> StepTime:
    """Return the time of a step of ``training.global_batch_size`` rows."""
    cluster = _Cluster(config, layout, gpu.within(world_size), world_size)
    work = row.computed(config)
    costs = stage_costs(config, layout, work, gpu.factors)
    rows = config.training.global_batch_size
    return StepTime(
        **cluster.timed(costs, work),
        traffic=cluster.traffic(costs, work),
        required=step_flops(config.model, FrozenParts.of(config.training), row.work(rows)),
        tokens=rows * row.tokens,
    )


def fastest_possible(config: RunConfig, layout: Layout, row: Row, gpu: Gpu, world_size: int) -> float:
    """Return a lower bound of :func:`step_time` that needs no simulation.

    A rank computes all its passes. Before the first and after the last of them, one micro-batch passes through the
    first chunks of the ranks before it, forward and backward. For equal stages, this is the time of the schedule.
    """
    cluster = _Cluster(config, layout, gpu.within(world_size), world_size)
    work = row.computed(config)
    costs = stage_costs(config, layout, work, gpu.factors)
    count = cluster.pipeline.micro_batches
    ranks = range(cluster.pipeline.size)
    least = max(count * cluster.busy(costs, rank) + cluster.seconds(costs[:rank]) for rank in ranks)
    return least + cluster.vision_seconds(work)


@dataclass(frozen=True)
class _Cluster:
    """A layout on GPUs."""

    config: RunConfig
    layout: Layout
    gpu: Gpu
    world_size: int

    @property
    def data_parallel(self) -> int:
        return data_parallel_size(self.config.parallel, self.world_size)

    @property
    def hosts(self) -> Hosts:
        return Hosts.of(self.config, self.gpu, self.world_size)

    @property
    def pipeline(self) -> Pipeline:
        stages = self.layout.stages
        count = num_microbatches(self.config.training, self.data_parallel)
        return Pipeline(stages.pipeline_size, stages.virtual_size, count)

    def chunks(self, costs: Sequence[StageCost], rank: int) -> Sequence[StageCost]:
        """Return the costs of the chunks of a rank."""
        return costs[rank :: self.pipeline.size]

    def busy(self, costs: Sequence[StageCost], rank: int) -> float:
        """Return the seconds that a rank computes for a micro-batch."""
        return self.seconds(self.chunks(costs, rank))

    def seconds(self, costs: Sequence[StageCost]) -> float:
        """Return the seconds of a micro-batch in stages, one after the other."""
        return sum(cost.forward.seconds(self.gpu) + cost.backward.seconds(self.gpu) for cost in costs)

    def timed(self, costs: Sequence[StageCost], work: Work) -> dict[str, Any]:
        """Return the times of a step by the names of :class:`StepTime`."""
        gpu, pipeline = self.gpu, self.pipeline
        exposed = [self._exposed_data(costs, rank) for rank in range(pipeline.size)]
        stages = self._stage_times(costs, work)
        timeline = simulate_repeating(pipeline, stages, [gather for _, gather in exposed])
        computed = max(timeline.end_of(rank) + reduce for rank, (reduce, _) in enumerate(exposed))
        optimizer = max(map(self._optimizer, range(pipeline.size)))
        vision, everywhere = self.vision_seconds(work), self._vision_data()
        busy = [pipeline.micro_batches * self.busy(costs, rank) for rank in range(pipeline.size)]
        busiest = busy.index(max(busy))
        passes = [one for cost in self.chunks(costs, busiest) for one in (cost.forward, cost.backward)]
        exposed_data = computed - timeline.end + max(gather for _, gather in exposed)
        return {
            "seconds": computed + optimizer + vision + everywhere.reduce.seconds + everywhere.gather.seconds,
            "busiest": busy[busiest],
            "bubble": _unless_rounding(computed - busy[busiest] - exposed_data, computed),
            "exposed_tensor": pipeline.micro_batches * sum(one.exposed_seconds(gpu) for one in passes),
            "exposed_data": exposed_data + everywhere.reduce.seconds + everywhere.gather.seconds,
            "vision": vision,
            "vision_launches": share.launch_seconds(gpu) if (share := self._share(work)) else 0.0,
            "optimizer": optimizer,
            "launches": pipeline.micro_batches * sum(one.seconds(gpu) - one.gpu_seconds(gpu) for one in passes),
            "timeline": timeline,
            "stages": stages,
        }

    def traffic(self, costs: Sequence[StageCost], work: Work) -> Traffic:
        """Return what a GPU sends in a step."""
        pipeline, hosts = self.pipeline, self.hosts
        near, far = [0.0], [0.0]
        for rank in range(pipeline.size):
            sent = self._sent_to_stages(rank, work)
            for replica in range(hosts.data):
                away = sum(size for peer, size in sent.items() if hosts.stages_apart(rank, peer, replica))
                near.append(sum(sent.values()) - away)
                far.append(away)
        every, data = self._vision_data(), [self._data(rank) for rank in range(pipeline.size)]
        tensor = [sum(cost.gathered for cost in self.chunks(costs, rank)) for rank in range(pipeline.size)]
        return Traffic(
            tensor=pipeline.micro_batches * max(tensor),
            pipeline_nvlink=max(near),
            pipeline_network=max(far),
            data_nvlink=max(item.nvlink for item in data) + every.nvlink,
            data_network=max(item.network for item in data) + every.network,
        )

    def _sent_to_stages(self, rank: int, work: Work) -> dict[int, float]:
        """Return what a GPU of a pipeline rank sends in a step, by the pipeline rank that it sends to."""
        share = self._share(work)  # it has the images of the whole step
        sent = {
            peer: one * self.pipeline.micro_batches + (share.sent_bytes(rank, peer) if share else 0.0)
            for peer, one in stage_messages(self.config, self.layout.stages, rank, work).items()
        }
        return {peer: size for peer, size in sent.items() if size}

    def _stage_times(self, costs: Sequence[StageCost], work: Work) -> tuple[StageTimes, ...]:
        gpu, keeping = self.gpu, Keeping.of(self.config)
        links = boundary_links(self.hosts, gpu)
        times = []
        for number, (stage, cost) in enumerate(zip(self.layout.stages.stages, costs, strict=True)):
            last = number == len(costs) - 1
            size = 0.0 if last else boundary_bytes(self.config, stage, work, keeping)
            send = links[number % self.pipeline.size].seconds(size)
            times.append(StageTimes(cost.forward.seconds(gpu), cost.backward.seconds(gpu), send))
        return tuple(times)

    def _data(self, rank: int) -> DataTraffic:
        trained = self.layout.ranks[rank].trained - self.layout.everywhere
        return data_traffic(self.config, trained, self.gpu, DataGroup(self.hosts.replicas(rank)))

    def _vision_data(self) -> DataTraffic:
        """Return the exchange of the vision part over all ranks, which nothing hides."""
        parallel = replace(self.config.parallel, overlap_grad_reduce=False, overlap_param_gather=False)
        group = DataGroup(self.hosts.all_ranks())
        return data_traffic(replace(self.config, parallel=parallel), self.layout.everywhere, self.gpu, group)

    def _share(self, work: Work) -> VisionShare | None:
        return VisionShare.of(self.config, work, self.pipeline.micro_batches, self.layout.everywhere)

    def vision_seconds(self, work: Work) -> float:
        """Return the time of the vision part that every rank holds, or zero where stages hold it."""
        share = self._share(work)
        if share is None:
            return 0.0
        return share.seconds(self.gpu) + share.exchange_seconds(self.gpu, self.hosts.far_stages)

    def _exposed_data(self, costs: Sequence[StageCost], rank: int) -> tuple[float, float]:
        chunks = self.chunks(costs, rank)
        return self._data(rank).exposed(
            forward=sum(cost.forward.seconds(self.gpu) for cost in chunks),
            backward=sum(cost.backward.seconds(self.gpu) for cost in chunks),
            config=self.config,
        )

    def _optimizer(self, rank: int) -> float:
        trained, everywhere = self.layout.ranks[rank].trained, self.layout.everywhere
        owned = float(trained)
        if self.config.parallel.use_distributed_optimizer:
            owned = (trained - everywhere) / self.data_parallel + everywhere / self.world_size
        return (trained * _PER_GRADIENT + owned * _PER_STATE) / self.gpu.memory_rate


def _unless_rounding(difference: float, of: float) -> float:
    """Return a difference of times, or zero where only rounding made it."""
    return difference if difference > 1e-9 * of else 0.0
