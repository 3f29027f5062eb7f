"""What is asked of a search for layouts, and what it answers."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_vl.config.batch import ROUNDING, data_parallel_size, num_microbatches
from megatron_vl.config.schema import RunConfig, VisionParallel
from megatron_vl.planning.gpus import Gpu
from megatron_vl.planning.memory import USABLE, Layout, RankMemory, checkpoint_host_bytes
from megatron_vl.planning.rows import Row
from megatron_vl.planning.step_time import StepTime


@dataclass(frozen=True)
class Question:
    """What is planned, and for which machine."""

    config: RunConfig
    row: Row
    gpu: Gpu
    num_gpus: int
    fixed: frozenset[str] = frozenset()
    """Dotted names of the fields that keep the value of ``config``."""
    usable: float = USABLE
    """Share of the memory that a plan may use."""
    tolerance: float = ROUNDING
    """Share by which the samples of a step may differ from the recipe's."""

    @property
    def limit(self) -> float:
        """Bytes that a rank may need."""
        return self.usable * self.gpu.memory


@dataclass(frozen=True)
class Family:
    """Combinations that differ only in details."""

    tensor: int
    pipeline: int
    recomputes_all: bool
    """Whether whole layers are recomputed. Selective recomputation saves so little that it makes no family."""
    vision: VisionParallel

    def __str__(self) -> str:
        recompute = "full recomputation" if self.recomputes_all else "no full recomputation"
        vision = ", vision part on every rank" if self.vision == "data" else ""
        return f"tensor {self.tensor}, pipeline {self.pipeline}, {recompute}{vision}"


@dataclass(frozen=True)
class Candidate:
    """A valid combination and its memory."""

    config: RunConfig
    """With the global batch in rows."""
    layout: Layout
    memory: tuple[RankMemory, ...]
    """By pipeline rank."""
    num_gpus: int

    @property
    def family(self) -> Family:
        parallel = self.config.parallel
        everything = self.config.training.recompute_granularity == "full"
        sizes = (parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size)
        return Family(*sizes, everything, parallel.vision_parallel)

    @property
    def data_parallel(self) -> int:
        return data_parallel_size(self.config.parallel, self.num_gpus)

    @property
    def micro_batches(self) -> int:
        return num_microbatches(self.config.training, self.data_parallel)

    @property
    def fullest(self) -> RankMemory:
        """The memory of the rank that needs most."""
        return max(self.memory, key=lambda memory: memory.total)

    @property
    def host_bytes(self) -> float:
        """Host memory that a save gathers on the rank that needs most."""
        return checkpoint_host_bytes(self.config, self.layout, self.data_parallel)


@dataclass(frozen=True)
class Plan:
    """A combination that fits, and its time."""

    candidate: Candidate
    time: StepTime
    gpu: Gpu

    @property
    def seconds_per_row(self) -> float:
        return self.time.seconds / self.candidate.config.training.global_batch_size

    @property
    def tokens_per_gpu(self) -> float:
        """Tokens per second and GPU."""
        return self.time.tokens / self.time.seconds / self.candidate.num_gpus

    @property
    def mfu(self) -> float:
        """Required operations as a share of the peak."""
        return self.time.required / self.time.seconds / self.candidate.num_gpus / self.gpu.peak

    @property
    def hours(self) -> float:
        """Hours of all ``train_iters`` steps."""
        return self.time.seconds * self.candidate.config.training.train_iters / 3600

    @property
    def gpu_hours(self) -> float:
        return self.hours * self.candidate.num_gpus


@dataclass(frozen=True)
class Answer:
    """What a search has found."""

    plans: tuple[Plan, ...]
    """The best of each family, the fastest first; at most ``NUM_SHOWN``."""
    rejected: tuple[str, ...]
    """A line for each family of which nothing is valid or fits."""
    num_valid: int
    num_fitting: int
    num_fitting_families: int


def in_thousandths(seconds: float) -> int:
    """Return a number that grows by one for each thousandth by which a time is longer; zero has the smallest."""
    return round(1000 * math.log(max(seconds, 1e-12)))
