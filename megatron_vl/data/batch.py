"""MicroBatch: what one forward pass reads.

The b rows of a micro-batch are laid end to end as one line of b*s tokens, and ``cu_seqlens`` says which stretches of
it may look at each other (whole rows, or single segments). So attention has one form for every case, the packed one.
Labels are shifted here and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one micro-batch of one data-parallel rank, as tensors (t = rows x seq_length)."""

    tokens: torch.Tensor
    """int64[t]: ids, rows end to end, each padded with <|endoftext|>."""
    positions: torch.Tensor
    """int64[t]: index of the token within its attention span; the angle of its rotary embedding."""
    cu_seqlens: torch.Tensor
    """int32[spans + 1]: borders of the attention spans, 0 first, t last. Padding is a span of its own."""
    supervised: torch.Tensor
    """int64[m]: positions in [0, t) whose *next* token is a target."""
    targets: torch.Tensor
    """int64[m]: those targets."""
    slots: torch.Tensor
    """int64[k * num_queries]: positions that image features fill, image by image; empty for text-only batches."""
    pixels: torch.Tensor | None
    """uint8[n, 3, H, W], n >= 1: n = k, or one blank image without slots when the batch is text only.
    None on ranks that do not hold the patch embedding."""
    num_images: int
    """n of ``pixels``, known on every rank."""
    num_samples: int
    """Segments that are samples (pieces of text documents included), for throughput."""
    num_tokens: int
    """Tokens that are not padding, for throughput."""
