"""The local backend: layer specs of its norms and its attention, and Megatron-Core's linear layers."""

from __future__ import annotations

import copy

import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor, nn

from megatron_vl.backends import kernels
from megatron_vl.backends.attention_inputs import AttentionInputs, PackedLine
from megatron_vl.backends.local.attention import LocalInputs, SpanAttention
from megatron_vl.backends.local.norms import LayerNorm, RMSNorm
from megatron_vl.backends.local.spans import group_spans


class LocalBackend:
    """Layer specs of plain PyTorch parts, and their attention inputs."""

    name = "local"

    def vision_layer(self) -> ModuleSpec:
        """Return a pre-norm block with LayerNorm and attention without a mask."""
        return _layer(LayerNorm, AttnMaskType.no_mask)

    def language_layer(self) -> ModuleSpec:
        """Return a pre-norm block with RMSNorm and causal attention."""
        return _layer(RMSNorm, AttnMaskType.causal)

    def final_norm(self) -> type[nn.Module]:
        """Return the class of the norm before the output layer."""
        return RMSNorm

    def attention_inputs(self, line: PackedLine, rotary_table: Tensor, *, dtype: torch.dtype) -> AttentionInputs:
        """Return the attention inputs of a packed sequence of t tokens.

        Args:
            rotary_table: float[longest, 1, 1, d], angles by position.
            dtype: of the hidden states.
        """
        return self.long_attention_inputs(line, rotary_table.index_select(0, line.positions), None, dtype=dtype)

    def long_attention_inputs(
        self, line: PackedLine, angles: Tensor, query_scale: Tensor | None, *, dtype: torch.dtype
    ) -> AttentionInputs:
        """Return the attention inputs, in evaluation, of a sequence with spans that are longer than the native length.

        Args:
            angles: float[t, 1, 1, d], of each token.
            query_scale: float[t], the factor of each token's query, if there is one.
            dtype: of the hidden states.
        """
        device = line.cu_seqlens.device
        told = LocalInputs(
            line=line,
            groups=() if kernels.has_varlen(device, dtype) else group_spans(line.lengths, device),
            rotary=(angles.cos().to(dtype), angles.sin().to(dtype)),
            query_scale=None if query_scale is None else query_scale.view(-1, 1, 1, 1),
        )
        return AttentionInputs(packed=told)


def _layer(norm: type[nn.Module], mask: AttnMaskType) -> ModuleSpec:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    spec = copy.deepcopy(get_gpt_layer_local_spec())
    layer = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = norm
    layer.self_attention.params = {"attn_mask_type": mask}
    layer.self_attention.submodules.core_attention = SpanAttention
    # Checkpoint keys are the plain names given here; te.py maps its fused names onto them.
    layer.sharded_state_dict_keys_map = {}
    return spec
