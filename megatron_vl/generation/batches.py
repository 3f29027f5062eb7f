"""Form batches of prompts, and pad them.

Requests are taken in windows of a few batches. Within a window they are sorted by length, so that there is little
padding. Prompts are padded on the left, so that the last position predicts the next token of every prompt.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from megatron_vl.config.special_tokens import SpecialTokens

T = TypeVar("T")


@dataclass(frozen=True)
class PaddedBatch:
    """Rows of tokens that end together."""

    tokens: Tensor
    """int64[b, longest], padded on the left."""
    padding: Tensor
    """bool[b, longest]."""
    slots: Tensor
    """int64[spans * queries]: positions of image slots in the flattened batch."""
    span_images: Tensor
    """int64[spans]: the image of each span, row by row."""
    has_images: bool
    pixels: Tensor | None
    """uint8[n, 3, H, W], on ranks that hold the patch embedding."""


@dataclass(frozen=True)
class Row:
    """A row of a batch, and the images of its spans by their number among those of the batch."""

    tokens: tuple[int, ...]
    images: tuple[int, ...] = ()


def pad_rows(
    rows: Sequence[Row], pixels: Tensor | None, *, special: SpecialTokens, device: torch.device
) -> PaddedBatch:
    """Pad rows on the left.

    Args:
        pixels: uint8[n, 3, H, W], the images of the batch, where they are needed.
    """
    longest = max(len(row.tokens) for row in rows)
    tokens = torch.full((len(rows), longest), special.endoftext, dtype=torch.int64)
    padding = torch.ones_like(tokens, dtype=torch.bool)
    for number, row in enumerate(rows):
        tokens[number, longest - len(row.tokens) :] = torch.tensor(row.tokens)
        padding[number, longest - len(row.tokens) :] = False
    images = [image for row in rows for image in row.images]
    return PaddedBatch(
        tokens=tokens.to(device),
        padding=padding.to(device),
        slots=torch.nonzero(tokens.flatten() == special.img_pad).flatten().to(device),
        span_images=torch.tensor(images, dtype=torch.int64, device=device),
        has_images=bool(images),
        pixels=None if pixels is None else pixels.to(device),
    )


def windows(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield the items in lists of ``size``; the last may be shorter."""
    remaining = iter(items)
    while window := list(itertools.islice(remaining, size)):
        yield window


def batches_by_length(
    lengths: Sequence[int], *, most: int, ranks: int, stands_alone: Callable[[int], bool]
) -> list[list[int]]:
    """Return the indices of items in batches of similar length.

    Args:
        lengths: the length of each item.
        most: items of a batch; fewer if some of the ``ranks`` would have none.
        ranks: number of ranks that take batches in turn.
        stands_alone: whether an item of a length must be in a batch of its own.
    """
    by_length = sorted(range(len(lengths)), key=lambda index: (lengths[index], index))
    plain = [index for index in by_length if not stands_alone(lengths[index])]
    size = max(1, min(most, -(-len(plain) // ranks)))
    batches = [plain[start : start + size] for start in range(0, len(plain), size)]
    return batches + [[index] for index in by_length if stands_alone(lengths[index])]
