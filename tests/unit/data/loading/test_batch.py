"""Rows laid end to end: shift, spans, slots, blank images; and rows that contradict their images."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_vl.config.special_tokens import SpecialTokens
from megatron_vl.data.images.pixels import BLANK_RGB
from megatron_vl.data.loading.batch import CollateOptions, MicroBatch, collate, empty_row
from megatron_vl.data.sample import PackedRow
from megatron_vl.errors import DataError
from megatron_vl.planning.flops import Work

SPECIAL = SpecialTokens(256)
S, P, E, END = SPECIAL.img_start, SPECIAL.img_pad, SPECIAL.img_end, SPECIAL.endoftext
OPTIONS = CollateOptions(special=SPECIAL, seq_length=12, num_queries=2, image_size=4)


def row(*segments: list[tuple[int, bool]], images: int) -> PackedRow:
    flat = [pair for segment in segments for pair in segment]
    return PackedRow(
        tokens=np.array([token for token, _ in flat], dtype=np.int32),
        supervised=np.array([learned for _, learned in flat], dtype=np.bool_),
        segment_lengths=np.array([len(segment) for segment in segments], dtype=np.int32),
        image_ids=np.arange(images, dtype=np.int64),
    )


IMAGE_SEGMENT = [(S, False), (P, False), (P, False), (E, False), (5, False), (6, True), (END, True)]
TEXT_SEGMENT = [(7, True), (8, True), (END, True)]
MIXED = row(IMAGE_SEGMENT, TEXT_SEGMENT, images=1)
TEXT = row([(token, True) for token in range(12)], images=0)


def make(rows: list[PackedRow], **options: Any) -> MicroBatch:
    images = sum(len(each.image_ids) for each in rows)
    pixels = np.arange(images * 48, dtype=np.uint8).reshape(images, 3, 4, 4) if images else None
    names = [f"set, row {index}" for index in range(len(rows))]
    return collate(rows, pixels, replace(OPTIONS, **options), names=names)


def test_a_document_in_pieces_is_one_sample() -> None:
    """The continuation of a document does not predict its own first token."""
    chat = [(SPECIAL.im_start, False), (5, False), (6, True)]
    pieces = row(TEXT_SEGMENT, [(7, False), (8, True)], IMAGE_SEGMENT, [(END, False)], chat, images=1)
    assert make([pieces, TEXT], seq_length=24).num_samples == 4


def test_whole_rows() -> None:
    batch = make([MIXED, TEXT])
    assert batch.tokens.tolist() == [S, P, P, E, 5, 6, END, 7, 8, END, END, END, *range(12)]
    assert batch.cu_seqlens.tolist() == [0, 12, 24] and batch.span_lengths == (12, 12)
    assert batch.positions.tolist() == [*range(12), *range(12)]
    assert batch.supervised.tolist() == [4, 5, 6, 7, 8, *range(12, 23)]
    assert batch.targets.tolist() == [6, END, 7, 8, END, *range(1, 12)]
    assert batch.slots.tolist() == [1, 2]
    assert (batch.num_images, batch.num_samples, batch.num_tokens) == (1, 3, 22)
    assert batch.squared_spans == 10**2 + 12**2, "without the padding"
    assert batch.work == Work(1, 22, 10**2 + 12**2, 16)
    assert make([TEXT]).num_images == 1 and make([TEXT]).work.num_images == 0, "the blank image requires nothing"
    assert batch.pixels is not None
    assert batch.pixels.shape == (1, 3, 4, 4)
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.tokens.dtype == batch.positions.dtype == batch.supervised.dtype == batch.targets.dtype == torch.int64


def test_per_segment_nothing_crosses_a_border() -> None:
    batch = make([MIXED, TEXT], attention_span="segment")
    assert batch.cu_seqlens.tolist() == [0, 7, 10, 12, 24] and batch.span_lengths == (7, 3, 2, 12)
    assert batch.positions.tolist() == [*range(7), 0, 1, 2, 0, 1, *range(12)]
    assert batch.supervised.tolist() == [4, 5, 7, 8, *range(12, 23)]
    assert batch.targets.tolist() == [6, END, 8, END, *range(1, 12)]
    assert batch.squared_spans == 7**2 + 3**2 + 12**2
    assert make([empty_row()], attention_span="segment").squared_spans == 0


def test_the_target_of_a_supervised_position_is_the_next_token() -> None:
    for span in ("row", "segment"):
        batch = make([TEXT, MIXED, TEXT], attention_span=span)
        assert torch.equal(batch.targets, batch.tokens[batch.supervised + 1])
        assert torch.equal(batch.positions[batch.supervised] + 1, batch.positions[batch.supervised + 1])


def test_images_keep_their_order() -> None:
    batch = make([MIXED, TEXT, row(IMAGE_SEGMENT[:4], IMAGE_SEGMENT[:4], images=2)])
    assert batch.slots.tolist() == [1, 2, 25, 26, 29, 30]
    assert batch.num_images == 3


def test_text_only_gets_one_blank_image_without_slots() -> None:
    batch = make([TEXT, empty_row()])
    assert batch.slots.numel() == 0
    assert batch.num_images == 1
    assert batch.pixels is not None
    assert batch.pixels[0, :, 0, 0].tolist() == list(BLANK_RGB)
    assert batch.cu_seqlens.tolist() == [0, 12, 24]
    assert batch.supervised.max() == 10


def test_blank_images_and_ranks_without_pixels() -> None:
    blank = collate([MIXED], None, replace(OPTIONS, blank_images=True), names=["a"])
    assert blank.pixels is not None
    assert (blank.pixels == torch.tensor(BLANK_RGB, dtype=torch.uint8).view(1, 3, 1, 1)).all()
    without = collate([MIXED, MIXED], None, replace(OPTIONS, with_pixels=False), names=["a", "b"])
    assert without.pixels is None
    assert without.num_images == 2
    assert without.slots.tolist() == [1, 2, 13, 14]


@pytest.mark.parametrize(
    "broken",
    [
        row(IMAGE_SEGMENT, images=0),
        row(IMAGE_SEGMENT, images=2),
        row(TEXT_SEGMENT, images=1),
        row([(P, False), *TEXT_SEGMENT], images=0),
        row([(S, False), (P, False), (E, False), (7, True)], images=1),
        row([(S, False), (P, False), (P, False), (P, False), (E, False)], images=1),
        row([(S, False), (P, False)], images=1),
        row([(S, False), (P, False), (P, False), (7, True)], images=1),
        row([(1, False)] * 10 + [(S, False), (P, False)], images=1),
    ],
)
def test_a_row_whose_slots_do_not_match_its_images_is_named(broken: PackedRow) -> None:
    with pytest.raises(DataError, match="set, row 1: "):
        make([TEXT, broken, TEXT])


def test_a_row_that_is_too_long_is_named() -> None:
    with pytest.raises(DataError, match="set, row 0: 12 tokens, but data.seq_length is 11"):
        make([TEXT], seq_length=11)
