"""The arguments from which the parts of the network are built. No part reads ranks from global state."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_vl.backends import fp8, te
from megatron_vl.backends.attention_inputs import AttentionInputs
from megatron_vl.backends.interface import Backend
from megatron_vl.config.schema import ModelConfig
from megatron_vl.model.configs import CoreConfigs


@dataclass(frozen=True)
class BuildContext:
    """Sizes, implementations and process groups of the network."""

    model: ModelConfig
    core: CoreConfigs
    backend: Backend
    groups: ProcessGroupCollection
    recompute_layers: bool
    """Whether to recompute whole layers in the backward pass."""
    trains_position_table: bool
    """Whether the resampler's ``pos_embed`` is a parameter."""

    def execution(self, config: TransformerConfig) -> LayerExecution:
        """Return how the layers of the tower with this configuration run."""
        return LayerExecution(config, self.groups.tp, self.recompute_layers)

    @property
    def sequence_parallel(self) -> bool:
        return bool(self.core.language.sequence_parallel)

    @property
    def tensor_parallel_size(self) -> int:
        return int(self.core.language.tensor_model_parallel_size)


@dataclass(frozen=True)
class LayerExecution:
    """How the layers of a tower run in training. In evaluation they keep nothing and compute without FP8."""

    config: TransformerConfig
    """Of the tower; it says what is computed in FP8."""
    tensor_group: ProcessGroup
    recompute: bool
    """Whether to drop each layer's activations and compute them again in the backward pass."""


def build_layers(
    context: BuildContext, spec: ModuleSpec, *, config: TransformerConfig, numbers: range
) -> nn.ModuleDict:
    """Build transformer layers. Their keys are their global numbers, which are also their names in checkpoints."""
    return nn.ModuleDict(
        {
            str(number): build_module(spec, config=config, layer_number=number + 1, pg_collection=context.groups)
            for number in numbers
        }
    )


def run_layers(
    layers: nn.ModuleDict,
    hidden: Tensor,
    *,
    inputs: AttentionInputs,
    execution: LayerExecution,
    inference: object = None,
) -> Tensor:
    """Run layers in order, and return the hidden states in the shape of ``hidden``.

    Args:
        layers: by their global numbers.
        hidden: [s, b, h], or [s / tp, b, h] under sequence parallelism.
        inference: Megatron-Core's inference context, which holds the key-value cache.
    """
    config, training = execution.config, layers.training
    recompute = execution.recompute and training and torch.is_grad_enabled()

    def run(number: str, hidden: Tensor) -> Tensor:
        with fp8.around_layer(config, int(number), training=training):
            output: Tensor = layers[number](
                hidden,
                attention_mask=inputs.mask,
                rotary_pos_emb=inputs.rotary,
                packed_seq_params=inputs.packed,
                inference_context=inference,
            )[0]
        return output

    with fp8.around_layers(config, training=training):
        for number in layers:
            if not recompute:
                hidden = run(number, hidden)
            elif config.fp8:
                hidden = te.recompute(partial(run, number), hidden, execution.tensor_group)
            else:
                hidden = tensor_parallel.checkpoint(partial(run, number), False, hidden)
    return hidden
