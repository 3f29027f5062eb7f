"""MicroBatch, the input of one forward pass, and its construction from rows.

The b rows of a micro-batch are concatenated into one sequence of b*s tokens. ``cu_seqlens`` gives the spans within
which tokens attend to each other: whole rows or single segments. So attention always has the packed form. Labels are
shifted here and nowhere else: position i is supervised if token i + 1 is a target in the same span.

    row                      |<img> slots </img> ... Answer: red eos|You are kind eos|pad pad|
    positions, whole row      0 1 2 ...                                                    ...
    positions, per segment    0 1 2 ...                              0   1   2    3    0   1

With whole rows, the first token of a segment is predicted from the segment before it, as in the original. With
segments, nothing predicts it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from megatron_vl.config.special_tokens import SpecialTokens
from megatron_vl.data.images.pixels import blank_pixels
from megatron_vl.data.sample import PackedRow
from megatron_vl.errors import DataError
from megatron_vl.planning.flops import Work


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one micro-batch of one data-parallel rank, as tensors (t = rows x seq_length)."""

    tokens: torch.Tensor
    """int64[t]: token ids. Rows are concatenated, and each is padded with <|endoftext|>."""
    positions: torch.Tensor
    """int64[t]: index of each token within its attention span, for the rotary embedding."""
    cu_seqlens: torch.Tensor
    """int32[spans + 1]: borders of the attention spans, from 0 to t. Padding ends the span of its row (whole rows) or
    is a span of its own (segments)."""
    span_lengths: tuple[int, ...]
    """Lengths of the spans between these borders, as Python integers, to avoid device synchronization."""
    supervised: torch.Tensor
    """int64[m]: positions in [0, t) whose *next* token is a target."""
    targets: torch.Tensor
    """int64[m]: the ids of these targets."""
    slots: torch.Tensor
    """int64[k * num_queries]: positions that image features fill, image by image. Empty for text-only batches."""
    pixels: torch.Tensor | None
    """uint8[n, 3, H, W], n >= 1: the distinct images. A text-only batch has one blank image without slots. None on
    ranks that do not hold the patch embedding. Under ``vision_parallel data``, uint8[0 <= m <= n, 3, H, W]: those that
    this rank encodes."""
    span_images: torch.Tensor
    """int64[k]: index into ``pixels`` for each image span. An image that several questions share is encoded once."""
    num_images: int
    """The n of ``pixels``, known on every rank; 1 for a text-only batch."""
    num_samples: int
    """Samples that begin in these rows. A text document in several segments counts once, as in the manifest."""
    num_tokens: int
    """Tokens that are not padding, for throughput."""
    squared_spans: int
    """Sum of the squared lengths of the attention spans without padding, for throughput."""

    @property
    def work(self) -> Work:
        """Work of one training pass, for all throughput figures. Padding and the blank image count as no work."""
        images = self.num_images if self.slots.numel() else 0
        return Work(images, self.num_tokens, float(self.squared_spans), self.targets.numel())


@dataclass(frozen=True)
class CollateOptions:
    """Facts about the model and the run that collating needs."""

    special: SpecialTokens
    seq_length: int
    num_queries: int
    image_size: int
    attention_span: Literal["row", "segment"] = "row"
    with_pixels: bool = True
    """False on ranks that do not hold the patch embedding."""
    blank_images: bool = False
    """Show a gray image instead of every image."""


def empty_row() -> PackedRow:
    """Return a row of padding only. It fills the last batch of a finite pass and changes no loss."""
    return PackedRow(
        tokens=np.zeros(0, dtype=np.int32),
        supervised=np.zeros(0, dtype=np.bool_),
        segment_lengths=np.zeros(0, dtype=np.int32),
        image_ids=np.zeros(0, dtype=np.int64),
    )


