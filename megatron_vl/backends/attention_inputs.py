"""The attention inputs of a batch: records that backends build and the model passes to the layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedLine:
    """The attention spans of a packed sequence."""

    lengths: Sequence[int]
    """Lengths of the spans, known without asking a device."""
    cu_seqlens: Tensor
    """int32[spans + 1], the boundaries of the spans."""
    positions: Tensor
    """int64[t], index of each token within its span."""

    @classmethod
    def of(cls, lengths: Sequence[int]) -> PackedLine:
        """Return spans of these lengths, on the CPU."""
        borders = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        return cls(lengths, borders, torch.cat([torch.arange(length) for length in lengths]))

    @property
    def longest(self) -> int:
        return max(self.lengths)


@dataclass(frozen=True)
class AttentionInputs:
    """Arguments of ``TransformerLayer.forward`` besides the hidden states."""

    mask: Tensor | None = None
    """``attention_mask``, in the form that the backend's attention reads."""
    rotary: Tensor | None = None
    """``rotary_pos_emb``: angles [t, 1, 1, d], or [longest, 1, 1, d] for packed parameters.

    None if the backend's attention takes them elsewhere, or if there are none.
    """
    packed: Any | None = None
    """Megatron-Core's ``PackedSeqParams``, or the backend's replacement for it."""
