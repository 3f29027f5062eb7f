"""Attention spans of a packed sequence, regrouped into batches of nearly equal length.

Spans of a sequence differ in length: an answer has ten tokens, a document five hundred. If all were padded to the
longest, most of the batch would be padding. With one call a span, the calls would cost more than the computation. So
spans are grouped by length up to the next power of two. That at most doubles a span and leaves a few groups.

They are grouped once a micro-batch, from lengths that the CPU knows. Reading a length from the device would stall it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SpanGroup:
    """Spans that are computed as one batch."""

    positions: Tensor
    """int64[spans, longest]: positions in the sequence; the sequence's length where a span has ended."""

    @property
    def num_spans(self) -> int:
        return self.positions.shape[0]

    @property
    def longest(self) -> int:
        return self.positions.shape[1]


def group_spans(lengths: Sequence[int], device: torch.device | None = None) -> tuple[SpanGroup, ...]:
    """Group the spans of these lengths, which follow one another without gaps."""
    total, sizes = sum(lengths), torch.tensor(lengths)
    if len(set(lengths)) == 1:
        return (SpanGroup(torch.arange(total, device=device).view(len(lengths), -1)),)
    starts = sizes.cumsum(0) - sizes
    powers = torch.tensor([(max(length, 16) - 1).bit_length() for length in lengths])
    groups = []
    for power in powers.unique().tolist():
        members = powers == power
        offsets = torch.arange(int(sizes[members].max()))
        positions = starts[members, None] + offsets
        positions = positions.masked_fill(offsets >= sizes[members, None], total)
        groups.append(SpanGroup(positions.to(device, non_blocking=True)))
    return tuple(groups)
