from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from megatron_vl.config.presets import PRESETS
from megatron_vl.config.schema import ModelConfig
from megatron_vl.config.special_tokens import SpecialTokens
from megatron_vl.conversion.hf_config import generation_config, hf_config, model_config
from megatron_vl.errors import ConversionError

from .samples import GOLDEN, small_model

QWEN_VL = PRESETS["qwen_vl_7b"]


def golden_config() -> dict[str, Any]:
    return json.loads((GOLDEN / "config.json").read_text())


def test_golden_config_comes_back_as_it_was() -> None:
    config = golden_config()
    assert hf_config(model_config(config, "config.json"), "bfloat16") == config


def test_sizes_of_the_golden_config() -> None:
    model = model_config(golden_config(), "config.json")
    tokens = SpecialTokens(model.num_bpe_tokens)
    assert (tokens.img_start, tokens.img_end, tokens.img_pad) == (600, 601, 602)
    assert (model.vision.num_layers, model.vision.ffn_hidden_size, model.vision.position_grid) == (4, 512, 16)
    assert (model.language.ffn_hidden_size, model.language.vocab_size) == (512, 640)
    assert (model.resampler.num_queries, model.resampler.num_attention_heads) == (256, 2)


def test_the_published_sizes() -> None:
    config = hf_config(QWEN_VL, "bfloat16")
    assert config["intermediate_size"] == 22016 and config["kv_channels"] == 128
    assert config["visual"] == {
        "heads": 16,
        "image_size": 448,
        "image_start_id": 151857,
        "layers": 48,
        "mlp_ratio": 4.9231,
        "output_dim": 4096,
        "patch_size": 14,
        "width": 1664,
    }
    assert model_config(config, "config.json") == QWEN_VL


@pytest.mark.parametrize("model", [*PRESETS.values(), small_model(), replace(QWEN_VL, image_size=224)])
def test_sizes_survive_the_way_through_json(model: ModelConfig) -> None:
    config = json.loads(json.dumps(hf_config(model, "float32")))
    assert model_config(config, "config.json") == model
    assert (config["torch_dtype"], config["fp32"], config["bf16"]) == ("float32", True, False)


def test_what_evaluation_does_above_the_native_length_survives_too() -> None:
    language = replace(QWEN_VL.language, native_seq_length=4096, use_dynamic_ntk=False, use_logn_attn=False)
    model = replace(QWEN_VL, language=language)
    config = hf_config(model, "bfloat16", golden_config())
    assert (config["seq_length"], config["use_dynamic_ntk"], config["use_logn_attn"]) == (4096, False, False)
    assert model_config(config, "config.json") == model
    for key in ("seq_length", "use_dynamic_ntk", "use_logn_attn"):
        del config[key]
    assert model_config(config, "config.json") == QWEN_VL, "the published values where the file is silent"


def test_a_reference_keeps_its_other_settings_but_no_sizes() -> None:
    reference = golden_config() | {"auto_map": {"AutoConfig": "configuration_qwen.QWenConfig"}}
    config = hf_config(small_model(), "bfloat16", reference)
    assert config["auto_map"] == reference["auto_map"]
    assert model_config(config, "config.json") == small_model()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "hidden_size: found empty, expected an integer from 1 to"),
        ({"vocab_size": "640"}, "vocab_size: found '640'"),
        ({"vocab_size": True}, "vocab_size: found true"),
        ({"num_hidden_layers": -1}, "num_hidden_layers: found -1"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: found 1000000000"),
        ({"num_hidden_layers": 5000}, "more than 1024 layers"),
        ({"vocab_size": 602}, "below the 603 tokens"),
        ({"num_attention_heads": 3}, "num_attention_heads does not divide hidden_size"),
        ({"seq_length": 0}, "seq_length: found 0 .an integer., expected an integer from 1 to"),
        ({"use_logn_attn": 1}, "use_logn_attn: found 1 .an integer., expected true or false"),
        ({"use_dynamic_ntk": None}, "use_dynamic_ntk: found empty, expected true or false"),
        ({"visual": None}, "no section 'visual'"),
        ({"visual": {"image_start_id": 300}}, "fewer than 256 byte-pair tokens"),
        ({"visual": {"output_dim": 512}}, "output_dim of 'visual' is not hidden_size"),
        ({"visual": {"image_size": 450}}, "patch_size of 'visual' does not divide its image_size"),
        ({"visual": {"mlp_ratio": float("nan")}}, "mlp_ratio: found nan"),
        ({"model_type": "qwen2_vl"}, "model_type is 'qwen2_vl'; Qwen-VL has 'qwen'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
    ],
)
def test_what_is_not_qwen_vl_is_refused(change: dict[str, Any], message: str) -> None:
    config = golden_config()
    if isinstance(change.get("visual"), dict):
        change = {"visual": config["visual"] | change["visual"]}
    with pytest.raises(ConversionError, match=message) as caught:
        model_config(config | change, "DIR/config.json")
    assert str(caught.value).startswith("DIR/config.json: ")


def test_a_size_that_the_published_code_fixes() -> None:
    model = replace(QWEN_VL, vision=replace(QWEN_VL.vision, layernorm_epsilon=1e-5))
    with pytest.raises(ConversionError, match="layernorm_epsilon"):
        hf_config(model, "bfloat16")


def test_generation_defaults_of_both_releases() -> None:
    base, chat = generation_config(QWEN_VL, "base"), generation_config(QWEN_VL, "chat")
    assert (base["chat_format"], base["top_p"], base["eos_token_id"]) == ("raw", 0.5, 151643)
    assert (chat["chat_format"], chat["top_p"], chat["pad_token_id"]) == ("chatml", 0.3, 151643)
    assert {**base, "chat_format": 0, "top_p": 0} == {**chat, "chat_format": 0, "top_p": 0}
