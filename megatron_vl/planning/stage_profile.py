"""The times of stages that a profile has measured: the record that training writes and a plan reads.

A row holds one micro-batch of one data-parallel rank with its seconds in every stage, so that a plan can compare each
with the work that it counts for the same micro-batch. The run's configuration lies beside them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from megatron_vl.config.records import Between
from megatron_vl.config.schema import RunConfig
from megatron_vl.planning.flops import Work


@dataclass(frozen=True)
class MicroBatchTimes:
    """The passes of one micro-batch through all stages."""

    step: int
    """Number of the step, from 1, as in the log."""
    data_rank: int
    images: int
    """Images that the tower encodes, also the blank one of a text-only micro-batch."""
    tokens: int
    """Tokens without padding."""
    squared_spans: float
    supervised: int
    forward: tuple[float, ...]
    """Seconds in each (virtual) stage, in the order of the model."""
    backward: tuple[float, ...]
    """The same, including what is computed again."""

    @property
    def work(self) -> Work:
        """Return what the stages worked on."""
        return Work(self.images, self.tokens, self.squared_spans, self.supervised)


@dataclass(frozen=True)
class VisionTimes:
    """A step of the vision part on one rank, under ``vision_parallel data``."""

    step: int
    rank: int
    images: int
    """Images of the rank's share."""
    forward: float
    """Seconds before the schedule."""
    backward: float
    """Seconds after it, including those in which images are encoded again."""


@dataclass(frozen=True)
class StageProfile:
    """All that was measured in one profile."""

    device: str
    """Name of the device of rank 0."""
    world_size: Annotated[int, Between(least=1)]
    traced_ranks: tuple[int, ...]
    """Ranks whose launches a trace has slowed down meanwhile."""
    config: RunConfig
    micro_batches: tuple[MicroBatchTimes, ...]
    vision: tuple[VisionTimes, ...] = ()

    @property
    def steps(self) -> tuple[int, ...]:
        """Return the steps that were profiled."""
        return tuple(sorted({row.step for row in self.micro_batches}))
