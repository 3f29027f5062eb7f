"""What a layer's attention needs to know of a batch: the records that backends make and the model passes on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class ScaledQueries:
    """A mask together with a factor for each query: of what a layer gets, its attention sees the mask alone.

    Only for evaluation: Megatron-Core's recomputation takes nothing but tensors.
    """

    mask: Tensor
    scale: Tensor
    """float32[sq, 1 or b, 1, 1]."""


@dataclass(frozen=True)
class AttentionInputs:
    """Arguments of ``TransformerLayer.forward`` beside the hidden states."""

    mask: Tensor | ScaledQueries | None
    """``attention_mask``, in the form that the backend's attention reads."""
    rotary: Tensor | None
    """``rotary_pos_emb``: angles [t, 1, 1, d], or [longest, 1, 1, d] for packed parameters."""
    packed: Any | None
    """Megatron-Core's ``PackedSeqParams``, or nothing."""


def scaled(mask: Tensor, scale: Tensor | None) -> Tensor | ScaledQueries:
    """The mask, with a factor for each query if there is one; ``scale`` is [sq] or [sq, b]."""
    if scale is None:
        return mask
    return ScaledQueries(mask, scale.view(scale.shape[0], -1, 1, 1))
