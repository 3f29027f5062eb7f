"""Rows of a step at the lengths of a recipe: random ids and pixels, laid out as packed rows are and collated as ever.

What a row holds stands in the headers of ``examples/qwen_vl``: stage 1 packs six captions of 258 + 67 tokens, stage 2
five samples, stage 3 three chats, each with an image of 258 positions here. Text alone is one document a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_vl.config.schema import RunConfig
from megatron_vl.config.special_tokens import SpecialTokens
from megatron_vl.data.loading.batch import CollateOptions, MicroBatch, collate
from megatron_vl.data.sample import PackedRow


@dataclass(frozen=True)
class RowShape:
    """What a row is made of."""

    samples: int
    with_images: bool
    supervised: float
    """Share of the text that is supervised."""
    fill: float = 1.0
    """Share of the row that is not padding."""


SHAPES = {
    "stage1": RowShape(samples=6, with_images=True, supervised=1.0, fill=0.952),
    "stage2": RowShape(samples=5, with_images=True, supervised=0.9),
    "stage3": RowShape(samples=3, with_images=True, supervised=0.5),
    "text": RowShape(samples=1, with_images=False, supervised=1.0),
}


def make_batches(config: RunConfig, shape: RowShape, *, count: int, rows: int = 1, seed: int = 0) -> list[MicroBatch]:
    """``count`` micro-batches of ``rows`` rows each."""
    rng = np.random.default_rng(seed)
    model = config.model
    options = CollateOptions(
        special=SpecialTokens(model.num_bpe_tokens),
        seq_length=config.data.seq_length,
        num_queries=model.resampler.num_queries,
        image_size=model.image_size,
        attention_span=config.data.attention_span,
    )
    batches = []
    for number in range(count):
        packed = [_row(config, shape, rng) for _ in range(rows)]
        size = (sum(len(row.image_ids) for row in packed), 3, model.image_size, model.image_size)
        pixels = rng.integers(0, 256, size, dtype=np.uint8) if shape.with_images else None
        names = [f"row {row} of micro-batch {number}" for row in range(rows)]
        batches.append(collate(packed, pixels, options, names=names))
    return batches


def _row(config: RunConfig, shape: RowShape, rng: np.random.Generator) -> PackedRow:
    model, special = config.model, SpecialTokens(config.model.num_bpe_tokens)
    length = int(config.data.seq_length * shape.fill) // shape.samples
    image = [special.img_start, *[special.img_pad] * model.resampler.num_queries, special.img_end]
    head = image if shape.with_images else []
    assert length > len(head), "a sample has text"
    tokens, supervised = [], []
    for _ in range(shape.samples):
        text = length - len(head)
        first = text - max(1, round(shape.supervised * text))
        tokens += [*head, *rng.integers(0, model.num_bpe_tokens, text).tolist()]
        supervised += [False] * (len(head) + first) + [True] * (text - first)
    images = shape.samples if shape.with_images else 0
    return PackedRow(
        tokens=np.array(tokens, dtype=np.int32),
        supervised=np.array(supervised, dtype=np.bool_),
        segment_lengths=np.full(shape.samples, length, dtype=np.int32),
        image_ids=np.arange(images, dtype=np.int64),
    )
