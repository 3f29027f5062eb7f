"""Build the network of a run: this rank's chunks, initialized and frozen as configured."""

from __future__ import annotations

from dataclasses import replace

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_vl.backends import core
from megatron_vl.backends.interface import Backend
from megatron_vl.config.schema import RunConfig
from megatron_vl.errors import ConfigError
from megatron_vl.model.backend import select_backend
from megatron_vl.model.configs import Target, core_configs
from megatron_vl.model.context import BuildContext
from megatron_vl.model.freeze import freeze
from megatron_vl.model.initialize import initialize, mark_tensor_parallel
from megatron_vl.model.qwen_vl import QwenVL
from megatron_vl.model.rotary import LongContext
from megatron_vl.parallel.rng import seed_layers
from megatron_vl.parallel.topology import Topology
from megatron_vl.planning.flops import FrozenParts
from megatron_vl.planning.layout import PipelineLayout, resolve_layout, vision_part
from megatron_vl.planning.parameters import POSITION_TABLE, trains


def build_model(config: RunConfig, topology: Topology, *, fresh_weights: bool = True) -> list[QwenVL]:
    """Build this rank's model chunks, one for each virtual stage.

    Under ``vision_parallel data`` they are those of the language model; :func:`build_vision_part` builds the rest.

    Args:
        fresh_weights: initialize the weights (the same for every layout); otherwise they are undefined until a
            checkpoint is loaded.
    """
    layout = resolve_layout(config)
    backend = _select_backend(config)
    _check_validation(config, backend)
    context = _context(config, topology.groups, backend, device=topology.device.type)
    virtual = topology.vp_size > 1
    seed_layers(config.training.seed)
    chunks = [
        QwenVL(context, layout.stage(topology.pp_rank, chunk), vp_stage=chunk if virtual else None)
        for chunk in range(topology.vp_size)
    ]
    for number, chunk in enumerate(chunks):
        _finish(chunk, config, topology, fresh_weights=fresh_weights)
        freeze(chunk, config.training, before=layout.stages[: layout.stage_index(topology.pp_rank, number)])
    return chunks


def build_vision_part(config: RunConfig, topology: Topology, *, fresh_weights: bool = True) -> QwenVL:
    """Build vision tower and resampler, whole on this rank: a chunk beside those of :func:`build_model`."""
    parallel = replace(
        config.parallel,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        virtual_pipeline_model_parallel_size=None,
        sequence_parallel=False,
    )
    backend, training = _select_backend(config), config.training
    if config.parallel.vision_recompute:  # images are encoded again as a whole, so layers are not, or layers are
        layers = config.parallel.vision_recompute_granularity == "layers"
        training = replace(training, recompute_granularity="full" if layers else None)
    alone = replace(config, parallel=parallel, training=training)
    context = _context(alone, topology.vision_groups, backend, device=topology.device.type)
    chunk = QwenVL(context, vision_part(config.model))
    _finish(chunk, config, topology, fresh_weights=fresh_weights)
    freeze(chunk, config.training, before=())
    return chunk


def _select_backend(config: RunConfig) -> Backend:
    training = config.training
    recipe = None if training.fp8_format is None else training.fp8_recipe
    return select_backend(config.parallel.backend, bf16=training.bf16, fp8_recipe=recipe)


def _finish(chunk: QwenVL, config: RunConfig, topology: Topology, *, fresh_weights: bool) -> None:
    """Mark and initialize the parameters of a chunk, and bring them to the device."""
    mark_tensor_parallel(chunk)
    if fresh_weights:
        initialize(chunk, config.model, seed=config.training.seed, tp_group=chunk.groups.tp)
    chunk.to(topology.device)


def build_on_meta(config: RunConfig, topology: Topology) -> QwenVL:
    """Build the whole network in one chunk on the meta device: names, shapes and counts, without memory for weights."""
    layout = PipelineLayout.whole(config.model)
    with torch.device("meta"):
        return QwenVL(_context(config, topology.groups, select_backend("local"), device="meta"), layout.stages[0])


def _context(config: RunConfig, groups: ProcessGroupCollection, backend: Backend, *, device: str) -> BuildContext:
    configs = core_configs(config, Target(device, transformer_engine=backend.name == "transformer_engine"))
    assert core.is_installed(), "prepare_process comes first: without it the vision tower would compute another GELU"
    return BuildContext(
        model=config.model,
        core=configs,
        backend=backend,
        groups=groups,
        recompute_layers=config.training.recompute_granularity == "full",
        trains_position_table=trains(POSITION_TABLE, FrozenParts.of(config.training)),
    )


def _check_validation(config: RunConfig, backend: Backend) -> None:
    """Refuse now what the backend would refuse at the first validation, hours later."""
    needed = LongContext(config.model.language).needed(config.data.seq_length)
    if config.data.valid_data_path and needed and backend.name == "transformer_engine":
        native, length = config.model.language.native_seq_length, config.data.seq_length
        raise ConfigError(
            f"data.seq_length {length} is above model.language.native_seq_length {native}: validation would use "
            "dynamic NTK and logn attention, which the transformer_engine backend does not have. Use --backend local; "
            f"or, for a model that has learned rows of that length, --native-seq-length {length}; or both "
            "--no-use-dynamic-ntk and --no-use-logn-attn"
        )
