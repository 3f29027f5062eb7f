"""Attention of the local backend: over packed rows, with a mask, or over everything.

Without a mask, queries attend to all keys (vision tower), or to all earlier keys (language model). A mask ``bool[b, 1,
sq, sk]`` hides a key from a query where it is True (generation with a key-value cache). All other inputs are in
:class:`LocalInputs`, which Megatron-Core passes on as packed parameters. It reads only their ``qkv_format``, and its
recomputation keeps them, while a mask must be a tensor. With spans, attention is causal within each span. Its cost
depends on the spans, not on the length of the packed sequence.

The rotary angles of a packed sequence are there too, so that their cosines and sines are computed once for all layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_vl.backends import kernels
from megatron_vl.backends.attention_inputs import PackedLine
from megatron_vl.backends.local.spans import SpanGroup


@dataclass(frozen=True)
class LocalInputs:
    """The inputs of :class:`SpanAttention` besides the mask."""

    line: PackedLine | None = None
    """The spans within which to attend."""
    groups: tuple[SpanGroup, ...] = ()
    """Those spans as batches, if no kernel takes them unbatched."""
    rotary: tuple[Tensor, Tensor] | None = None
    """Cosines and sines of the angles of queries and keys, [t, 1, 1, d], if they have not been rotated before."""
    query_scale: Tensor | None = None
    """float32[sq, 1 or b, 1, 1]: a factor for each query (evaluation above the native length)."""
    qkv_format: str = "sbhd"
    """The form in which Megatron-Core leaves queries, keys and values: [s, b, heads, d]."""


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
        """Attend from query to key and value, [s, b, heads, d] each; return [s, b, heads * d]."""
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
        """Attend within spans. ``lines`` are query, key and value as [t, heads, d]; the result has the same form."""
        return kernels.varlen_attention(lines, line.cu_seqlens, line.longest, self.softmax_scale)

    def _within_spans(self, lines: list[Tensor], groups: tuple[SpanGroup, ...]) -> Tensor:
        """Batch the spans of the packed sequence, attend within them, and restore the order of the sequence."""
        query = lines[0]
        length = query.shape[0]
        if len(groups) == 1 and groups[0].positions.numel() == length:  # whole rows: batching is a reshape
            return self._attend_group(lines, groups[0])
        # Padding is written to one extra position after the sequence, which is cut off.
        result = query.new_zeros(length + 1, query.shape[1] * query.shape[2])
        for group in groups:
            flat = group.positions.reshape(-1)
            chosen = flat.clamp(max=length - 1)
            context = self._attend_group([line.index_select(0, chosen) for line in lines], group)
            result = result.index_copy(0, flat, context)
        return result[:length]

    def _attend_group(self, lines: list[Tensor], group: SpanGroup) -> Tensor:
        """Attend within one group: ``lines`` [spans * longest, heads, d] each -> [spans * longest, heads * d]."""
        shape = (group.num_spans, group.longest)
        query, key, value = (line.view(*shape, *line.shape[1:]).transpose(1, 2) for line in lines)
        return self._attend(query, key, value, mask=None).transpose(1, 2).reshape(shape[0] * shape[1], -1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None) -> Tensor:
        """Attend from query to key and value, [b, heads, s, d] each."""
        causal = self.causal and mask is None and query.shape[2] > 1
        return kernels.attention(query, key, value, mask, is_causal=causal, scale=self.softmax_scale)
