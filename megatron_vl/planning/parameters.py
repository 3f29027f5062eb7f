"""List every tensor of the model: its name, its shape, its part, and how tensor parallelism splits it.

This is the only list of the model's tensors that needs no torch. Parameter counts, the dry run's table, the check of a
checkpoint and the conversion all read it, and a test compares it with the model that is built.

Names count layers globally and shapes are unsharded. Tensor parallelism splits the transformer layers (except their
norms and the biases that follow a row-parallel product), the word embedding and the output layer. The patch embedding,
positions, the resampler and all norms are replicated. ``resampler.pos_embed`` is a stored buffer. It is in every
checkpoint but not in counts of parameters, since it does not train, except under ``training.legacy_finetune_freezing``.
Only :func:`trains` decides that, for counts and for the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Literal

from megatron_vl.config.schema import LanguageConfig, ModelConfig, RunConfig, VisionConfig
from megatron_vl.config.validate import check_tensor_parallel
from megatron_vl.planning.flops import FrozenParts
from megatron_vl.planning.layout import PipelineLayout, StageLayout, vision_part
from megatron_vl.planning.vocabulary import padded_vocab_size

Part = Literal["vision", "resampler", "language_model"]

POSITION_TABLE = "resampler.pos_embed"
_LINEAR = re.compile(r"(vision|language_model)\.layers\.(\d+)\..*\.linear_\w+\.weight")


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of the model, unsharded and without vocabulary padding."""

    name: str
    shape: tuple[int, ...]
    split_axis: int | None = None
    """Axis that tensor parallelism splits; None if every tensor-parallel rank holds the whole tensor."""
    is_buffer: bool = False
    """Whether it is stored and not trained (see :func:`trains` for the exception)."""
    is_vocabulary: bool = False
    """Whether its rows are those of the vocabulary, which tensor parallelism pads."""

    @property
    def part(self) -> Part:
        """The part of the model to which it belongs."""
        return _part(self.name)

    @property
    def module(self) -> str:
        """The part with its layers separated, for tables: ``vision.layers``, ``resampler``, ..."""
        names = self.name.split(".")
        return names[0] if names[0] == "resampler" else ".".join(names[:2])

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    def local_size(self, tensor_size: int) -> int:
        """Return the number of elements on one tensor-parallel rank, vocabulary padding included."""
        if self.split_axis is None:
            return self.size
        rows = padded_vocab_size(self.shape[0], tensor_size) if self.is_vocabulary else self.shape[0]
        return rows * prod(self.shape[1:]) // tensor_size


@dataclass(frozen=True)
class RankParameters:
    """The parameters of one model-parallel rank, the same in every data-parallel replica."""

    pipeline_rank: int
    tensor_rank: int
    units: str
    """The rank's stages for people, ``;`` between model chunks."""
    trained: int
    frozen: int
    quantized: int = 0
    """Weights of which the rank also holds FP8 copies, trained and frozen."""


def model_tensors(model: ModelConfig) -> list[TensorSpec]:
    """Return all tensors of the model in the order of the pipeline."""
    return [
        *_patch_embed(model.vision),
        *(spec for layer in range(model.vision.num_layers) for spec in _vision_layer(model.vision, layer)),
        *_resampler(model),
        _word_embedding(model.language),
        *(spec for layer in range(model.language.num_layers) for spec in _language_layer(model.language, layer)),
        *_head(model.language),
    ]


def stage_tensors(model: ModelConfig, stage: StageLayout) -> list[TensorSpec]:
    """Return the tensors of one stage in the order of the pipeline."""
    specs = _patch_embed(model.vision) if stage.patch_embed else []
    for layer in stage.vision_layers:
        specs += _vision_layer(model.vision, layer)
    if stage.resampler:
        specs += _resampler(model)
    if stage.word_embedding:
        specs.append(_word_embedding(model.language))
    for layer in stage.language_layers:
        specs += _language_layer(model.language, layer)
    return specs + (_head(model.language) if stage.head else [])


