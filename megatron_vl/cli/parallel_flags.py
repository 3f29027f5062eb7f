"""Flags of the commands that load a checkpoint at any layout: the parallel sizes under Megatron's names."""

from __future__ import annotations

import argparse

from megatron_vl.cli.command import check_at_least
from megatron_vl.config.batch import data_parallel_size
from megatron_vl.config.schema import ParallelConfig
from megatron_vl.launch import read_launch


def add_parallel_flags(parser: argparse.ArgumentParser) -> None:
    """Add the parallel sizes; the data-parallel size follows from the world size."""
    group = parser.add_argument_group("layout", "how the model is spread over the ranks that torchrun started")
    group.add_argument("--tensor-model-parallel-size", type=int, default=1, metavar="N", help="ranks of a layer")
    group.add_argument("--pipeline-model-parallel-size", type=int, default=1, metavar="N", help="pipeline stages")
    group.add_argument("--pipeline-layout", default="auto", help="stages over the line V..V R L..L, or auto")


def check_ranks(options: argparse.Namespace) -> None:
    """Raise ConfigError unless the number of ranks is a multiple of one model replica."""
    data_parallel_size(parallel_config(options), read_launch().world_size)


def parallel_config(options: argparse.Namespace) -> ParallelConfig:
    """Return the configuration of those flags. Raises ConfigError for a size below 1."""
    check_at_least("--tensor-model-parallel-size", options.tensor_model_parallel_size, 1)
    check_at_least("--pipeline-model-parallel-size", options.pipeline_model_parallel_size, 1)
    return ParallelConfig(
        tensor_model_parallel_size=options.tensor_model_parallel_size,
        pipeline_model_parallel_size=options.pipeline_model_parallel_size,
        pipeline_layout=options.pipeline_layout,
        backend="local",
    )
