"""Model sizes.

``tiny`` learns the quickstart's scenes in minutes on two cores; ``qwen_vl_7b`` is the published model.
"""

from __future__ import annotations

from megatron_vl.config.schema import LanguageConfig, ModelConfig, ResamplerConfig, VisionConfig

TINY = ModelConfig(
    preset="tiny",
    image_size=84,
    num_bpe_tokens=2048,
    init_method_std=0.08,  # about 1 / sqrt(width); the 0.02 of the big models makes a narrow one start too slowly
    vision=VisionConfig(num_layers=3, hidden_size=128, ffn_hidden_size=512, num_attention_heads=4, position_grid=6),
    resampler=ResamplerConfig(num_queries=16, num_attention_heads=4),
    language=LanguageConfig(num_layers=3, hidden_size=128, ffn_hidden_size=352, num_attention_heads=4, vocab_size=2304),
)

SMALL = ModelConfig(
    preset="small",
    image_size=448,
    num_bpe_tokens=4096,
    vision=VisionConfig(num_layers=8, hidden_size=256, ffn_hidden_size=1024, num_attention_heads=8),
    resampler=ResamplerConfig(num_queries=256, num_attention_heads=8),
    language=LanguageConfig(
        num_layers=8, hidden_size=512, ffn_hidden_size=1408, num_attention_heads=8, vocab_size=4352
    ),
)

PRESETS: dict[str, ModelConfig] = {"tiny": TINY, "small": SMALL, "qwen_vl_7b": ModelConfig()}
