"""Qwen-VL as one would write it in plain PyTorch today, from the layers of ``transformers``.

``Qwen2DecoderLayer`` is Qwen-7B's block (RMSNorm, biases on q, k and v, rotary positions, SwiGLU) and
``CLIPEncoderLayer`` the vision tower's (pre-norm, biases everywhere, exact GELU); both attend through PyTorch's
``scaled_dot_product_attention``. The resampler is ``torch.nn.MultiheadAttention``, as in Qwen-VL's own code. Rows are
a batch, and attention is causal over the whole row.

The model reads our :class:`MicroBatch`, and :func:`plain_tensors` renames and cuts our weights (or gradients) to its
own, so that both can be shown to compute the same before their times are compared.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.clip.configuration_clip import CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RMSNorm, Qwen2RotaryEmbedding

from megatron_vl.config.schema import ModelConfig
from megatron_vl.data.images.pixels import normalize
from megatron_vl.data.loading.batch import MicroBatch
from megatron_vl.model.resampler import sincos_positions
from megatron_vl.model.vision import interpolate_positions


class PlainVision(nn.Module):
    """Pixels to patches."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        vision = model.vision
        config = CLIPVisionConfig(
            hidden_size=vision.hidden_size,
            intermediate_size=vision.ffn_hidden_size,
            num_attention_heads=vision.num_attention_heads,
            hidden_act="gelu",
            layer_norm_eps=vision.layernorm_epsilon,
            attn_implementation="sdpa",
        )
        self.grid = model.patch_grid
        self.patch_embed = nn.Conv2d(3, vision.hidden_size, vision.patch_size, stride=vision.patch_size, bias=False)
        self.positional_embedding = nn.Parameter(torch.empty(vision.position_grid**2, vision.hidden_size))
        self.ln_pre = nn.LayerNorm(vision.hidden_size, eps=vision.layernorm_epsilon)
        self.layers = nn.ModuleList(CLIPEncoderLayer(config) for _ in range(vision.num_layers))

    def forward(self, pixels: Tensor) -> Tensor:
        """uint8[n, 3, H, W] -> [n, patches, h]."""
        hidden = self.patch_embed(normalize(pixels)).flatten(2).transpose(1, 2)
        hidden = self.ln_pre(hidden + interpolate_positions(self.positional_embedding, grid=self.grid))
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=None)
        return hidden


class PlainResampler(nn.Module):
    """Patches to the features of the slots."""

    pos_embed: Tensor

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        width, queries = model.language.hidden_size, model.resampler.num_queries
        epsilon = model.vision.layernorm_epsilon
        self.grid = model.patch_grid
        self.query = nn.Parameter(torch.empty(queries, width))
        self.register_buffer("pos_embed", sincos_positions(round(queries**0.5), width))
        self.kv_proj = nn.Linear(model.vision.hidden_size, width, bias=False)
        self.ln_q, self.ln_kv = nn.LayerNorm(width, eps=epsilon), nn.LayerNorm(width, eps=epsilon)
        self.attn = nn.MultiheadAttention(width, model.resampler.num_attention_heads, batch_first=True)
        self.ln_post = nn.LayerNorm(width, eps=epsilon)
        self.proj = nn.Parameter(torch.empty(width, width))

    def forward(self, hidden: Tensor) -> Tensor:
        """[n, patches, vision width] -> [n, queries, h]."""
        keys = self.ln_kv(self.kv_proj(hidden))
        query = (self.ln_q(self.query) + self.pos_embed).expand(len(hidden), -1, -1)
        positions = interpolate_positions(self.pos_embed, grid=self.grid)
        features = self.attn(query, keys + positions, keys, need_weights=False)[0]
        return self.ln_post(features) @ self.proj