def collate(
    rows: Sequence[PackedRow],
    pixels: npt.NDArray[np.uint8] | None,
    options: CollateOptions,
    *,
    names: Sequence[str],
    span_images: npt.NDArray[np.int64] | None = None,
) -> MicroBatch:
    """Concatenate rows into a micro-batch.

    ``pixels`` is uint8[n, 3, H, W], the images of all rows. It is None if no pixels are needed: text-only rows, blank
    images, or a rank without the patch embedding. ``span_images`` is int64[k], the image that each span of the rows
    shows; by default each span shows the next image. ``names`` are the names of the rows in messages.

    Raises:
        DataError: A row is too long, holds an id outside the vocabulary, or its image spans do not match its images.
    """
    seq_length, total = options.seq_length, len(rows) * options.seq_length
    for row, name in zip(rows, names, strict=True):
        if len(row.tokens) > seq_length:
            raise DataError(f"{name}: {len(row.tokens)} tokens, but data.seq_length is {seq_length}")
        if row.tokens.max(initial=0) > options.special.img_pad:
            raise DataError(
                f"{name}: holds the token {row.tokens.max()}, but the vocabulary ends at {options.special.img_pad}; "
                "the data set is damaged or was prepared for another model. Prepare it again."
            )
    tokens = np.full(total, options.special.endoftext, dtype=np.int64)
    is_target = np.zeros(total + 1, dtype=np.bool_)
    for index, row in enumerate(rows):
        begin = index * seq_length
        tokens[begin : begin + len(row.tokens)] = row.tokens
        is_target[begin : begin + len(row.tokens)] = row.supervised
    borders = _span_borders(rows, options)
    is_target[borders] = False  # nothing predicts the first token of a span
    supervised = np.flatnonzero(is_target[1:])
    slots = _find_slots(tokens, rows, options, names=names)
    shown = np.arange(sum(len(row.image_ids) for row in rows)) if span_images is None else span_images
    if options.blank_images:
        shown = np.zeros_like(shown)  # one gray image serves all
    num_images = int(shown.max(initial=-1)) + 1
    return MicroBatch(
        tokens=torch.from_numpy(tokens),
        positions=torch.from_numpy(np.arange(total) - np.repeat(borders[:-1], np.diff(borders))),
        cu_seqlens=torch.from_numpy(borders.astype(np.int32)),
        span_lengths=tuple(np.diff(borders).tolist()),
        supervised=torch.from_numpy(supervised),
        targets=torch.from_numpy(tokens[supervised + 1]),
        slots=torch.from_numpy(slots),
        pixels=_pixels(pixels, num_images, options),
        span_images=torch.from_numpy(shown.astype(np.int64)),
        num_images=max(num_images, 1),
        num_samples=sum(_count_samples(row, options.special) for row in rows),
        num_tokens=sum(len(row.tokens) for row in rows),
        squared_spans=_squared_spans(rows, options),
    )


def _count_samples(row: PackedRow, special: SpecialTokens) -> int:
    """Count the segments that begin a sample.

    This is not stored. A segment that continues a text document is recognized by its first token: that token is neither
    supervised nor a marker (``<img>``, ``<|im_start|>``).
    """
    begins = np.cumsum(row.segment_lengths) - row.segment_lengths
    first = row.tokens[begins]
    continued = ~row.supervised[begins] & (first != special.img_start) & (first != special.im_start)
    return len(begins) - int(continued.sum())


def _span_borders(rows: Sequence[PackedRow], options: CollateOptions) -> npt.NDArray[np.int64]:
    """Return the borders of the attention spans as int64[spans + 1]."""
    ends: list[int] = [0]
    for index, row in enumerate(rows):
        begin, length = index * options.seq_length, len(row.tokens)
        if options.attention_span == "segment":
            ends += (begin + np.cumsum(row.segment_lengths, dtype=np.int64)).tolist()
        # Attention is causal, so padding after the tokens of a row may share their span. Equal lengths batch best.
        if length < options.seq_length or options.attention_span == "row":
            ends.append(begin + options.seq_length)
    return np.array(ends, dtype=np.int64)


def _squared_spans(rows: Sequence[PackedRow], options: CollateOptions) -> int:
    by_segment = options.attention_span == "segment"
    lengths = [row.segment_lengths if by_segment else np.array([len(row.tokens)]) for row in rows]
    return int((np.concatenate(lengths).astype(np.int64) ** 2).sum())


def _find_slots(
    tokens: npt.NDArray[np.int64], rows: Sequence[PackedRow], options: CollateOptions, *, names: Sequence[str]
) -> npt.NDArray[np.int64]:
    """Return the positions between <img> and </img> as int64[images * num_queries].

    ``tokens`` is int64[rows * seq_length].

    Raises:
        DataError: The spans and the images of a row disagree.
    """
    special, queries = options.special, options.num_queries
    starts = np.flatnonzero(tokens == special.img_start)
    slots = starts[:, None] + np.arange(1, queries + 1)
    found = np.bincount(starts // options.seq_length, minlength=len(rows))
    expected = np.array([len(row.image_ids) for row in rows], dtype=np.int64)
    last = len(tokens) - 1
    whole = (tokens[np.minimum(slots, last)] == special.img_pad).all(axis=1)
    whole &= tokens[np.minimum(starts + queries + 1, last)] == special.img_end
    num_pads = np.bincount(np.flatnonzero(tokens == special.img_pad) // options.seq_length, minlength=len(rows))
    wrong = (found != expected) | (num_pads != expected * queries)
    wrong[starts[~whole] // options.seq_length] = True
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise DataError(
            f"{names[row]}: {found[row]} image spans and {num_pads[row]} slots, but {expected[row]} images "
            f"of {queries} "
            "slots each; the data set is damaged or was prepared for another model. Prepare it again."
        )
    return slots.reshape(-1)


def _pixels(pixels: npt.NDArray[np.uint8] | None, num_images: int, options: CollateOptions) -> torch.Tensor | None:
    if not options.with_pixels:
        return None
    if options.blank_images or num_images == 0:
        return torch.from_numpy(blank_pixels(max(num_images, 1), options.image_size))
    assert pixels is not None and len(pixels) == num_images, "as many images are decoded as the rows have"
    return torch.from_numpy(pixels)
