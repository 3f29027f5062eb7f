"""Convert ``config.json`` and ``generation_config.json`` of the published layout to our sizes and back.

The published configuration leaves three sizes to its modeling code: 256 queries (``n_queries`` may set another number),
a position table of 16 x 16, and one resampler head for every 128 features. The last two are written as extra keys of
``visual``, which that code ignores, only where they differ from its own choice. So a folder of the published sizes has
exactly the published keys. The number of byte-pair tokens follows from ``image_start_id``, because the special tokens
follow them in a fixed order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Annotated, Any, Literal

from megatron_vl.config.presets import PRESETS
from megatron_vl.config.records import Between, Builder, below
from megatron_vl.config.schema import LanguageConfig, ModelConfig, ResamplerConfig, VisionConfig
from megatron_vl.config.special_tokens import SpecialTokens
from megatron_vl.errors import ConversionError

Release = Literal["base", "chat"]

TOKENIZER_CONFIG: Mapping[str, Any] = MappingProxyType(
    {
        "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]},
        "model_max_length": 8192,
        "tokenizer_class": "QWenTokenizer",
    }
)
"""Content of ``tokenizer_config.json``."""

_RESAMPLER_HEAD_SIZE = 128
_QUERIES = 256
_POSITION_GRID = 16
_MAX_POSITIONS = 8192
_VISION_EPSILON = 1e-6
_LARGEST_SIZE = 2**24
_MOST_LAYERS = 1024


def model_config(hf: Mapping[str, Any], source: str) -> ModelConfig:
    """Return our sizes from the content of a ``config.json``; ``source`` names the file in errors.

    Raises:
        ConversionError: if a key is missing, of the wrong type, or describes something else than Qwen-VL.
    """
    visual = hf.get("visual")
    if not isinstance(visual, Mapping):
        raise ConversionError(f"{source}: no section 'visual'; expected the configuration of Qwen-VL, not of Qwen")
    hidden = _integer(hf, "hidden_size", source)
    width = _integer(visual, "width", source)
    num_bpe_tokens = _integer(visual, "image_start_id", source) - SpecialTokens(0).img_start
    model = ModelConfig(
        image_size=_integer(visual, "image_size", source),
        num_bpe_tokens=num_bpe_tokens,
        init_method_std=_number(hf, "initializer_range", source, ModelConfig.init_method_std),
        vision=VisionConfig(
            num_layers=_integer(visual, "layers", source),
            hidden_size=width,
            ffn_hidden_size=int(width * _number(visual, "mlp_ratio", source)),
            num_attention_heads=_integer(visual, "heads", source),
            patch_size=_integer(visual, "patch_size", source),
            position_grid=_integer(visual, "position_grid", source, _POSITION_GRID),
        ),
        resampler=ResamplerConfig(
            num_queries=_integer(visual, "n_queries", source, _QUERIES),
            num_attention_heads=_integer(visual, "resampler_heads", source, resampler_heads(hidden)),
        ),
        language=language_config(hf, source),
    )
    check_sizes(model, _integer(visual, "output_dim", source), source)
    return with_preset_name(model)


def language_config(hf: Mapping[str, Any], source: str) -> LanguageConfig:
    """Return the language model's sizes, from the ``config.json`` of Qwen-VL or of Qwen.

    Raises:
        ConversionError: if a key is missing, of the wrong type, or describes something else than Qwen.
    """
    _check_architecture(hf, source)
    return LanguageConfig(
        num_layers=_integer(hf, "num_hidden_layers", source),
        hidden_size=_integer(hf, "hidden_size", source),
        ffn_hidden_size=_integer(hf, "intermediate_size", source) // 2,
        num_attention_heads=_integer(hf, "num_attention_heads", source),
        vocab_size=_integer(hf, "vocab_size", source),
        rotary_base=_number(hf, "rotary_emb_base", source),
        norm_epsilon=_number(hf, "layer_norm_epsilon", source),
        native_seq_length=_integer(hf, "seq_length", source, LanguageConfig.native_seq_length),
        use_dynamic_ntk=_switch(hf, "use_dynamic_ntk", source, LanguageConfig.use_dynamic_ntk),
        use_logn_attn=_switch(hf, "use_logn_attn", source, LanguageConfig.use_logn_attn),
    )


def resampler_heads(hidden_size: int) -> int:
    """Return the number of resampler heads that the published code chooses."""
    return max(1, hidden_size // _RESAMPLER_HEAD_SIZE)


def hf_config(model: ModelConfig, dtype: str, reference: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the content of ``config.json`` for a model whose tensors are ``dtype``, for example ``bfloat16``.

    Keys of ``reference``, the imported configuration, are kept unless they describe sizes.
    """
    language = model.language
    return {
        "architectures": ["QWenLMHeadModel"],
        "model_type": "qwen",
        "attn_dropout_prob": 0.0,
        "emb_dropout_prob": 0.0,
        "no_bias": True,
        "onnx_safe": None,
        "rotary_pct": 1.0,
        "scale_attn_weights": True,
        "tie_word_embeddings": False,
        "tokenizer_type": "QWenTokenizer",
        "use_cache": True,
        "use_flash_attn": False,
        "max_position_embeddings": _MAX_POSITIONS,
        **(reference or {}),
        "bf16": dtype == "bfloat16",
        "fp16": dtype == "float16",
        "fp32": dtype == "float32",
        "torch_dtype": dtype,
        "initializer_range": model.init_method_std,
        "hidden_size": language.hidden_size,
        "intermediate_size": 2 * language.ffn_hidden_size,
        "kv_channels": language.hidden_size // language.num_attention_heads,
        "layer_norm_epsilon": language.norm_epsilon,
        "num_attention_heads": language.num_attention_heads,
        "num_hidden_layers": language.num_layers,
        "rotary_emb_base": _integral(language.rotary_base),
        "seq_length": language.native_seq_length,
        "use_dynamic_ntk": language.use_dynamic_ntk,
        "use_logn_attn": language.use_logn_attn,
        "vocab_size": language.vocab_size,
        "visual": _visual(model),
    }


