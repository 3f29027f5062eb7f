"""The arithmetic of batches: ranks, rows and samples.

How many rows a step of so many samples holds depends on the parallel layout only where the number that is right for all
the usual layouts cannot be divided over it. So a run that goes on at another layout goes on with the same batches,
except there; the run then says so.
"""

from __future__ import annotations

from dataclasses import replace

from megatron_vl.config.schema import ParallelConfig, RunConfig, TrainingConfig
from megatron_vl.errors import ConfigError

ROUNDING = 0.04
"""A global batch that is counted in samples may be off by this share of itself."""


def model_parallel_size(parallel: ParallelConfig) -> int:
    """Ranks that hold one copy of the model."""
    return parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size


def data_parallel_size(parallel: ParallelConfig, world_size: int) -> int:
    """Copies of the model among ``world_size`` ranks; raises ``ConfigError`` if they are no whole number."""
    size = model_parallel_size(parallel)
    if world_size < size or world_size % size:
        tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
        raise ConfigError(
            f"the run has {world_size} ranks, but parallel.tensor_model_parallel_size {tensor} x "
            f"parallel.pipeline_model_parallel_size {pipeline} = {size} ranks hold one copy of the model, and "
            f"{world_size} is not a multiple of {size}. Start {size * max(1, world_size // size)} ranks, or change "
            "the parallel sizes"
        )
    return world_size // size


def rows_per_step(num_samples: int, samples_per_row: float, *, multiple_of: int = 1) -> int:
    """Return the rows that hold ``num_samples`` samples on average, where a row holds ``samples_per_row``.

    Of the numbers within 4 % of the quotient it is the one divisible by the highest power of two (the nearest such),
    so that the usual data-parallel sizes divide it. Where ``multiple_of`` does not, the nearest multiple of it counts.
    """
    assert num_samples > 0 and samples_per_row > 0
    exact = num_samples / samples_per_row
    unit = 1
    while abs(round(exact / (2 * unit)) * 2 * unit - exact) <= ROUNDING * exact:
        unit *= 2
    rows = max(1, round(exact / unit)) * unit
    return rows if rows % multiple_of == 0 else max(1, round(exact / multiple_of)) * multiple_of


def with_rows(config: RunConfig, samples_per_row: float, world_size: int | None) -> RunConfig:
    """Return ``config`` with a global batch counted in samples turned into rows; as it is if it counts rows.

    Args:
        samples_per_row: mean of the data sets (1.0 if unpacked).
        world_size: ranks over which the rows are to divide; None for any.

    Raises:
        ConfigError: the parallel sizes do not fit ``world_size``.
    """
    training = config.training
    if training.global_batch_samples is None:
        return config
    multiple = 1 if world_size is None else _smallest_step(config, world_size)
    rows = rows_per_step(training.global_batch_samples, samples_per_row, multiple_of=multiple)
    return replace(config, training=replace(training, global_batch_size=rows, global_batch_samples=None))


def _smallest_step(config: RunConfig, world_size: int) -> int:
    """Return the rows of one micro-batch on every data-parallel rank, or of a whole pipeline of virtual stages."""
    parallel = config.parallel
    fill = parallel.pipeline_model_parallel_size if parallel.virtual_pipeline_model_parallel_size is not None else 1
    return config.training.micro_batch_size * data_parallel_size(parallel, world_size) * fill


def num_microbatches(training: TrainingConfig, data_parallel: int) -> int:
    """Micro-batches that each data-parallel rank computes in a step; raises ``ConfigError`` if no whole number."""
    rows, micro = training.global_batch_size, training.micro_batch_size
    if rows < micro * data_parallel or rows % (micro * data_parallel):
        step = micro * data_parallel
        below, above = rows // step * step, (rows // step + 1) * step
        near = f"{below} or {above}" if below else str(above)
        raise ConfigError(
            f"training.global_batch_size is {rows} rows, which is not a multiple of training.micro_batch_size {micro} "
            f"x data-parallel size {data_parallel} = {step}; the nearest that fit: {near}"
        )
    return rows // (micro * data_parallel)
