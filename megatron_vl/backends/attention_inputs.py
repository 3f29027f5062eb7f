"""What a layer's attention needs to know of a batch: the records that backends make and the model passes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedLine:
    """Where the attention spans of a packed line lie."""

    lengths: Sequence[int]
    """Of the spans, known without asking a device."""
    cu_seqlens: Tensor
    """int32[spans + 1], their borders."""
    positions: Tensor
    """int64[t], index of each token within its span."""

    @classmethod
    def of(cls, lengths: Sequence[int]) -> PackedLine:
        """Spans of these lengths, on the CPU."""
        borders = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        return cls(lengths, borders, torch.cat([torch.arange(length) for length in lengths]))

    @property
    def longest(self) -> int:
        return max(self.lengths)


@dataclass(frozen=True)
class AttentionInputs:
    """Arguments of ``TransformerLayer.forward`` beside the hidden states."""

    mask: Tensor | None = None
    """``attention_mask``, in the form that the backend's attention reads."""
    rotary: Tensor | None = None
    """``rotary_pos_emb``: angles [t, 1, 1, d], or [longest, 1, 1, d] for packed parameters; None where the backend's
    attention has them elsewhere, or there are none."""
    packed: Any | None = None
    """Megatron-Core's ``PackedSeqParams``, or what a backend has in its place."""