def generation_config(model: ModelConfig, release: Release) -> dict[str, Any]:
    """Return the content of ``generation_config.json`` with the published defaults of the base or the chat model."""
    end = SpecialTokens(model.num_bpe_tokens).endoftext
    return {
        "chat_format": {"base": "raw", "chat": "chatml"}[release],
        "do_sample": True,
        "eos_token_id": end,
        "max_new_tokens": 512,
        "max_window_size": 6144,
        "pad_token_id": end,
        "top_k": 0,
        "top_p": {"base": 0.5, "chat": 0.3}[release],
    }


def _visual(model: ModelConfig) -> dict[str, Any]:
    vision, hidden = model.vision, model.language.hidden_size
    if vision.layernorm_epsilon != _VISION_EPSILON:
        raise ConversionError(
            f"model.vision.layernorm_epsilon is {vision.layernorm_epsilon}; "
            f"the published code fixes it at {_VISION_EPSILON}, so the folder would describe another model"
        )
    visual: dict[str, Any] = {
        "heads": vision.num_attention_heads,
        "image_size": model.image_size,
        "image_start_id": SpecialTokens(model.num_bpe_tokens).img_start,
        "layers": vision.num_layers,
        "mlp_ratio": _mlp_ratio(vision),
        "output_dim": hidden,
        "patch_size": vision.patch_size,
        "width": vision.hidden_size,
    }
    if model.resampler.num_queries != _QUERIES:
        visual["n_queries"] = model.resampler.num_queries
    if vision.position_grid != _POSITION_GRID:
        visual["position_grid"] = vision.position_grid
    if model.resampler.num_attention_heads != resampler_heads(hidden):
        visual["resampler_heads"] = model.resampler.num_attention_heads
    return visual


def _mlp_ratio(vision: VisionConfig) -> float:
    """Return the shortest decimal from which the published code, rounding down, gets the width of the MLP."""
    for digits in range(1, 17):
        for ratio in (
            round(vision.ffn_hidden_size / vision.hidden_size, digits),
            round(vision.ffn_hidden_size / vision.hidden_size + 10.0**-digits, digits),
        ):
            if int(vision.hidden_size * ratio) == vision.ffn_hidden_size:
                return ratio
    raise ConversionError(
        f"model.vision.ffn_hidden_size {vision.ffn_hidden_size} is no multiple "
        f"of hidden_size {vision.hidden_size} that a published configuration can state"
    )


def _integral(value: float) -> float:
    return int(value) if value == int(value) else value


def with_preset_name(model: ModelConfig) -> ModelConfig:
    """Return the same sizes, under the name of the preset that has them if there is one."""
    for name, preset in PRESETS.items():
        if replace(model, preset=name) == preset:
            return replace(model, preset=name)
    return model


def _check_architecture(hf: Mapping[str, Any], source: str) -> None:
    expected = {"model_type": "qwen", "no_bias": True, "tie_word_embeddings": False, "rotary_pct": 1.0}
    for key, value in expected.items():
        if hf.get(key, value) != value:
            raise ConversionError(f"{source}: {key} is {hf[key]!r}; Qwen-VL has {value!r}")


def check_sizes(model: ModelConfig, output_dim: int, source: str) -> None:
    """Raise ConversionError, naming ``source``, unless the sizes fit each other."""
    language, vision, resampler = model.language, model.vision, model.resampler
    tokens = SpecialTokens(model.num_bpe_tokens).num_tokens
    problems = {
        "output_dim of 'visual' is not hidden_size": output_dim != language.hidden_size,
        "num_attention_heads does not divide hidden_size": language.hidden_size % language.num_attention_heads,
        "heads of 'visual' do not divide its width": vision.hidden_size % vision.num_attention_heads,
        "the resampler's heads do not divide hidden_size": language.hidden_size % resampler.num_attention_heads,
        "patch_size of 'visual' does not divide its image_size": model.image_size % vision.patch_size,
        "image_start_id leaves fewer than 256 byte-pair tokens": model.num_bpe_tokens < 256,
        f"more than {_MOST_LAYERS} layers": max(language.num_layers, vision.num_layers) > _MOST_LAYERS,
        f"vocab_size is below the {tokens} tokens that image_start_id implies": language.vocab_size < tokens,
    }
    found = [text for text, wrong in problems.items() if wrong]
    if found:
        raise ConversionError(f"{source}: {'; '.join(found)}")


def _value(section: Mapping[str, Any], key: str, source: str, default: float | None, kind: Any) -> Any:
    return Builder(ConversionError).convert(section.get(key, default), kind, below(source, key))


def _integer(section: Mapping[str, Any], key: str, source: str, default: int | None = None) -> int:
    return int(_value(section, key, source, default, Annotated[int, Between(1, _LARGEST_SIZE - 1)]))


def _switch(section: Mapping[str, Any], key: str, source: str, default: bool) -> bool:
    return bool(_value(section, key, source, default, bool))


def _number(section: Mapping[str, Any], key: str, source: str, default: float | None = None) -> float:
    return float(_value(section, key, source, default, Annotated[float, Between(above=0, most=1e12)]))
