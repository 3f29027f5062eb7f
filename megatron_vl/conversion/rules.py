"""The rules of the conversion table: how one of our tensors corresponds to the published ones.

Each rule defines its rearrangement in both directions, and the resulting shapes, so that a table row is right or wrong
as a whole. Rules only move elements (no arithmetic, no casts): a round trip gives every byte back, and a gradient maps
like its parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_vl.config.schema import ModelConfig

Shape = tuple[int, ...]


class Rule(Protocol):
    """Correspondence of one of our tensors with one or more published tensors."""

    def hf_shapes(self, shape: Shape) -> tuple[Shape, ...]:
        """Return the shapes of the published tensors, given ours without vocabulary padding."""

    def to_ours(self, tensors: Sequence[Tensor], model: ModelConfig) -> Tensor:
        """Return our tensor from the published ones."""

    def to_hf(self, tensor: Tensor, model: ModelConfig) -> tuple[Tensor, ...]:
        """Return the published tensors from ours; may be views of it."""


@dataclass(frozen=True)
class Rename:
    """The same tensor under another name."""

    def hf_shapes(self, shape: Shape) -> tuple[Shape, ...]:
        """Return the same shape."""
        return (shape,)

    def to_ours(self, tensors: Sequence[Tensor], model: ModelConfig) -> Tensor:
        """Return the tensor itself."""
        return tensors[0]

    def to_hf(self, tensor: Tensor, model: ModelConfig) -> tuple[Tensor, ...]:
        """Return the tensor itself."""
        return (tensor,)


@dataclass(frozen=True)
class Buffer(Rename):
    """A stored table that never trains. It is kept and never recomputed, since its bytes are the published ones."""


@dataclass(frozen=True)
class VocabularyRows(Rename):
    """Rows of the vocabulary; rows of padding are dropped at export."""

    def to_hf(self, tensor: Tensor, model: ModelConfig) -> tuple[Tensor, ...]:
        """Return the first ``vocab_size`` rows."""
        return (tensor[: model.language.vocab_size],)


@dataclass(frozen=True)
class InterleaveQKV:
    """All heads' q, then all k, then all v; Megatron-Core needs q, k, v of head 0, of head 1, and so on."""

    def hf_shapes(self, shape: Shape) -> tuple[Shape, ...]:
        """Return the same shape: rows are permuted."""
        return (shape,)

    def to_ours(self, tensors: Sequence[Tensor], model: ModelConfig) -> Tensor:
        """Rearrange ``[3 x heads x d, ...]`` -> ``[heads x 3 x d, ...]``."""
        return swap_leading(tensors[0], 3, model.language.num_attention_heads)

    def to_hf(self, tensor: Tensor, model: ModelConfig) -> tuple[Tensor, ...]:
        """Rearrange ``[heads x 3 x d, ...]`` -> ``[3 x heads x d, ...]``."""
        return (swap_leading(tensor, model.language.num_attention_heads, 3),)


@dataclass(frozen=True)
class GateUp:
    """Gate and up, published as ``w2`` and ``w1``, are one tensor here: the gate's rows, then those of up."""

    def hf_shapes(self, shape: Shape) -> tuple[Shape, ...]:
        """Return two halves of the rows."""
        half = (shape[0] // 2, *shape[1:])
        return (half, half)

    def to_ours(self, tensors: Sequence[Tensor], model: ModelConfig) -> Tensor:
        """Concatenate ``[f, h]`` and ``[f, h]`` -> ``[2f, h]``."""
        return torch.cat(list(tensors))

    def to_hf(self, tensor: Tensor, model: ModelConfig) -> tuple[Tensor, ...]:
        """Split ``[2f, h]`` -> ``[f, h]`` and ``[f, h]``."""
        gate, up = tensor.chunk(2)
        return (gate, up)


def swap_leading(tensor: Tensor, outer: int, inner: int) -> Tensor:
    """Rearrange ``[outer x inner x d, ...]`` -> ``[inner x outer x d, ...]``."""
    rest = tensor.shape[1:]
    return tensor.reshape(outer, inner, -1, *rest).transpose(0, 1).reshape(-1, *rest)
