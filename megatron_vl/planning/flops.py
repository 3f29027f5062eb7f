"""Count the operations of the model's matrix products exactly, frozen parts included.

One multiply-add counts as 2. Norms, softmax, activations, biases and the rotary embedding are not counted, as is usual
for utilization. The backward pass counts what is required; recomputation never counts:

* a product ``x @ w`` costs its forward once more for the gradient of ``x`` if anything trained lies upstream of ``x``,
  and once more for the gradient of ``w`` if ``w`` is trained. So a trained layer costs 3 forwards. A frozen layer costs
  2 if it only passes gradients through, and 1 if nothing upstream trains. The patch embedding costs 2;
* attention has no weights: its backward is twice its forward if a gradient passes through it, and nothing otherwise;
* the resampler's query projection counts for each image, as in the published code (ours computes it once);
* causal attention counts half of the square of each attention span; the head runs on supervised positions only.

Everything depends on the :class:`Work` of the actual rows, not on averages, so a reported TFLOP/s is a count.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from megatron_vl.config.schema import ModelConfig, TrainingConfig


@dataclass(frozen=True)
class FrozenParts:
    """The parts of the model that are not trained."""

    vision: bool = False
    resampler: bool = False
    language_model: bool = False
    resampler_output: bool = False
    """Whether ln_post and proj of a trained resampler are frozen, as ``training.legacy_finetune_freezing`` does."""

    @classmethod
    def of(cls, training: TrainingConfig) -> FrozenParts:
        """Return the frozen parts of a run."""
        return cls(
            vision=training.freeze_vision,
            resampler=training.freeze_resampler,
            language_model=training.freeze_language_model,
            resampler_output=training.legacy_finetune_freezing,
        )


@dataclass(frozen=True)
class Work:
    """The required work, summed over any number of rows. ``MicroBatch.work`` returns it for rows, without padding.

    The work of a mean row has fractions.
    """

    num_images: float = 0
    """Images that the vision tower encodes."""
    num_tokens: float = 0
    """Positions that the language model reads."""
    sum_squared_spans: float = 0.0
    """Sum of the squared lengths of the spans inside which tokens attend to each other (rows or segments)."""
    num_supervised: float = 0
    """Supervised positions, on which the output layer runs."""

    def __add__(self, other: Work) -> Work:
        return Work(
            self.num_images + other.num_images,
            self.num_tokens + other.num_tokens,
            self.sum_squared_spans + other.sum_squared_spans,
            self.num_supervised + other.num_supervised,
        )


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of the parts of the model, each with its own backward."""

    patch_embed: float
    vision_layer: float
    resampler: float
    language_layer: float
    head: float

    def __add__(self, other: Flops) -> Flops:
        return self._each(other, 1)

    def __sub__(self, other: Flops) -> Flops:
        return self._each(other, -1)

    def _each(self, other: Flops, sign: int) -> Flops:
        names = [item.name for item in fields(self)]
        return Flops(**{name: getattr(self, name) + sign * getattr(other, name) for name in names})


FORWARD = FrozenParts(vision=True, resampler=True, language_model=True)
"""With everything frozen, only the forward pass is required."""


def step_flops(model: ModelConfig, frozen: FrozenParts, work: Work) -> float:
    """Return the required floating-point operations of training on ``work``, over all ranks together."""
    return sum(unit_flops(model, frozen, work))


def image_cost(model: ModelConfig, frozen: FrozenParts) -> float:
    """Return the work that an image adds to a row in training, in units of a label; rows are assigned to ranks by it.

    Rows are padded to one length. So they differ only in their images and in the labels that the output layer runs on.
    All tokens outside images are assumed to be labels. An image adds its own work, and replaces one label for each
    slot.
    """
    image = step_flops(model, frozen, Work(num_images=1, num_tokens=0, sum_squared_spans=0, num_supervised=0))
    label = step_flops(model, frozen, Work(num_images=0, num_tokens=0, sum_squared_spans=0, num_supervised=1))
    return image / label - (model.resampler.num_queries + 2)


