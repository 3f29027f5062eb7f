"""What trains: each of the three parts trains as a whole or not at all (paper, Figure 3).

``pos_embed`` of the resampler is a stored buffer and never trains.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_vl.config.schema import TrainingConfig
from megatron_vl.model.qwen_vl import QwenVL
from megatron_vl.planning.layout import PipelineLayout


def freeze(chunks: Sequence[QwenVL], training: TrainingConfig, *, layout: PipelineLayout, pp_rank: int) -> None:
    """Set ``requires_grad`` of every parameter, and tell each stage what lies frozen before it."""
    for number, chunk in enumerate(chunks):
        parts = {
            chunk.vision: training.freeze_vision,
            chunk.resampler: training.freeze_resampler,
            chunk.language_model: training.freeze_language_model,
        }
        for part, frozen in parts.items():
            if part is not None:
                part.requires_grad_(not frozen)
        before = layout.stages[: layout.stage_index(pp_rank, number)]
        vision, resampler = training.freeze_vision, training.freeze_vision and training.freeze_resampler
        chunk.frozen_vision, chunk.frozen_resampler = vision, resampler
        chunk.frozen_before = all(
            (vision or not stage.vision_layers)
            and (vision or not stage.patch_embed)
            and (resampler or not stage.resampler)
            and (not stage.word_embedding and not stage.language_layers)
            for stage in before
        )
