"""Freeze parameters by name, by the rule of ``planning/parameters.py``."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_vl.config.schema import TrainingConfig
from megatron_vl.model.qwen_vl import QwenVL
from megatron_vl.planning.flops import FrozenParts
from megatron_vl.planning.layout import PipelineLayout
from megatron_vl.planning.parameters import trains


def freeze(chunks: Sequence[QwenVL], training: TrainingConfig, *, layout: PipelineLayout, pp_rank: int) -> None:
    """Set ``requires_grad`` of every parameter. Tell each stage whether the parts before it are frozen."""
    frozen = FrozenParts.of(training)
    for number, chunk in enumerate(chunks):
        for name, parameter in chunk.named_parameters():
            parameter.requires_grad_(trains(name, frozen))
        before = layout.stages[: layout.stage_index(pp_rank, number)]
        vision, resampler = frozen.vision, frozen.vision and frozen.resampler
        chunk.frozen_vision, chunk.frozen_resampler = vision, resampler
        chunk.frozen_before = all(
            (vision or not stage.vision_layers)
            and (vision or not stage.patch_embed)
            and (resampler or not stage.resampler)
            and (not stage.word_embedding and not stage.language_layers)
            for stage in before
        )
