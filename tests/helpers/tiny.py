"""A model small enough that every layout of it runs in a second, and micro-batches for it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from megatron_vl.config.schema import (
    DataConfig,
    LanguageConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    ResamplerConfig,
    RunConfig,
    TrainingConfig,
    VisionConfig,
)
from megatron_vl.data.loading.batch import MicroBatch

MODEL = ModelConfig(
    preset="tiny",
    image_size=56,
    num_bpe_tokens=256,
    init_method_std=0.1,
    vision=VisionConfig(num_layers=4, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, position_grid=3),
    resampler=ResamplerConfig(num_queries=4, num_attention_heads=2),
    language=LanguageConfig(num_layers=4, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4, vocab_size=500),
)
ODD_MODEL = replace(
    MODEL,
    vision=replace(MODEL.vision, layernorm_epsilon=3e-3),
    language=replace(MODEL.language, norm_epsilon=2e-3, rotary_base=500.0),
)
"""The same without the usual constants, so that nobody compares a constant with itself."""
SEQ_LENGTH = 32


def tiny_config(**sections: dict[str, Any]) -> RunConfig:
    """A run of the tiny model; keyword ``section={"field": value}`` overrides single fields."""
    config = RunConfig(
        model=MODEL,
        parallel=ParallelConfig(use_distributed_optimizer=False, backend="local"),
        data=DataConfig(seq_length=SEQ_LENGTH, num_workers=0),
        training=TrainingConfig(micro_batch_size=2, global_batch_size=8, train_iters=10, deterministic_mode=True),
        optimizer=OptimizerConfig(lr=1e-2, min_lr=1e-3),
    )
    for name, fields in sections.items():
        config = replace(config, **{name: replace(getattr(config, name), **fields)})
    return config


def micro_batches(
    model: ModelConfig, count: int, *, rows: int = 2, span: str = "segment", seed: int = 0
) -> list[MicroBatch]:
    """Random micro-batches with 1, 3, 0 (text only), 2, ... images."""
    return [
        _micro_batch(model, [1, 3, 0, 2][number % 4], rows, span, torch.Generator().manual_seed(seed + number))
        for number in range(count)
    ]


def _micro_batch(model: ModelConfig, images: int, rows: int, span: str, generator: torch.Generator) -> MicroBatch:
    length = rows * SEQ_LENGTH
    queries = model.resampler.num_queries
    starts = torch.randperm(length // queries, generator=generator)[:images].sort().values * queries
    slots = (starts[:, None] + torch.arange(queries)).reshape(-1)
    cuts = [0, 10, 17, SEQ_LENGTH] if span == "segment" else [0, SEQ_LENGTH]
    borders = torch.tensor([row * SEQ_LENGTH + cut for row in range(rows) for cut in cuts[:-1]] + [length])
    positions = torch.cat([torch.arange(int(n)) for n in borders.diff()])
    free = torch.tensor([i for i in range(length) if i not in set(slots.tolist())])
    supervised = free[torch.randperm(len(free), generator=generator)[: 5 + 3 * images]].sort().values
    vocabulary = model.num_bpe_tokens
    return MicroBatch(
        tokens=torch.randint(0, vocabulary, (length,), generator=generator),
        positions=positions,
        cu_seqlens=borders.int(),
        span_lengths=tuple(borders.diff().tolist()),
        supervised=supervised,
        targets=torch.randint(0, vocabulary, (len(supervised),), generator=generator),
        slots=slots,
        pixels=torch.randint(
            0, 256, (max(images, 1), 3, model.image_size, model.image_size), generator=generator, dtype=torch.uint8
        ),
        span_images=torch.arange(images),
        num_images=max(images, 1),
        num_samples=rows * len(cuts),
        num_tokens=length,
        squared_spans=int((borders.diff() ** 2).sum()),
    )
