"""Flags of the tools that compute with a checkpoint: which one, in which precision, and at which layout."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_vl.checkpoint import store
from megatron_vl.cli.command import check_at_least
from megatron_vl.config.batch import data_parallel_size
from megatron_vl.config.schema import ParallelConfig
from megatron_vl.config.validate import check_tensor_parallel
from megatron_vl.launch import read_launch


def add_inference_flags(parser: argparse.ArgumentParser) -> None:
    """Add checkpoint, precision and parallel sizes; the data-parallel size follows from the world size."""
    parser.add_argument("--checkpoint", type=Path, required=True, help="checkpoint, or directory of them (newest)")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16 (default: float32)")
    group = parser.add_argument_group("layout", "how the model is spread over the ranks that torchrun started")
    group.add_argument("--tensor-model-parallel-size", type=int, default=1, metavar="N", help="ranks of a layer")
    group.add_argument("--pipeline-model-parallel-size", type=int, default=1, metavar="N", help="pipeline stages")
    group.add_argument(
        "--pipeline-layout", default="auto", help="layers of each stage, for example V*48RL*12|L*20, or auto"
    )


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


def check_layout(options: argparse.Namespace) -> None:
    """Check that the ranks hold whole replicas of the checkpoint's model, before torch is imported.

    Only rank 0 looks at the checkpoint, which it also chooses later for all: a training may save a newer one meanwhile.

    Raises:
        CheckpointError: if there is no checkpoint.
        ConfigError: if the number of ranks is no multiple of one replica, or the model cannot be split so.
    """
    parallel = parallel_config(options)
    launch = read_launch()
    data_parallel_size(parallel, launch.world_size)
    if launch.rank == 0:
        check_tensor_parallel(store.read_config(store.resolve(options.checkpoint)).model, parallel)