def count_parameters(model: ModelConfig) -> dict[str, int]:
    """Return parameter counts by module, without buffers and vocabulary padding."""
    counts: dict[str, int] = {}
    for spec in model_tensors(model):
        if not spec.is_buffer:
            counts[spec.module] = counts.get(spec.module, 0) + spec.size
    return counts


def parameters_by_rank(config: RunConfig, layout: PipelineLayout) -> list[RankParameters]:
    """Return trained and frozen parameters in the memory of each (pipeline rank, tensor-parallel rank).

    Raises:
        ConfigError: if heads or widths cannot be split over the tensor-parallel ranks.
    """
    tensor_size = config.parallel.tensor_model_parallel_size
    check_tensor_parallel(config.model, config.parallel)
    frozen_parts = FrozenParts.of(config.training)
    whole = [vision_part(config.model)] if config.parallel.vision_parallel == "data" else []
    vision = [spec for stage in whole for spec in stage_tensors(config.model, stage)]
    ranks = []
    for pipeline_rank in range(layout.pipeline_size):
        stages = layout.stages_of_rank(pipeline_rank)
        specs = [spec for stage in stages for spec in stage_tensors(config.model, stage)]
        trained, frozen = _trained_and_frozen(specs, frozen_parts, tensor_size)
        more_trained, more_frozen = _trained_and_frozen(vision, frozen_parts, 1)
        units = "; ".join(map(str, [*stages, *whole]))
        quantized = _quantized(specs, config, tensor_size) + _quantized(vision, config, 1)
        ranks += [
            RankParameters(pipeline_rank, rank, units, trained + more_trained, frozen + more_frozen, quantized)
            for rank in range(tensor_size)
        ]
    return ranks


def in_fp8(name: str, config: RunConfig) -> bool:
    """Return whether the tensor of this name is a weight that a run multiplies in FP8."""
    training, match = config.training, _LINEAR.fullmatch(name)
    if training.fp8_format is None or match is None:
        return False
    vision, number = match[1] == "vision", int(match[2])
    if vision and training.fp8_parts == "language":
        return False
    if not training.first_last_layers_bf16:
        return True
    count = (config.model.vision if vision else config.model.language).num_layers
    return training.num_layers_at_start_in_bf16 <= number < count - training.num_layers_at_end_in_bf16


def trains(name: str, frozen: FrozenParts) -> bool:
    """Return whether the tensor of this name trains.

    Each of the three parts trains as a whole or not at all (paper, Figure 3). The released fine-tuning script is an
    exception: it unfroze the module that holds the position table, and not the two after it.
    """
    if name == POSITION_TABLE:
        return frozen.resampler_output
    if frozen.resampler_output and name.startswith(("resampler.ln_post.", "resampler.proj")):
        return False
    return not getattr(frozen, _part(name))


def _part(name: str) -> Part:
    for part in ("vision", "resampler"):
        if name.startswith(part):
            return part
    return "language_model"


def _trained_and_frozen(specs: Iterable[TensorSpec], frozen: FrozenParts, tensor_size: int) -> tuple[int, int]:
    """Return the number of elements of what trains, and of the parameters that do not."""
    sizes = {True: 0, False: 0}
    for spec in specs:
        trained = trains(spec.name, frozen)
        if trained or not spec.is_buffer:
            sizes[trained] += spec.local_size(tensor_size)
    return sizes[True], sizes[False]


def _quantized(specs: Iterable[TensorSpec], config: RunConfig, tensor_size: int) -> int:
    return sum(spec.local_size(tensor_size) for spec in specs if in_fp8(spec.name, config))


def _norm(name: str, size: int) -> list[TensorSpec]:
    return [TensorSpec(f"{name}.weight", (size,)), TensorSpec(f"{name}.bias", (size,))]


def _column(name: str, size_out: int, size_in: int, *, bias: bool) -> list[TensorSpec]:
    """Return the tensors of a product whose outputs, and its bias, are split over tensor-parallel ranks."""
    specs = [TensorSpec(f"{name}.weight", (size_out, size_in), split_axis=0)]
    return specs + ([TensorSpec(f"{name}.bias", (size_out,), split_axis=0)] if bias else [])