class PlainQwenVL(nn.Module):
    """The whole model; returns the loss summed over the supervised tokens."""

    def __init__(self, model: ModelConfig, *, seq_length: int, labelled_slot_head: bool) -> None:
        """``labelled_slot_head``: compute logits where there is a label only, as ours does; otherwise everywhere."""
        super().__init__()
        language = model.language
        config = Qwen2Config(
            vocab_size=language.vocab_size,
            hidden_size=language.hidden_size,
            intermediate_size=language.ffn_hidden_size,
            num_hidden_layers=language.num_layers,
            num_attention_heads=language.num_attention_heads,
            num_key_value_heads=language.num_attention_heads,
            max_position_embeddings=seq_length,
            rms_norm_eps=language.norm_epsilon,
            rope_parameters={"rope_type": "default", "rope_theta": language.rotary_base},
            attn_implementation="sdpa",
        )
        self.seq_length, self.labelled_slot_head = seq_length, labelled_slot_head
        self.vision, self.resampler = PlainVision(model), PlainResampler(model)
        self.embedding = nn.Embedding(language.vocab_size, language.hidden_size)
        self.rotary = Qwen2RotaryEmbedding(config)
        self.layers = nn.ModuleList(Qwen2DecoderLayer(config, index) for index in range(language.num_layers))
        self.norm = Qwen2RMSNorm(language.hidden_size, eps=language.norm_epsilon)
        self.head = nn.Linear(language.hidden_size, language.vocab_size, bias=False)

    def forward(self, batch: MicroBatch) -> Tensor:
        """The summed loss of rows whose attention is causal over the whole row."""
        assert batch.pixels is not None
        features = self.resampler(self.vision(batch.pixels))[batch.span_images]
        line = self.embedding(batch.tokens).index_copy(0, batch.slots, features.flatten(0, 1))
        hidden = line.view(-1, self.seq_length, line.shape[-1])
        positions = self.rotary(hidden, torch.arange(self.seq_length).unsqueeze(0))
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=None, position_embeddings=positions)
        hidden = hidden.flatten(0, 1)
        if self.labelled_slot_head:
            logits = self.head(self.norm(hidden.index_select(0, batch.supervised)))
            return F.cross_entropy(logits, batch.targets, reduction="sum")
        labels = torch.full_like(batch.tokens, -100).index_copy(0, batch.supervised, batch.targets)
        return F.cross_entropy(self.head(self.norm(hidden)), labels, reduction="sum")


def plain_tensors(ours: dict[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """Our weights, or gradients of them, under the names and in the shapes of :class:`PlainQwenVL`."""
    plain: dict[str, Tensor] = {}
    for name, value in ours.items():
        tower, _, rest = name.partition(".")
        if tower == "vision" and rest.startswith("layers."):
            plain |= _layer(name, value, model.vision.num_attention_heads, _VISION_NAMES)
        elif tower == "language_model" and rest.startswith("layers."):
            plain |= _layer(rest, value, model.language.num_attention_heads, _LANGUAGE_NAMES)
        else:
            plain[_OTHER_NAMES.get(name, name)] = value
    return plain


_VISION_NAMES = {
    "input_layernorm": "layer_norm1",
    "pre_mlp_layernorm": "layer_norm2",
    "self_attention.linear_proj": "self_attn.out_proj",
    "mlp.linear_fc1": "mlp.fc1",
    "mlp.linear_fc2": "mlp.fc2",
}
_LANGUAGE_NAMES = {
    "input_layernorm": "input_layernorm",
    "pre_mlp_layernorm": "post_attention_layernorm",
    "self_attention.linear_proj": "self_attn.o_proj",
    "mlp.linear_fc2": "mlp.down_proj",
}
_OTHER_NAMES = {
    "language_model.embedding.word_embeddings.weight": "embedding.weight",
    "language_model.final_layernorm.weight": "norm.weight",
    "language_model.output_layer.weight": "head.weight",
}


def _layer(name: str, value: Tensor, num_heads: int, names: dict[str, str]) -> dict[str, Tensor]:
    """One tensor of a layer; q, k and v are interleaved by head in ours, and gate stands above up."""
    start = name.index("layers.") + len("layers.")
    number, _, inner = name[start:].partition(".")
    prefix, (part, _, kind) = f"{name[:start]}{number}.", inner.rpartition(".")
    if part == "self_attention.linear_qkv":
        thirds = value.view(num_heads, 3, -1, *value.shape[1:]).unbind(1)
        return {f"{prefix}self_attn.{x}_proj.{kind}": t.flatten(0, 1) for x, t in zip("qkv", thirds, strict=True)}
    if part == "mlp.linear_fc1" and part not in names:
        gate, up = value.chunk(2)
        return {f"{prefix}mlp.gate_proj.{kind}": gate, f"{prefix}mlp.up_proj.{kind}": up}
    return {f"{prefix}{names[part]}.{kind}": value}
