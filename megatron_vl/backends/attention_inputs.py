"""What a layer's attention needs to know of a batch: the record that backends make and the model passes on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class AttentionInputs:
    """Arguments of ``TransformerLayer.forward`` beside the hidden states."""

    mask: Tensor | None
    """``attention_mask``, in the form that the backend's attention reads."""
    rotary: Tensor | None
    """``rotary_pos_emb``: angles [t, 1, 1, d], or [longest, 1, 1, d] for packed parameters."""
    packed: Any | None
    """Megatron-Core's ``PackedSeqParams``, or nothing."""
