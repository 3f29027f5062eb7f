"""Rotary angles, and how evaluation changes them above the native length (``modeling_qwen.py``).

The published model has two additions for sequences that are longer than those it was trained on. Both have no effect up
to the native length, and both apply in evaluation only:

* dynamic NTK: the rotary base grows with the length that one pass reads, which is a span of a packed sequence or a
  prompt. Tokens that follow a prompt keep the base of that prompt, since the cache holds its keys with that base;
* logn: the query at 1-based position i is multiplied by log(i) / log(native length).

The original keeps the last prompt's base in the module, so a later training step uses it. Here both are functions of a
length or a position, so no state can reach a later pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_vl.config.schema import LanguageConfig


def rotary_angles(length: int, *, head_dim: int, base: float, device: torch.device) -> Tensor:
    """Return float32[length, 1, 1, head_dim], the angles; the second half of the dimensions repeats the first."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    angle = torch.arange(length, dtype=torch.float32, device=device)[:, None] * (1.0 / base**exponent)
    return torch.cat([angle, angle], dim=-1)[:, None, None, :]


@dataclass(frozen=True)
class LongContext:
    """The two additions of one model."""

    language: LanguageConfig

    def needed(self, length: int) -> bool:
        """Return whether a span of ``length`` tokens is computed differently than in training."""
        language = self.language
        return length > language.native_seq_length and (language.use_dynamic_ntk or language.use_logn_attn)

    def ntk_alpha(self, length: int) -> int:
        """Return the NTK factor of the base for ``length`` tokens: 1 up to the native length, then 3, 7, 15, ..."""
        native = self.language.native_seq_length
        if length <= native or not self.language.use_dynamic_ntk:
            return 1
        return int(2 ** math.ceil(math.log2(length / native) + 1)) - 1

    def rotary_base(self, length: int) -> float:
        """Return the rotary base for ``length`` tokens that one pass reads."""
        head_dim = self.language.hidden_size // self.language.num_attention_heads
        return self.language.rotary_base * self.ntk_alpha(length) ** (head_dim / (head_dim - 2))

    def query_scale(self, indices: Tensor) -> Tensor | None:
        """Return the factor of the query of each token.

        Args:
            indices: int64[...], 0-based index of each token within its span or prompt.

        Returns:
            float32 of the same shape, or None if the model has no such scale.
        """
        if not self.language.use_logn_attn:
            return None
        native = self.language.native_seq_length
        return ((indices + 1).clamp(min=native).double().log() / math.log(native)).float()
