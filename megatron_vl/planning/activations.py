"""Count the bytes that a micro-batch keeps for its backward pass, unit by unit.

What autograd keeps follows from the kernels (``docs/gpus.md``). For one position of a layer of width h, in elements of
the computing type (2 bytes in bf16), it is:

======================================  ==========================================================================
inputs of the two norms                 2 h. The residual stream itself is kept nowhere else
outputs of the two norms                2 h, as inputs of linear layers, only if these train
queries, keys, values                   3 h. After the rotary embedding, Transformer Engine keeps three tensors of
                                        their own; the local backend keeps rotated queries and keys (2 h) beside the
                                        output of the projection, of which the values are a view
output of attention                     h, for attention's backward and as the input of the projection, if it trains
MLP                                     its first output (ffn, gated 2 ffn), and the input of its second product
                                        (ffn), if that trains
======================================  ==========================================================================

So a trained language layer keeps 16 h + 6 ffn bytes with Transformer Engine, and 20 h + 6 ffn locally; a frozen one
through which gradients pass keeps 12 h + 4 ffn. A vision layer keeps 16 h + 4 ffn. A layer in which nothing upstream
trains keeps nothing. Norms and softmax also keep one or two fp32 numbers a row.

Tensor parallelism divides queries to MLP by its size. The norms and the residual stream are divided only under sequence
parallelism. Full recomputation keeps the input of each layer. Selective recomputation drops what only the core of
attention needs; fused attention keeps little besides, so it saves almost nothing.

A test compares these numbers with the tensors that real layers of the local backend keep. The H200 of
``docs/results/gpu.md`` needed 6.33 GiB for a further row of stage 2 at 12 + 8 layers and 10.29 GiB in stage 1, with
Transformer Engine; another test compares those.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from megatron_vl.config.schema import ModelConfig, RunConfig
from megatron_vl.planning.flops import FrozenParts, Work
from megatron_vl.planning.layout import StageLayout
from megatron_vl.planning.vocabulary import padded_vocab_size

Kernels = Literal["transformer_engine", "local"]


@dataclass(frozen=True)
class Keeping:
    """What decides how much a layer keeps."""

    kernels: Kernels
    recompute: Literal["full", "selective"] | None = None
    tensor: int = 1
    sequence: bool = False
    """Whether sequence parallelism divides the norms and the residual stream too."""
    element: int = 2
    """Bytes of a number of the computing type."""

    @classmethod
    def of(cls, config: RunConfig) -> Keeping:
        """Return what a run keeps on a GPU; ``auto`` is taken for Transformer Engine if the run computes in bf16."""
        parallel, bf16 = config.parallel, config.training.bf16
        fused = parallel.backend == "transformer_engine" or (parallel.backend == "auto" and bf16)
        return cls(
            kernels="transformer_engine" if fused else "local",
            recompute=config.training.recompute_granularity,
            tensor=parallel.tensor_model_parallel_size,
            sequence=parallel.sequence_parallel,
            element=2 if bf16 else 4,
        )

    @property
    def outside(self) -> float:
        """The share of the norms and the residual stream that a rank holds."""
        return 1 / self.tensor if self.sequence else 1.0


@dataclass(frozen=True)
class LayerShape:
    """The sizes of a transformer layer."""

    width: int
    ffn: int
    heads: int
    gated: bool
    """Whether the MLP has a gate, twice the first product."""
    rotary: bool
    norm_statistics: int
    """Numbers that a norm keeps for a row: one for RMSNorm, two for LayerNorm."""

    @classmethod
    def vision(cls, model: ModelConfig) -> LayerShape:
        """Return the shape of a vision layer."""
        vision = model.vision
        return cls(vision.hidden_size, vision.ffn_hidden_size, vision.num_attention_heads, False, False, 2)

    @classmethod
    def language(cls, model: ModelConfig) -> LayerShape:
        """Return the shape of a language layer."""
        language = model.language
        return cls(language.hidden_size, language.ffn_hidden_size, language.num_attention_heads, True, True, 1)


def layer_bytes(shape: LayerShape, keeping: Keeping, *, trained: bool) -> float:
    """Return the bytes that a layer keeps for one position, if a gradient passes through it.

    Args:
        trained: whether its weights train.
    """
    element, outside, inside = keeping.element, keeping.outside, 1 / keeping.tensor
    width, ffn = shape.width, shape.ffn
    if keeping.recompute == "full":
        return element * width * outside
    held_twice = 2 if shape.rotary and keeping.kernels == "local" else 0
    selective = keeping.recompute == "selective"
    if selective:
        held_twice = 0  # the checkpoint holds the projection's output; the rotation is inside of it
    context = 1 if trained or not selective else 0
    norms = (2 + 2 * trained) * width * outside
    attention = (3 + held_twice + context) * width * inside
    mlp = ((2 if shape.gated else 1) + trained) * ffn * inside
    statistics = 4 * shape.norm_statistics * 2 * outside + (0 if selective else 4 * shape.heads * inside)
    return element * (norms + attention + mlp) + statistics


def chunk_bytes(config: RunConfig, stage: StageLayout, work: Work, keeping: Keeping) -> float:
    """Return what a stage keeps of a micro-batch of this work until its backward pass, without the logits.

    Padding takes memory as well: a row has ``data.seq_length`` positions.
    """
    model, frozen = config.model, FrozenParts.of(config.training)
    positions, patches = _positions(config), work.num_images * model.num_patches
    total = 0.0
    if not frozen.vision:
        vision = LayerShape.vision(model)
        total += patches * len(stage.vision_layers) * layer_bytes(vision, keeping, trained=True)
        if stage.patch_embed:
            total += patches * keeping.element * (3 * model.vision.patch_size**2 + vision.width)
    if stage.resampler and not (frozen.vision and frozen.resampler):
        once = 2 * model.resampler.num_queries * model.language.hidden_size  # the queries, before and after projection
        total += work.num_images * _resampler_bytes(model, keeping) + keeping.element * once
    if not (frozen.vision and frozen.resampler and frozen.language_model):
        shape = LayerShape.language(model)
        kept = layer_bytes(shape, keeping, trained=not frozen.language_model)
        total += positions * len(stage.language_layers) * kept
    if stage.head:
        kept = 1 if frozen.language_model else 2  # the inputs of the norm and, if it trains, of the output layer
        total += work.num_supervised * kept * keeping.element * model.language.hidden_size
    return total


def logits_bytes(config: RunConfig, work: Work, keeping: Keeping) -> float:
    """Return the bytes of the logits of a micro-batch: those of the head, and the softmax that is kept, in fp32.

    Fp32 logits become the softmax in place.
    """
    tensor = keeping.tensor
    columns = padded_vocab_size(config.model.language.vocab_size, tensor) // tensor
    return work.num_supervised * columns * (4 if keeping.element == 4 else keeping.element + 4)


def working_bytes(config: RunConfig, stage: StageLayout, work: Work, keeping: Keeping) -> float:
    """Return what the backward pass of a layer or the resampler needs beside what is kept, at most.

    A recomputed layer makes all its activations again. What is kept is free as soon as its gradient is known, so few
    gradients live at the same time (:func:`_gradient_bytes`).
    """
    model, frozen = config.model, FrozenParts.of(config.training)
    sizes = [0.0]
    if stage.vision_layers and not frozen.vision:
        patches = work.num_images * model.num_patches
        sizes.append(_layer_backward_bytes(LayerShape.vision(model), patches, keeping, trained=True))
    if stage.language_layers:
        shape, trained = LayerShape.language(model), not frozen.language_model
        sizes.append(_layer_backward_bytes(shape, _positions(config), keeping, trained=trained))
    if stage.resampler and not (frozen.vision and frozen.resampler):
        # The gradients of keys and values, while those are still kept.
        sizes.append(keeping.element * work.num_images * model.num_patches * 2 * model.language.hidden_size)
    return max(sizes)


def _layer_backward_bytes(shape: LayerShape, positions: float, keeping: Keeping, *, trained: bool) -> float:
    gradients = _gradient_bytes(shape, positions, keeping, trained=trained)
    if keeping.recompute != "full":
        return gradients
    return gradients + positions * layer_bytes(shape, replace(keeping, recompute=None), trained=trained)


def _gradient_bytes(shape: LayerShape, positions: float, keeping: Keeping, *, trained: bool) -> float:
    """Return the bytes of the gradients of a layer that live at once, less what is free by then.

    The gradient of the layer's output lives from the beginning, for the residual stream. In the MLP, which is first,
    two moments are the fullest: after the second product, with the gradients of its input and of its weight; and after
    the activation, with those of its output and of its input, when the input of the second product is free.
    """
    inside = 1 / keeping.tensor
    output, middle = positions * shape.width * keeping.outside, positions * shape.ffn * inside
    after_product = middle + trained * shape.width * shape.ffn * inside
    after_activation = middle * ((3 if shape.gated else 2) - trained)
    return keeping.element * (output + max(after_product, after_activation))


def head_working_bytes(config: RunConfig, work: Work, keeping: Keeping) -> float:
    """Return what the backward pass of the head needs beside what is kept: logits, and the gradient of its weight."""
    return logits_bytes(config, work, keeping) + _vocabulary_gradient_bytes(config, keeping)


def embedding_working_bytes(config: RunConfig, stage: StageLayout, work: Work, keeping: Keeping) -> float:
    """Return what the gradient of the word embedding needs beside what is kept, if that is more than nothing.

    It comes when what the language layers of the stage have kept of the micro-batch is free.
    """
    if not stage.word_embedding:
        return 0.0
    language = replace(stage, patch_embed=False, vision_layers=range(0), resampler=False)
    return max(0.0, _vocabulary_gradient_bytes(config, keeping) - chunk_bytes(config, language, work, keeping))


def _vocabulary_gradient_bytes(config: RunConfig, keeping: Keeping) -> float:
    """Return the bytes of the gradient of the output layer or the word embedding before it is added, on a rank."""
    if FrozenParts.of(config.training).language_model:
        return 0.0
    language = config.model.language
    rows = padded_vocab_size(language.vocab_size, keeping.tensor) // keeping.tensor
    return keeping.element * rows * language.hidden_size


def boundary_bytes(config: RunConfig, before: StageLayout, work: Work, keeping: Keeping) -> float:
    """Return the bytes that the stage ``before`` sends to the next one for a micro-batch, from each of its ranks.

    Features of the resampler are whole on every tensor-parallel rank; patches and tokens are divided under sequence
    parallelism.
    """
    model = config.model
    if before.language_layers:
        return _positions(config) * model.language.hidden_size * keeping.element * keeping.outside
    if before.resampler:
        return work.num_images * model.resampler.num_queries * model.language.hidden_size * keeping.element
    return work.num_images * model.num_patches * model.vision.hidden_size * keeping.element * keeping.outside


def _positions(config: RunConfig) -> int:
    """Return the positions of a micro-batch, padding included."""
    return config.data.seq_length * config.training.micro_batch_size


def _resampler_bytes(model: ModelConfig, keeping: Keeping) -> float:
    """Return what the resampler keeps of an image. Tensor parallelism divides none of it.

    Of a patch it is the input of kv_proj, its output, the keys before and after positions were added, and the projected
    keys and values. Of a query it is the output of attention in two orders, of the projection, and of the last norm.
    """
    hidden, queries = model.language.hidden_size, model.resampler.num_queries
    per_patch = model.vision.hidden_size + 5 * hidden
    return keeping.element * (model.num_patches * per_patch + 4 * queries * hidden)
