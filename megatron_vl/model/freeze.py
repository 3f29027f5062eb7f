"""Freeze parameters by name, by the rule of ``planning/parameters.py``."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_vl.config.schema import TrainingConfig
from megatron_vl.model.qwen_vl import QwenVL
from megatron_vl.planning.flops import FrozenParts
from megatron_vl.planning.layout import StageLayout
from megatron_vl.planning.parameters import trains


def freeze(chunk: QwenVL, training: TrainingConfig, *, before: Sequence[StageLayout]) -> None:
    """Set ``requires_grad`` of every parameter. Tell the stage whether the stages before it are frozen."""
    frozen = FrozenParts.of(training)
    for name, parameter in chunk.named_parameters():
        parameter.requires_grad_(trains(name, frozen))
    vision, resampler = frozen.vision, frozen.vision and frozen.resampler
    chunk.frozen_vision, chunk.frozen_resampler = vision, resampler
    chunk.frozen_before = all(
        (vision or not stage.vision_layers)
        and (vision or not stage.patch_embed)
        and (resampler or not stage.resampler)
        and (not stage.word_embedding and not stage.language_layers)
        for stage in before
    )
