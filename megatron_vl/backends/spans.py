"""Attention spans of a packed line, regrouped into batches of nearly equal length.

Spans of a line differ in length: an answer has ten tokens, a document five hundred. Padding all to the longest would
make a batch of mostly nothing, and one call a span costs more in calls than in work. So spans are grouped by length up
to the next power of two, which at most doubles a span and leaves a handful of groups.

Megatron-Core passes a layer one tensor as its mask, and its recomputation accepts nothing else; so the groups travel
as one int64 vector:

    number of groups | spans and longest of each group | positions, group by group, [spans, longest] each

A position equal to the length of the line is padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SpanGroup:
    """Spans that are computed as one batch."""

    positions: Tensor
    """int64[spans, longest]: positions on the line; its length where a span has ended."""

    @property
    def num_spans(self) -> int:
        return self.positions.shape[0]

    @property
    def longest(self) -> int:
        return self.positions.shape[1]


def group_spans(cu_seqlens: Tensor) -> list[SpanGroup]:
    """Group the spans between the borders ``cu_seqlens`` (int[spans + 1])."""
    borders = cu_seqlens.long()
    starts, lengths = borders[:-1], borders.diff()
    if bool((lengths == lengths[0]).all()):
        return [SpanGroup(torch.arange(int(borders[-1]), device=borders.device).view(len(lengths), -1))]
    powers = torch.ceil(torch.log2(lengths.clamp(min=16).double()))
    groups = []
    for power in powers.unique().tolist():
        members = powers == power
        offsets = torch.arange(int(lengths[members].max()), device=borders.device)
        positions = starts[members, None] + offsets
        groups.append(SpanGroup(positions.masked_fill(offsets >= lengths[members, None], int(borders[-1]))))
    return groups


def encode_groups(groups: list[SpanGroup]) -> Tensor:
    """The groups as one vector."""
    sizes = [size for group in groups for size in group.positions.shape]
    header = torch.tensor([len(groups), *sizes], device=groups[0].positions.device)
    return torch.cat([header, *(group.positions.flatten() for group in groups)])


def decode_groups(encoded: Tensor) -> list[SpanGroup]:
    """The groups of a vector that :func:`encode_groups` made; views, not copies."""
    count = int(encoded[0])
    sizes = encoded[1 : 1 + 2 * count].tolist()
    groups, begin = [], 1 + 2 * count
    for spans, longest in zip(sizes[::2], sizes[1::2], strict=True):
        groups.append(SpanGroup(encoded[begin : begin + spans * longest].view(spans, longest)))
        begin += spans * longest
    return groups
