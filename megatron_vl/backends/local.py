"""Layers from plain PyTorch, on CPU and GPU: norms that work under sequence parallelism, attention over packed rows.

Megatron-Core's own local parts do not serve here. ``WrappedTorchNorm`` refuses sequence parallelism,
``LocalSpecProvider.layer_norm(rms_norm=True)`` rewrites a module global and so changes every other norm of the
process, and ``DotProductAttention`` refuses packed sequences. The linear layers are Megatron-Core's.

Attention masks. A layer gets one tensor that says who may look at whom:

* ``None``: everybody at everybody (vision tower), or the plain causal triangle (language model);
* ``int64[...]``: the spans of a packed line as ``backends/spans.py`` writes them; attention is causal within a span,
  and its cost is that of the spans, not that of the line;
* ``bool[b, 1, sq, sk]``: True hides a key from a query (generation with a key-value cache);
* :class:`ScaledQueries`: one of the last two, and a factor for each query (evaluation above the native length).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_vl.backends.attention_inputs import AttentionInputs, ScaledQueries, scaled
from megatron_vl.backends.spans import SpanGroup, decode_groups, encode_groups, group_spans


class LayerNorm(nn.Module):
    """LayerNorm whose parameters are marked for Megatron-Core's gradient reduction under sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = _norm_parameter(torch.ones(hidden_size, dtype=config.params_dtype), config)
        self.bias = _norm_parameter(torch.zeros(hidden_size, dtype=config.params_dtype), config)

    def forward(self, hidden: Tensor) -> Tensor:
        return F.layer_norm(hidden, (hidden.shape[-1],), self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """RMSNorm in Qwen's order: normalise in fp32, cast back, then multiply by the weight."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = _norm_parameter(torch.ones(hidden_size, dtype=config.params_dtype), config)

    def forward(self, hidden: Tensor) -> Tensor:
        wide = hidden.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * scale).type_as(hidden) * self.weight


def _norm_parameter(value: Tensor, config: TransformerConfig) -> nn.Parameter:
    parameter = nn.Parameter(value)
    setattr(parameter, "sequence_parallel", config.sequence_parallel)
    return parameter


class SpanAttention(nn.Module):
    """``core_attention`` of a layer; see the module's docstring for the masks."""

    def __init__(self, config: TransformerConfig, attn_mask_type: AttnMaskType, **kwargs: Any) -> None:
        super().__init__()
        self.config = config
        self.causal = attn_mask_type == AttnMaskType.causal
        self.softmax_scale: float | None = kwargs.get("softmax_scale")

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | ScaledQueries | None, **_: Any
    ) -> Tensor:
        """query, key, value: [s, b, heads, d]; returns [s, b, heads * d]."""
        length, batch = query.shape[:2]
        if isinstance(attention_mask, ScaledQueries):
            query, attention_mask = query * attention_mask.scale.to(query.dtype), attention_mask.mask
        if attention_mask is not None and attention_mask.dtype == torch.int64:
            context = self._within_spans(query, key, value, attention_mask)
        else:
            mask = None if attention_mask is None else ~attention_mask
            heads_first = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
            context = self._attend(*heads_first, mask=mask).permute(2, 0, 1, 3)
        return context.reshape(length, batch, -1)

    def _within_spans(self, query: Tensor, key: Tensor, value: Tensor, encoded: Tensor) -> Tensor:
        """The line is a batch of one: batch its spans, attend within them, and lay the results out again."""
        lines = [tensor.squeeze(1) for tensor in (query, key, value)]
        length = query.shape[0]
        groups = decode_groups(encoded)
        if len(groups) == 1 and groups[0].positions.numel() == length:  # whole rows: batching is a reshape
            return self._attend_group(lines, groups[0])
        # Padding is written to one extra position behind the line, which is cut off.
        result = query.new_zeros(length + 1, query.shape[2] * query.shape[3])
        for group in groups:
            flat = group.positions.reshape(-1)
            chosen = flat.clamp(max=length - 1)
            context = self._attend_group([line.index_select(0, chosen) for line in lines], group)
            result = result.index_copy(0, flat, context)
        return result[:length]

    def _attend_group(self, lines: list[Tensor], group: SpanGroup) -> Tensor:
        """lines: query, key and value as [spans * longest, heads, d]; returns [spans * longest, heads * d]."""
        shape = (group.num_spans, group.longest)
        query, key, value = (line.view(*shape, *line.shape[1:]).transpose(1, 2) for line in lines)
        return self._attend(query, key, value, mask=None).transpose(1, 2).reshape(shape[0] * shape[1], -1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None) -> Tensor:
        """query, key, value: [b, heads, s, d]."""
        causal = self.causal and mask is None and query.shape[2] > 1
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=causal, scale=self.softmax_scale
        )


class LocalBackend:
    """Layer specs of plain PyTorch parts, and what their attention needs to know of a batch."""

    name = "local"

    def vision_layer(self) -> ModuleSpec:
        """A pre-norm block with LayerNorm and attention without a mask."""
        return _layer(LayerNorm, AttnMaskType.no_mask)

    def language_layer(self) -> ModuleSpec:
        """A pre-norm block with RMSNorm and causal attention."""
        return _layer(RMSNorm, AttnMaskType.causal)

    def final_norm(self) -> type[nn.Module]:
        """The norm before the output layer."""
        return RMSNorm

    def attention_inputs(self, cu_seqlens: Tensor, positions: Tensor, rotary_table: Tensor) -> AttentionInputs:
        """Masks and angles of a packed line.

        Args:
            cu_seqlens: int32[spans + 1], borders of the attention spans on the line.
            positions: int64[t], index of each token within its span.
            rotary_table: float[longest, 1, 1, d], angles by position.
        """
        return AttentionInputs(
            mask=encode_groups(group_spans(cu_seqlens)), rotary=rotary_table.index_select(0, positions), packed=None
        )

    def long_attention_inputs(
        self, cu_seqlens: Tensor, angles: Tensor, query_scale: Tensor | None
    ) -> AttentionInputs:
        """Masks and angles of a packed line in evaluation, where spans are longer than the native length.

        Args:
            angles: float[t, 1, 1, d], of each token.
            query_scale: float[t], the factor of each token's query, if there is one.
        """
        mask = scaled(encode_groups(group_spans(cu_seqlens)), query_scale)
        return AttentionInputs(mask=mask, rotary=angles, packed=None)


def _layer(norm: type[nn.Module], mask: AttnMaskType) -> ModuleSpec:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    spec = copy.deepcopy(get_gpt_layer_local_spec())
    layer = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = norm
    layer.self_attention.params = {"attn_mask_type": mask}
    layer.self_attention.submodules.core_attention = SpanAttention
    # Checkpoint keys are the plain names of this file; te.py maps its fused names onto them.
    layer.sharded_state_dict_keys_map = {}
    return spec
