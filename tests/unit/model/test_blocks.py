"""Our layers against those of ``transformers``: Qwen2 has Qwen-7B's block, CLIP's encoder has the vision tower's."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, Qwen2Config
from transformers.models.clip.modeling_clip import CLIPEncoder
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model

from tests.helpers.tiny import ODD_MODEL
from tests.unit.model.parts import Inputs, Outputs

TOLERANCE = 1e-5


def _split_heads(tensor: Tensor, heads: int) -> dict[str, Tensor]:
    """[heads x (q, k, v) x d, ...] -> the three projections, heads in order."""
    parts = tensor.view(heads, 3, -1, *tensor.shape[1:])
    return {name: parts[:, index].flatten(0, 1) for index, name in enumerate("qkv")}


def _layer(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def _attention(ours: dict[str, Tensor], heads: int, output: str) -> dict[str, Tensor]:
    weight, bias = (_split_heads(ours[f"self_attention.linear_qkv.{kind}"], heads) for kind in ("weight", "bias"))
    mapped = {f"self_attn.{name}_proj.weight": value for name, value in weight.items()}
    mapped |= {f"self_attn.{name}_proj.bias": value for name, value in bias.items()}
    return mapped | {f"self_attn.{output}.weight": ours["self_attention.linear_proj.weight"]}


def _qwen2(weights: dict[str, Tensor]) -> Qwen2Model:
    sizes = ODD_MODEL.language
    config = Qwen2Config(
        vocab_size=8,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.ffn_hidden_size,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_attention_heads,
        num_key_value_heads=sizes.num_attention_heads,
        rms_norm_eps=sizes.norm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": sizes.rotary_base},
        attn_implementation="eager",
    )
    model = Qwen2Model(config).eval()
    for number, layer in enumerate(model.layers):
        ours = _layer(weights, f"language_model.layers.{number}.")
        gate, up = ours["mlp.linear_fc1.weight"].chunk(2)
        layer.load_state_dict(
            _attention(ours, sizes.num_attention_heads, "o_proj")
            | {
                "input_layernorm.weight": ours["input_layernorm.weight"],
                "post_attention_layernorm.weight": ours["pre_mlp_layernorm.weight"],
                "mlp.gate_proj.weight": gate,
                "mlp.up_proj.weight": up,
                "mlp.down_proj.weight": ours["mlp.linear_fc2.weight"],
            }
        )
    model.norm = torch.nn.Identity()
    return model


def test_language_layers_equal_qwen2(inputs: Inputs, outputs: Outputs) -> None:
    """Each span of the packed line as a sequence of its own."""
    model = _qwen2(outputs.weights)
    with torch.no_grad():
        spans = inputs.embedded.transpose(0, 1).split(inputs.spans, dim=1)
        expected = torch.cat([model(inputs_embeds=span).last_hidden_state for span in spans], dim=1)
    found = outputs.language.transpose(0, 1)
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


def _clip(weights: dict[str, Tensor]) -> CLIPEncoder:
    sizes = ODD_MODEL.vision
    config = CLIPVisionConfig(
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.ffn_hidden_size,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_attention_heads,
        hidden_act="gelu",
        layer_norm_eps=sizes.layernorm_epsilon,
        attn_implementation="eager",
    )
    encoder = CLIPEncoder(config).eval()
    names = {"layer_norm1": "input_layernorm", "layer_norm2": "pre_mlp_layernorm"}
    names |= {"mlp.fc1": "mlp.linear_fc1", "mlp.fc2": "mlp.linear_fc2"}
    for number, layer in enumerate(encoder.layers):
        ours = _layer(weights, f"vision.layers.{number}.")
        mapped = _attention(ours, sizes.num_attention_heads, "out_proj")
        mapped["self_attn.out_proj.bias"] = ours["self_attention.linear_proj.bias"]
        for theirs, name in names.items():
            mapped |= {f"{theirs}.{kind}": ours[f"{name}.{kind}"] for kind in ("weight", "bias")}
        layer.load_state_dict(mapped)
    return encoder


def test_vision_layers_equal_clip(inputs: Inputs, outputs: Outputs) -> None:
    with torch.no_grad():
        expected = _clip(outputs.weights)(inputs_embeds=inputs.patches.transpose(0, 1)).last_hidden_state
    found = outputs.vision.transpose(0, 1)
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()
