"""Flags of the commands that load a checkpoint at any layout: the parallel sizes under Megatron's names."""

from __future__ import annotations

import argparse

from megatron_vl.config.schema import ParallelConfig


def add_parallel_flags(parser: argparse.ArgumentParser) -> None:
    """Add the parallel sizes; data-parallel ranks are what remains of the world."""
    group = parser.add_argument_group("layout", "how the model is spread over the ranks that torchrun started")
    group.add_argument("--tensor-model-parallel-size", type=int, default=1, metavar="N", help="ranks of a layer")
    group.add_argument("--pipeline-model-parallel-size", type=int, default=1, metavar="N", help="pipeline stages")
    group.add_argument("--pipeline-layout", default="auto", help="stages over the line V..V R L..L, or auto")


def parallel_config(options: argparse.Namespace) -> ParallelConfig:
    """The configuration of those flags."""
    return ParallelConfig(
        tensor_model_parallel_size=options.tensor_model_parallel_size,
        pipeline_model_parallel_size=options.pipeline_model_parallel_size,
        pipeline_layout=options.pipeline_layout,
        backend="local",
    )