def _row(name: str, size_out: int, size_in: int, *, bias: bool) -> list[TensorSpec]:
    """Return the tensors of a row-parallel product: inputs are split, and the bias is added once, after the sum."""
    specs = [TensorSpec(f"{name}.weight", (size_out, size_in), split_axis=1)]
    return specs + ([TensorSpec(f"{name}.bias", (size_out,))] if bias else [])


def _patch_embed(vision: VisionConfig) -> list[TensorSpec]:
    width, patch = vision.hidden_size, vision.patch_size
    return [
        TensorSpec("vision.patch_embed.weight", (width, 3, patch, patch)),
        TensorSpec("vision.positional_embedding", (vision.position_grid**2, width)),
        *_norm("vision.ln_pre", width),
    ]


def _vision_layer(vision: VisionConfig, layer: int) -> list[TensorSpec]:
    prefix, width, ffn = f"vision.layers.{layer}", vision.hidden_size, vision.ffn_hidden_size
    return [
        *_norm(f"{prefix}.input_layernorm", width),
        *_column(f"{prefix}.self_attention.linear_qkv", 3 * width, width, bias=True),
        *_row(f"{prefix}.self_attention.linear_proj", width, width, bias=True),
        *_norm(f"{prefix}.pre_mlp_layernorm", width),
        *_column(f"{prefix}.mlp.linear_fc1", ffn, width, bias=True),
        *_row(f"{prefix}.mlp.linear_fc2", width, ffn, bias=True),
    ]


def _resampler(model: ModelConfig) -> list[TensorSpec]:
    hidden, queries = model.language.hidden_size, model.resampler.num_queries
    return [
        TensorSpec("resampler.query", (queries, hidden)),
        TensorSpec(POSITION_TABLE, (queries, hidden), is_buffer=True),
        TensorSpec("resampler.kv_proj.weight", (hidden, model.vision.hidden_size)),
        *_norm("resampler.ln_q", hidden),
        *_norm("resampler.ln_kv", hidden),
        TensorSpec("resampler.attn.in_proj_weight", (3 * hidden, hidden)),
        TensorSpec("resampler.attn.in_proj_bias", (3 * hidden,)),
        TensorSpec("resampler.attn.out_proj.weight", (hidden, hidden)),
        TensorSpec("resampler.attn.out_proj.bias", (hidden,)),
        *_norm("resampler.ln_post", hidden),
        TensorSpec("resampler.proj", (hidden, hidden)),
    ]


def _word_embedding(language: LanguageConfig) -> TensorSpec:
    return _vocabulary("language_model.embedding.word_embeddings.weight", language)


def _language_layer(language: LanguageConfig, layer: int) -> list[TensorSpec]:
    prefix, hidden, ffn = f"language_model.layers.{layer}", language.hidden_size, language.ffn_hidden_size
    return [
        TensorSpec(f"{prefix}.input_layernorm.weight", (hidden,)),
        *_column(f"{prefix}.self_attention.linear_qkv", 3 * hidden, hidden, bias=True),
        *_row(f"{prefix}.self_attention.linear_proj", hidden, hidden, bias=False),
        TensorSpec(f"{prefix}.pre_mlp_layernorm.weight", (hidden,)),
        *_column(f"{prefix}.mlp.linear_fc1", 2 * ffn, hidden, bias=False),
        *_row(f"{prefix}.mlp.linear_fc2", hidden, ffn, bias=False),
    ]


def _head(language: LanguageConfig) -> list[TensorSpec]:
    return [
        TensorSpec("language_model.final_layernorm.weight", (language.hidden_size,)),
        _vocabulary("language_model.output_layer.weight", language),
    ]


def _vocabulary(name: str, language: LanguageConfig) -> TensorSpec:
    return TensorSpec(name, (language.vocab_size, language.hidden_size), split_axis=0, is_vocabulary=True)
