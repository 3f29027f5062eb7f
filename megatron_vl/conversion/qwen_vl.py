"""THE TABLE: which of our tensors corresponds to which of the published Qwen-VL checkpoint, and by what rule.

40 rows, one for each kind of tensor of ours, cover the 853 published tensors (41 kinds, since w1 and w2 of a language
layer are one tensor here). ``{i}`` is the layer number. Both directions, every shape and the list of published names
derive from these rows; nothing else in the project knows a published name.

Two pairs of similar names differ. The vision tower's ``attn.in_proj`` is already stored head by head (q, k, v of a head
together), while the language model's ``c_attn`` has all q, all k, all v. The resampler's ``attn.in_proj_weight`` (with
an underscore, of ``torch.nn.MultiheadAttention``) keeps the layout of that module here too.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vl.config.schema import ModelConfig
from megatron_vl.conversion.rules import Buffer, GateUp, InterleaveQKV, Rename, Rule, Shape, VocabularyRows
from megatron_vl.planning.parameters import TensorSpec, model_tensors


@dataclass(frozen=True)
class Row:
    """One row of the table: name patterns and the rule between them."""

    ours: str
    rule: Rule
    hf: tuple[str, ...]


@dataclass(frozen=True)
class Correspondence:
    """One of our tensors and the published ones of which it consists."""

    spec: TensorSpec
    rule: Rule
    hf_names: tuple[str, ...]

    @property
    def hf_shapes(self) -> tuple[Shape, ...]:
        """Shapes of the published tensors."""
        return self.rule.hf_shapes(self.spec.shape)


def _row(ours: str, rule: Rule, *hf: str) -> Row:
    return Row(ours, rule, hf)


_VISION, _BLOCK = "transformer.visual", "transformer.visual.transformer.resblocks.{i}"
_POOL, _LAYER = "transformer.visual.attn_pool", "transformer.h.{i}"
_V, _L = "vision.layers.{i}", "language_model.layers.{i}"

TABLE: tuple[Row, ...] = (
    _row("vision.patch_embed.weight", Rename(), f"{_VISION}.conv1.weight"),
    _row("vision.positional_embedding", Rename(), f"{_VISION}.positional_embedding"),
    _row("vision.ln_pre.weight", Rename(), f"{_VISION}.ln_pre.weight"),
    _row("vision.ln_pre.bias", Rename(), f"{_VISION}.ln_pre.bias"),
    _row(f"{_V}.input_layernorm.weight", Rename(), f"{_BLOCK}.ln_1.weight"),
    _row(f"{_V}.input_layernorm.bias", Rename(), f"{_BLOCK}.ln_1.bias"),
    _row(f"{_V}.self_attention.linear_qkv.weight", Rename(), f"{_BLOCK}.attn.in_proj.weight"),
    _row(f"{_V}.self_attention.linear_qkv.bias", Rename(), f"{_BLOCK}.attn.in_proj.bias"),
    _row(f"{_V}.self_attention.linear_proj.weight", Rename(), f"{_BLOCK}.attn.out_proj.weight"),
    _row(f"{_V}.self_attention.linear_proj.bias", Rename(), f"{_BLOCK}.attn.out_proj.bias"),
    _row(f"{_V}.pre_mlp_layernorm.weight", Rename(), f"{_BLOCK}.ln_2.weight"),
    _row(f"{_V}.pre_mlp_layernorm.bias", Rename(), f"{_BLOCK}.ln_2.bias"),
    _row(f"{_V}.mlp.linear_fc1.weight", Rename(), f"{_BLOCK}.mlp.c_fc.weight"),
    _row(f"{_V}.mlp.linear_fc1.bias", Rename(), f"{_BLOCK}.mlp.c_fc.bias"),
    _row(f"{_V}.mlp.linear_fc2.weight", Rename(), f"{_BLOCK}.mlp.c_proj.weight"),
    _row(f"{_V}.mlp.linear_fc2.bias", Rename(), f"{_BLOCK}.mlp.c_proj.bias"),
    _row("resampler.query", Rename(), f"{_POOL}.query"),
    _row("resampler.pos_embed", Buffer(), f"{_POOL}.pos_embed"),
    _row("resampler.kv_proj.weight", Rename(), f"{_POOL}.kv_proj.weight"),
    _row("resampler.ln_q.weight", Rename(), f"{_POOL}.ln_q.weight"),
    _row("resampler.ln_q.bias", Rename(), f"{_POOL}.ln_q.bias"),
    _row("resampler.ln_kv.weight", Rename(), f"{_POOL}.ln_kv.weight"),
    _row("resampler.ln_kv.bias", Rename(), f"{_POOL}.ln_kv.bias"),
    _row("resampler.attn.in_proj_weight", Rename(), f"{_POOL}.attn.in_proj_weight"),
    _row("resampler.attn.in_proj_bias", Rename(), f"{_POOL}.attn.in_proj_bias"),
    _row("resampler.attn.out_proj.weight", Rename(), f"{_POOL}.attn.out_proj.weight"),
    _row("resampler.attn.out_proj.bias", Rename(), f"{_POOL}.attn.out_proj.bias"),
    _row("resampler.ln_post.weight", Rename(), f"{_VISION}.ln_post.weight"),
    _row("resampler.ln_post.bias", Rename(), f"{_VISION}.ln_post.bias"),
    _row("resampler.proj", Rename(), f"{_VISION}.proj"),
    _row("language_model.embedding.word_embeddings.weight", VocabularyRows(), "transformer.wte.weight"),
    _row(f"{_L}.input_layernorm.weight", Rename(), f"{_LAYER}.ln_1.weight"),
    _row(f"{_L}.self_attention.linear_qkv.weight", InterleaveQKV(), f"{_LAYER}.attn.c_attn.weight"),
    _row(f"{_L}.self_attention.linear_qkv.bias", InterleaveQKV(), f"{_LAYER}.attn.c_attn.bias"),
    _row(f"{_L}.self_attention.linear_proj.weight", Rename(), f"{_LAYER}.attn.c_proj.weight"),
    _row(f"{_L}.pre_mlp_layernorm.weight", Rename(), f"{_LAYER}.ln_2.weight"),
    _row(f"{_L}.mlp.linear_fc1.weight", GateUp(), f"{_LAYER}.mlp.w2.weight", f"{_LAYER}.mlp.w1.weight"),
    _row(f"{_L}.mlp.linear_fc2.weight", Rename(), f"{_LAYER}.mlp.c_proj.weight"),
    _row("language_model.final_layernorm.weight", Rename(), "transformer.ln_f.weight"),
    _row("language_model.output_layer.weight", VocabularyRows(), "lm_head.weight"),
)


def correspondences(model: ModelConfig) -> list[Correspondence]:
    """Return the table for a model's sizes: an entry for each of our tensors, in the order of the pipeline."""
    rows = {row.ours: row for row in TABLE}
    entries = []
    for spec in model_tensors(model):
        pattern, layer = _pattern(spec.name)
        row = rows[pattern]
        entries.append(Correspondence(spec, row.rule, tuple(name.format(i=layer) for name in row.hf)))
    return entries


def hf_shapes(model: ModelConfig) -> dict[str, Shape]:
    """Return name and shape of every published tensor of a model of these sizes."""
    return {
        name: shape
        for entry in correspondences(model)
        for name, shape in zip(entry.hf_names, entry.hf_shapes, strict=True)
    }


def _pattern(name: str) -> tuple[str, str]:
    """Split ``vision.layers.7.mlp...`` into the row's pattern and the layer number."""
    parts = name.split(".")
    if len(parts) > 2 and parts[1] == "layers":
        layer, parts[2] = parts[2], "{i}"
        return ".".join(parts), layer
    return name, ""