def unit_flops(model: ModelConfig, frozen: FrozenParts, work: Work) -> list[float]:
    """Return the operations of each unit in order: every V (patch embedding with the first), R, every L, head."""
    flops = training_flops(model, frozen, work)
    vision = [flops.vision_layer] * model.vision.num_layers
    if vision:
        vision[0] += flops.patch_embed
    return [*vision, flops.resampler, *[flops.language_layer] * model.language.num_layers, flops.head]


def training_flops(model: ModelConfig, frozen: FrozenParts, work: Work) -> Flops:
    """Return forward and required backward; ``vision_layer`` and ``language_layer`` are those of one layer."""
    return weight_flops(model, frozen, work) + attention_flops(model, frozen, work)


def weight_flops(model: ModelConfig, frozen: FrozenParts, work: Work) -> Flops:
    """Return the share of :func:`training_flops` that are products with weights."""
    tower_trained = not frozen.vision
    adapter_trained = tower_trained or not frozen.resampler
    line_trained = adapter_trained or not frozen.language_model
    vision, language = model.vision, model.language
    width, patches = vision.hidden_size, work.num_images * model.num_patches
    hidden, tokens = language.hidden_size, work.num_tokens
    vision_weights = 4 * width**2 + 2 * width * vision.ffn_hidden_size
    language_weights = 4 * hidden**2 + 3 * hidden * language.ffn_hidden_size
    patch_values = 3 * vision.patch_size**2
    language_passes = _passes(weight=not frozen.language_model, upstream=line_trained)
    return Flops(
        patch_embed=_passes(weight=tower_trained, upstream=False) * 2 * patches * patch_values * width,
        vision_layer=_passes(weight=tower_trained, upstream=tower_trained) * 2 * patches * vision_weights,
        resampler=_resampler_weights(model, work, frozen),
        language_layer=language_passes * 2 * tokens * language_weights,
        head=language_passes * 2 * work.num_supervised * hidden * language.vocab_size,
    )


def attention_flops(model: ModelConfig, frozen: FrozenParts, work: Work) -> Flops:
    """Return the share of :func:`training_flops` that are products of queries, keys and values."""
    tower_trained = not frozen.vision
    adapter_trained = tower_trained or not frozen.resampler
    line_trained = adapter_trained or not frozen.language_model
    hidden, patches = model.language.hidden_size, work.num_images * model.num_patches
    across = 4 * model.resampler.num_queries * patches * hidden
    return Flops(
        patch_embed=0,
        vision_layer=_attention_passes(tower_trained) * 4 * patches * model.num_patches * model.vision.hidden_size,
        resampler=_attention_passes(adapter_trained) * across,
        language_layer=_attention_passes(line_trained) * 2 * work.sum_squared_spans * hidden,
        head=0,
    )


def _resampler_weights(model: ModelConfig, work: Work, frozen: FrozenParts) -> float:
    hidden, queries, patches = model.language.hidden_size, model.resampler.num_queries, model.num_patches
    tower_trained, own_trained = not frozen.vision, not frozen.resampler
    passes = _passes(weight=own_trained, upstream=tower_trained or own_trained)
    keys_values = 2 * patches * 2 * hidden**2
    queries_in = 2 * queries * hidden**2
    output = 2 * queries * hidden**2  # attention's output projection, and again the projection after ln_post
    per_image = _passes(weight=own_trained, upstream=tower_trained) * 2 * patches * model.vision.hidden_size * hidden
    per_image += _passes(weight=own_trained, upstream=own_trained) * queries_in
    per_image += passes * (keys_values + output)
    per_image += (passes - (own_trained and frozen.resampler_output)) * output
    return work.num_images * per_image


def _passes(*, weight: bool, upstream: bool) -> int:
    """Return the cost of a product in training, in forwards: itself and the gradients of its weight and its input."""
    return 1 + weight + upstream


def _attention_passes(upstream: bool) -> int:
    return 3 if upstream else 1
