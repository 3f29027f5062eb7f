"""Which ranks there are, and which of them run a program of their own.

All data-parallel replicas hold the same and run the same, except for the number of images of their micro-batches. So
two replicas are rehearsed: the first with images, and the last with text alone, since a collective that only some
replicas run is what makes such a run hang. In a tensor-parallel group the first rank reads the rows and the last holds
what pads the vocabulary; those between do what the last does. Where every rank encodes images, each has its own share,
so each is rehearsed.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vl.config.batch import data_parallel_size
from megatron_vl.config.schema import RunConfig


@dataclass(frozen=True, order=True)
class Place:
    """The coordinates of a rank."""

    data: int
    pipeline: int
    tensor: int

    def __str__(self) -> str:
        return f"pipeline rank {self.pipeline}, tensor rank {self.tensor}, data rank {self.data}"


@dataclass(frozen=True)
class Grid:
    """The ranks of a run, in the order tensor x data x pipeline (``parallel/topology.py``)."""

    tensor: int
    data: int
    pipeline: int

    @classmethod
    def of(cls, config: RunConfig, world_size: int) -> Grid:
        """Return the ranks of a run; raises ``ConfigError`` if they are no whole number of replicas."""
        parallel = config.parallel
        return cls(
            parallel.tensor_model_parallel_size,
            data_parallel_size(parallel, world_size),
            parallel.pipeline_model_parallel_size,
        )

    @property
    def world_size(self) -> int:
        return self.tensor * self.data * self.pipeline

    def rank(self, place: Place) -> int:
        """Return the global rank at a place."""
        return place.tensor + self.tensor * (place.data + self.data * place.pipeline)

    def place(self, rank: int) -> Place:
        """Return the place of a global rank."""
        rest, tensor = divmod(rank, self.tensor)
        pipeline, data = divmod(rest, self.data)
        return Place(data, pipeline, tensor)

    def distinct(self, *, all_tensor_ranks: bool) -> list[Place]:
        """Return the places whose programs differ."""
        tensor = range(self.tensor) if all_tensor_ranks else sorted({0, self.tensor - 1})
        places = [Place(0, pipeline, rank) for pipeline in range(self.pipeline) for rank in tensor]
        if self.data > 1:
            others = tensor if all_tensor_ranks else [0]
            places += [Place(self.data - 1, pipeline, rank) for pipeline in range(self.pipeline) for rank in others]
        return places
