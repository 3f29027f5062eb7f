"""The interface of a backend; ``model/backend.py`` selects the one that a run uses."""

from __future__ import annotations

from typing import Protocol

import torch
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor, nn

from megatron_vl.backends.attention_inputs import AttentionInputs, PackedLine


class Backend(Protocol):
    """Builds layers, and prepares the attention inputs of a batch."""

    name: str

    def vision_layer(self) -> ModuleSpec:
        """Return the specification of a layer of the vision tower: pre-norm, attention without a mask."""

    def language_layer(self) -> ModuleSpec:
        """Return the specification of a layer of the language model: pre-norm, causal attention within each span."""

    def final_norm(self) -> type[nn.Module]:
        """Return the class of the norm before the output layer."""

    def attention_inputs(self, line: PackedLine, rotary_table: Tensor, *, dtype: torch.dtype) -> AttentionInputs:
        """Return the attention inputs of a packed sequence of t tokens.

        Args:
            rotary_table: float[longest, 1, 1, d], angles by position.
            dtype: of the hidden states.
        """

    def long_attention_inputs(
        self, line: PackedLine, angles: Tensor, query_scale: Tensor | None, *, dtype: torch.dtype
    ) -> AttentionInputs:
        """Return the same in evaluation, for a sequence with spans that are longer than the native length.

        Args:
            angles: float[t, 1, 1, d], of each token.
            query_scale: float[t], the factor of each token's query, if there is one.
            dtype: of the hidden states.

        Raises:
            ConfigError: if the backend cannot compute such spans.
        """
