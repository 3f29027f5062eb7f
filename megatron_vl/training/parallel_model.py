"""The model as it is trained: chunks wrapped for data parallelism, with the hooks that the schedules call.

With ``overlap_param_gather``, each rank has the new weights of its own shard after a step, and old weights elsewhere.
The next forward pass gathers the rest, module by module. Code that reads weights outside a forward pass must use
:attr:`ParallelModel.chunks` or ``QwenVL.sharded_state_dict``, which gather first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import ChainedOptimizer

from megatron_vl.config.schema import RunConfig
from megatron_vl.model.build import build_model, build_vision_part
from megatron_vl.model.qwen_vl import QwenVL
from megatron_vl.parallel.topology import Topology
from megatron_vl.training.image_encoder import ImageEncoder
from megatron_vl.training.optimizer import build_optimizer, build_vision_optimizer, chain


@dataclass(frozen=True)
class ParallelModel:
    """This rank's part of the network and its optimizer."""

    wrapped: list[DistributedDataParallel]
    """For the schedule's forward and backward passes."""
    optimizer: ChainedOptimizer
    encoder: ImageEncoder | None = None
    """The vision part under ``vision_parallel data``; elsewhere it is in ``wrapped``."""

    @property
    def chunks(self) -> list[QwenVL]:
        """The network itself, with all weights gathered; all data-parallel ranks must read this property together."""
        chunks: list[QwenVL] = [wrapped.module for wrapped in self.all_wrapped]
        for chunk in chunks:
            chunk.make_weights_whole()
        return chunks

    @property
    def all_wrapped(self) -> list[DistributedDataParallel]:
        """All wrapped chunks, the vision part included."""
        return [self.encoder.wrapped, *self.wrapped] if self.encoder else self.wrapped

    def zero_grad(self) -> None:
        """Set all gradients to zero."""
        for chunk in self.all_wrapped:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()


def build_parallel_model(config: RunConfig, topology: Topology, *, fresh_weights: bool = True) -> ParallelModel:
    """Build the model, wrap it, and build its optimizer."""
    chunks = build_model(config, topology, fresh_weights=fresh_weights)
    wrapped = wrap_chunks(chunks, config)
    optimizer = build_optimizer(config, wrapped)
    if config.parallel.vision_parallel == "pipeline":
        return ParallelModel(wrapped, optimizer)
    vision = _wrap_vision_part(build_vision_part(config, topology, fresh_weights=fresh_weights), config, topology)
    both = chain(optimizer, build_vision_optimizer(config, vision, topology))
    return ParallelModel(wrapped, both, ImageEncoder(vision, config, topology))


def _wrap_vision_part(chunk: QwenVL, config: RunConfig, topology: Topology) -> DistributedDataParallel:
    """Wrap the vision part for data parallelism over all ranks.

    Its backward pass is the last work of a step, in parts that do not cover all parameters in turn. So its gradients
    are reduced, and its weights gathered, in one go.
    """
    settings = replace(_ddp_config(config), overlap_grad_reduce=False, overlap_param_gather=False)
    return DistributedDataParallel(chunk.config, settings, chunk, pg_collection=topology.vision_groups)


def wrap_chunks(chunks: Sequence[QwenVL], config: RunConfig) -> list[DistributedDataParallel]:
    """Wrap chunks for data parallelism, and connect them to Megatron-Core's schedules.

    Gradients need nothing more. After a backward pass they are in ``main_grad`` of each parameter.
    """
    wrapped = [
        DistributedDataParallel(
            chunk.config,
            _ddp_config(config),
            chunk,
            # Buckets of later chunks fill while earlier ones still run; overlapping them gains nothing.
            disable_bucketing=number > 0,
        )
        for number, chunk in enumerate(chunks)
    ]
    _connect(chunks[0].config, config=config, wrapped=wrapped)
    return wrapped


def _ddp_config(config: RunConfig) -> DistributedDataParallelConfig:
    parallel = config.parallel
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        check_for_nan_in_grad=False,  # the step checks the norm, and skips on all ranks
    )


def _connect(schedule: Any, *, config: RunConfig, wrapped: list[DistributedDataParallel]) -> None:
    """Tell the schedules when and how to reduce gradients. fp32 and bf16 have no loss scale.

    ``finalize_model_grads`` also divides them, by the supervised tokens of the global batch (``model/configs.py``:
    ``calculate_per_token_loss``).
    """
    schedule.finalize_model_grads_func = finalize_model_grads
    if config.parallel.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in wrapped]
        schedule.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    if config.parallel.overlap_param_gather:
        for chunk in wrapped:
            # Gathering itself needs no call: each module waits for its own weights, and starts the next bucket.
            chunk.module.make_weights_whole = partial(chunk.start_param_sync, force_sync=True)
