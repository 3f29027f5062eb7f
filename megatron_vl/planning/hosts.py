"""Which ranks are on the same host, and so which of them NVLink connects.

Ranks are in the order tensor, data, pipeline (``parallel/topology.py``), and fill hosts in this order; the last one may
have fewer. So tensor-parallel ranks are neighbors, data-parallel ones follow, and pipeline stages are furthest apart.
Where the size of a stage does not divide that of a host, replicas differ: some send to another host, others do not. All
replicas wait for each other once a step, so the slowest one decides.

A *host* here is what NVLink connects: of GB200 a rack.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_vl.config.batch import data_parallel_size
from megatron_vl.config.schema import RunConfig
from megatron_vl.planning.gpus import Gpu


@dataclass(frozen=True)
class Hosts:
    """The ranks of a job on its hosts."""

    tensor: int
    data: int
    pipeline: int
    per_host: int
    """Ranks that NVLink connects."""

    @classmethod
    def of(cls, config: RunConfig, gpu: Gpu, world_size: int) -> Hosts:
        """Return the hosts of a run; raises ``ConfigError`` if its ranks are no whole number of replicas."""
        parallel = config.parallel
        return cls(
            parallel.tensor_model_parallel_size,
            data_parallel_size(parallel, world_size),
            parallel.pipeline_model_parallel_size,
            gpu.within(world_size).nvlink_domain,
        )

    @property
    def world_size(self) -> int:
        return self.tensor * self.data * self.pipeline

    def apart(self, one: int, other: int) -> bool:
        """Return whether two ranks are on different hosts."""
        return one // self.per_host != other // self.per_host

    def rank(self, stage: int, replica: int) -> int:
        """Return the first of the tensor-parallel ranks of a pipeline rank, the ``replica``-th of its copies."""
        return self.tensor * (replica + self.data * stage)

    @property
    def split_tensor_group(self) -> range | None:
        """The first tensor-parallel group that is not on one host, or None."""
        if self.per_host % self.tensor == 0:
            return None
        groups = (range(first, first + self.tensor) for first in range(0, self.world_size, self.tensor))
        return next((group for group in groups if self.apart(group[0], group[-1])), None)

    def stages_apart(self, one: int, other: int, replica: int) -> bool:
        """Return whether two pipeline ranks are on different hosts, on one replica."""
        return self.apart(self.rank(one, replica), self.rank(other, replica))

    def leaves(self, stage: int) -> bool:
        """Return whether a pipeline rank and the next one are on different hosts on any replica.

        After the last one comes the first one.
        """
        following = (stage + 1) % self.pipeline
        return any(self.stages_apart(stage, following, replica) for replica in range(self.data))

    @property
    def far_stages(self) -> int:
        """How many stages are on another host than the first one, on the replica with most of them."""
        return max(
            sum(self.stages_apart(0, stage, replica) for stage in range(self.pipeline)) for replica in range(self.data)
        )

    def replicas(self, stage: int) -> tuple[int, ...]:
        """Return how many ranks each host has of those that hold the same part of a stage."""
        return self._counted(self.rank(stage, replica) for replica in range(self.data))

    def all_ranks(self) -> tuple[int, ...]:
        """Return how many ranks each host has."""
        return self._counted(range(self.world_size))

    def _counted(self, ranks: Iterable[int]) -> tuple[int, ...]:
        return tuple(Counter(rank // self.per_host for rank in ranks).values())
