"""The arguments from which the parts of the network are built. No part reads ranks from global state."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

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

    @property
    def sequence_parallel(self) -> bool:
        return bool(self.core.language.sequence_parallel)

    @property
    def tensor_parallel_size(self) -> int:
        return int(self.core.language.tensor_model_parallel_size)


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
    layers: nn.ModuleDict, hidden: Tensor, *, inputs: AttentionInputs, recompute: bool, inference: object = None
) -> Tensor:
    """Run layers in order, and return the hidden states in the shape of ``hidden``.

    Args:
        hidden: [s, b, h], or [s / tp, b, h] under sequence parallelism.
        recompute: drop each layer's activations and compute them again in the backward pass.
        inference: Megatron-Core's inference context, which holds the key-value cache.
    """

    def run(layer: nn.Module, hidden: Tensor) -> Tensor:
        output: Tensor = layer(
            hidden,
            attention_mask=inputs.mask,
            rotary_pos_emb=inputs.rotary,
            packed_seq_params=inputs.packed,
            inference_context=inference,
        )[0]
        return output

    for layer in layers.values():
        if recompute and layer.training:
            hidden = tensor_parallel.checkpoint(lambda x, layer=layer: run(layer, x), False, hidden)
        else:
            hidden = run(layer, hidden)
    return hidden
