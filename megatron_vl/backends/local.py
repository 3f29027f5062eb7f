"""Layers from plain PyTorch, on CPU and GPU: norms that work under sequence parallelism, attention over packed rows.

Megatron-Core's own local parts do not serve here. ``WrappedTorchNorm`` refuses sequence parallelism,
``LocalSpecProvider.layer_norm(rms_norm=True)`` rewrites a module global and so changes every other norm of the
process, and ``DotProductAttention`` refuses packed sequences. The linear layers are Megatron-Core's.

Who may look at whom. Without a mask everybody may at everybody (vision tower), or at what lies before (language model);
``bool[b, 1, sq, sk]`` hides a key from a query where it is True (generation with a key-value cache). Everything else is
in :class:`LocalInputs`, which Megatron-Core hands on as packed parameters: it looks at ``qkv_format`` alone, and its
recomputation keeps them, where a mask may be nothing but a tensor. With spans, attention is causal within each, and its
cost is that of the spans, not that of the line.

Rotary angles of a packed line are in it too, so that their cosines and sines are computed once for all layers.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_vl.backends import kernels
from megatron_vl.backends.attention_inputs import AttentionInputs, PackedLine
from megatron_vl.backends.spans import SpanGroup, group_spans


@dataclass(frozen=True)
class LocalInputs:
    """What :class:`SpanAttention` is told beside the mask."""

    line: PackedLine | None = None
    """The spans within which to attend."""
    groups: tuple[SpanGroup, ...] = ()
    """Those spans as batches, where no kernel takes them as they are."""
    rotary: tuple[Tensor, Tensor] | None = None
    """Cosines and sines of the angles of queries and keys, [t, 1, 1, d], if they have not been rotated before."""
    query_scale: Tensor | None = None
    """float32[sq, 1 or b, 1, 1]: a factor for each query (evaluation above the native length)."""
    qkv_format: str = "sbhd"
    """The form that Megatron-Core leaves queries, keys and values in: [s, b, heads, d]."""


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
    """RMSNorm, as ``kernels.py`` computes it on the device."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = _norm_parameter(torch.ones(hidden_size, dtype=config.params_dtype), config)

    def forward(self, hidden: Tensor) -> Tensor:
        return kernels.rms_norm(hidden, self.weight, self.eps)


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
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *,
        packed_seq_params: LocalInputs | None = None,
        **_: Any,
    ) -> Tensor:
        """query, key, value: [s, b, heads, d]; returns [s, b, heads * d]."""
        length, batch = query.shape[:2]
        told = packed_seq_params or LocalInputs()
        if told.rotary is not None:
            query, key = kernels.rotate(query, *told.rotary), kernels.rotate(key, *told.rotary)
        if told.query_scale is not None:
            query = query * told.query_scale.to(query.dtype)
        if told.line is not None:
            lines = [tensor.squeeze(1) for tensor in (query, key, value)]
            context = self._within_spans(lines, told.groups) if told.groups else self._packed(lines, told.line)
        else:
            mask = None if attention_mask is None else ~attention_mask
            heads_first = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
            context = self._attend(*heads_first, mask=mask).permute(2, 0, 1, 3)
        return context.reshape(length, batch, -1)

    def _packed(self, lines: list[Tensor], line: PackedLine) -> Tensor:
        """lines: query, key and value as [t, heads, d]; returns the same form."""
        return kernels.varlen_attention(lines, line.cu_seqlens, line.longest, self.softmax_scale)

    def _within_spans(self, lines: list[Tensor], groups: tuple[SpanGroup, ...]) -> Tensor:
        """The line is a batch of one: batch its spans, attend within them, and lay the results out again."""
        query = lines[0]
        length = query.shape[0]
        if len(groups) == 1 and groups[0].positions.numel() == length:  # whole rows: batching is a reshape
            return self._attend_group(lines, groups[0])
        # Padding is written to one extra position behind the line, which is cut off.
        result = query.new_zeros(length + 1, query.shape[1] * query.shape[2])
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
        return kernels.attention(query, key, value, mask, is_causal=causal, scale=self.softmax_scale)


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

    def attention_inputs(self, line: PackedLine, rotary_table: Tensor, *, dtype: torch.dtype) -> AttentionInputs:
        """What the layers are told of a packed line.

        Args:
            rotary_table: float[longest, 1, 1, d], angles by position.
            dtype: of the hidden states.
        """
        return self.long_attention_inputs(line, rotary_table.index_select(0, line.positions), None, dtype=dtype)

    def long_attention_inputs(
        self, line: PackedLine, angles: Tensor, query_scale: Tensor | None, *, dtype: torch.dtype
    ) -> AttentionInputs:
        """What the layers are told in evaluation of a line with spans that are longer than the native length.

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
    # Checkpoint keys are the plain names of this file; te.py maps its fused names onto them.
    layer.sharded_state_dict_keys_map = {}
    return spec
