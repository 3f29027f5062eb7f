"""What the passes of a stage cost a rank for one micro-batch: operations, memory traffic, collectives, launches.

Operations are those of ``flops.py``, on padded rows, divided by the tensor-parallel size where the unit is split, and
with what is recomputed. Element-wise traffic is counted from the tensors that the kernels of a layer read and write. In
bytes for a position of width h in bf16, forward:

* two norms read and write 2 h each: 8 h. Two residual additions read two tensors and write one: 12 h. A language layer
  rotates queries and keys, 8 h; a vision layer adds the biases of its two row-parallel products, 8 h. Together 28 h;
* the MLP's activation reads its input and writes its output: 6 ffn if gated, else 4 ffn;
* the backward pass reads and writes twice as much;
* the weight gradient of each micro-batch is added to the fp32 sum: 8 bytes a parameter;
* the cross-entropy of Megatron-Core passes several times over the logits: 38 bytes a logit forward (to fp32,
  maximum, difference, exponential, sum, quotient), 14 backward.

Tensor parallelism: under sequence parallelism a layer has two all-gathers and two reduce-scatters in each direction,
and gathers two inputs again for the gradients of its weights, which is hidden behind the products. Without it, two
all-reduces in each direction. An all-reduce counts as two collectives. The units between the layers have these besides:

* the word embedding all-reduces its output;
* the head all-reduces three numbers for each label (maximum, sum, and the logit of the target), and the gradient of its
  input;
* under sequence parallelism resampler and head gather their inputs, and the gradients of what patch and word embedding
  divide are gathered.

``benchmarks/audit.py`` counts them in real steps.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace

from megatron_vl.config.schema import RunConfig
from megatron_vl.planning.activations import Keeping, LayerShape
from megatron_vl.planning.flops import FORWARD, Flops, FrozenParts, Work, attention_flops, weight_flops
from megatron_vl.planning.gpus import AS_RATED, Gpu, PartFactors, Slowness
from megatron_vl.planning.layout import StageLayout

_LOSS_FORWARD, _LOSS_BACKWARD, _SUM_OF_GRADIENTS = 38, 14, 8
_FORWARD_SHARE = 1 / 3
"""Share of the forward pass in the CPU's time for a layer."""


@dataclass(frozen=True)
class PassCost:
    """One direction of one or more units, for one micro-batch on one rank."""

    products: float = 0.0
    """Operations of products with weights."""
    attention: float = 0.0
    """Operations of attention."""
    memory: float = 0.0
    """Bytes of element-wise traffic."""
    gathered: float = 0.0
    """Bytes that a rank receives in collectives of tensor parallelism."""
    hidden: float = 0.0
    """Those of them that are hidden behind products."""
    collectives: float = 0.0
    """Their number, without the hidden ones."""
    launches: float = 0.0
    """Layers whose kernels the CPU launches, in units of a forward and a backward pass."""

    def __add__(self, other: PassCost) -> PassCost:
        return PassCost(*map(operator.add, vars(self).values(), vars(other).values()))

    def times(self, number: float) -> PassCost:
        """Return the cost of ``number`` of them."""
        return PassCost(*(number * value for value in vars(self).values()))

    def slowed(self, factor: float) -> PassCost:
        """Return a cost whose kernels and launches take ``factor`` times as long; collectives do not."""
        return replace(
            self,
            products=factor * self.products,
            attention=factor * self.attention,
            memory=factor * self.memory,
            launches=factor * self.launches,
        )

    def exposed_seconds(self, gpu: Gpu) -> float:
        """Return the time of collectives that nothing hides."""
        hidden = self.hidden if gpu.overlaps else 0.0
        return gpu.nvlink.seconds(self.gathered - hidden, self.collectives) if self.collectives else 0.0

    def gpu_seconds(self, gpu: Gpu) -> float:
        """Return the time of the kernels, which run one after another."""
        kernels = self.products / gpu.products + self.attention / gpu.attention + self.memory / gpu.memory_rate
        return kernels + self.exposed_seconds(gpu)

    def seconds(self, gpu: Gpu) -> float:
        """Return the time of the pass: of the GPU, or of the CPU where that is slower."""
        return max(self.gpu_seconds(gpu), self.launches * gpu.host_seconds)


@dataclass(frozen=True)
class StageCost:
    """Both directions of a stage or a unit."""

    forward: PassCost = PassCost()
    backward: PassCost = PassCost()

    def __add__(self, other: StageCost) -> StageCost:
        return StageCost(self.forward + other.forward, self.backward + other.backward)

    @property
    def gathered(self) -> float:
        """Bytes that a rank receives in collectives of tensor parallelism."""
        return self.forward.gathered + self.backward.gathered

    def times(self, number: int) -> StageCost:
        """Return the cost of ``number`` of them."""
        return StageCost(self.forward.times(number), self.backward.times(number))

    def slowed(self, factors: Slowness) -> StageCost:
        """Return the cost where the passes are slower than the rates say."""
        return StageCost(self.forward.slowed(factors.forward), self.backward.slowed(factors.backward))


@dataclass(frozen=True)
class UnitCosts:
    """What each unit costs a rank for a micro-batch, without the sums of weight gradients."""

    vision_layer: StageCost
    patch_embed: StageCost
    resampler: StageCost
    word_embedding: StageCost
    language_layer: StageCost
    head: StageCost

    @classmethod
    def of(cls, config: RunConfig, work: Work, keeping: Keeping) -> UnitCosts:
        """Return the costs of a micro-batch of ``work``.

        Args:
            keeping: its ``tensor``, ``sequence`` and ``recompute`` say how layers are split and what is computed again.
        """
        model, frozen = config.model, FrozenParts.of(config.training)
        rows = config.data.seq_length * config.training.micro_batch_size
        products, attention = _Directions.of(config, replace(work, num_tokens=rows))
        ring = _Ring(keeping)
        patches = work.num_images * model.num_patches * model.vision.hidden_size * keeping.element
        tokens = rows * model.language.hidden_size * keeping.element
        patch_embed = _split(products, attention, "patch_embed", 1)
        trains_before = not (frozen.vision and frozen.resampler and frozen.language_model)
        return cls(
            vision_layer=_layer(
                _split(products, attention, "vision_layer", keeping.tensor),
                _Line(LayerShape.vision(model), work.num_images * model.num_patches, not frozen.vision),
                keeping,
            ),
            patch_embed=patch_embed + StageCost(PassCost(), ring.gather(patches, wanted=not frozen.vision)),
            resampler=_split(products, attention, "resampler", 1, launches=1) + StageCost(ring.gather(patches)),
            word_embedding=StageCost(ring.all_reduce(tokens), ring.gather(tokens, wanted=trains_before)),
            language_layer=_layer(
                _split(products, attention, "language_layer", keeping.tensor),
                _Line(LayerShape.language(model), rows, not frozen.language_model),
                keeping,
            ),
            head=_split(products, attention, "head", keeping.tensor, launches=1) + _loss(config, work, ring, tokens),
        )

    def parts(self, stage: StageLayout) -> dict[str, StageCost]:
        """Return what each part costs in a stage, by the names of :class:`PartFactors`, without sums of gradients."""
        vision = self.vision_layer.times(len(stage.vision_layers))
        for name in ("patch_embed", "resampler"):
            if getattr(stage, name):
                vision += getattr(self, name)
        language = self.language_layer.times(len(stage.language_layers))
        if stage.word_embedding:
            language += self.word_embedding
        return {
            "vision": vision,
            "language": language,
            "head": self.head if stage.head else StageCost(),
        }

    def stage(self, stage: StageLayout, *, trained: float, factors: PartFactors = AS_RATED) -> StageCost:
        """Return the cost of a stage.

        Args:
            trained: elements of the rank's weights to whose fp32 sums the backward pass adds.
            factors: how much slower than the rates say each part is.
        """
        total = StageCost(PassCost(), sum_of_gradients(trained))
        for name, cost in self.parts(stage).items():
            total += cost.slowed(getattr(factors, name))
        return total


def sum_of_gradients(trained: float) -> PassCost:
    """Return the cost of adding so many weight gradients to their fp32 sums."""
    return PassCost(memory=_SUM_OF_GRADIENTS * trained)


@dataclass(frozen=True)
class _Ring:
    """Collectives of tensor parallelism, each of a tensor of so many bytes."""

    keeping: Keeping

    def all_reduce(self, num_bytes: float, *, calls: int = 1) -> PassCost:
        """Return ``calls`` all-reduces of as many bytes."""
        tensor = self.keeping.tensor
        if tensor == 1:
            return PassCost()
        return PassCost(gathered=2 * calls * num_bytes * (tensor - 1) / tensor, collectives=2 * calls)

    def gather(self, num_bytes: float, *, wanted: bool = True) -> PassCost:
        """Return an all-gather that only sequence parallelism needs."""
        tensor = self.keeping.tensor
        if tensor == 1 or not (self.keeping.sequence and wanted):
            return PassCost()
        return PassCost(gathered=num_bytes * (tensor - 1) / tensor, collectives=1)


@dataclass(frozen=True)
class _Line:
    """The positions that a layer works on."""

    shape: LayerShape
    positions: float
    trained: bool
    """Whether the layer's weights train."""


@dataclass(frozen=True)
class _Directions:
    """Operations of both directions of every unit."""

    forward: Flops
    backward: Flops

    @classmethod
    def of(cls, config: RunConfig, work: Work) -> tuple[_Directions, _Directions]:
        """Return the products with weights, and those of attention."""
        model, frozen = config.model, FrozenParts.of(config.training)
        both = []
        for count in (weight_flops, attention_flops):
            forward = count(model, FORWARD, work)
            both.append(cls(forward, count(model, frozen, work) - forward))
        return both[0], both[1]


def _split(
    products: _Directions, attention: _Directions, unit: str, tensor: int, *, launches: float = 0.0
) -> StageCost:
    """Return the operations of a unit on one of ``tensor`` ranks."""

    def cost(weights: Flops, core: Flops, share: float) -> PassCost:
        computed = getattr(weights, unit) + getattr(core, unit)
        launched = launches * share if computed else 0.0
        return PassCost(getattr(weights, unit) / tensor, getattr(core, unit) / tensor, launches=launched)

    return StageCost(
        cost(products.forward, attention.forward, _FORWARD_SHARE),
        cost(products.backward, attention.backward, 1 - _FORWARD_SHARE),
    )


def _loss(config: RunConfig, work: Work, ring: _Ring, tokens: float) -> StageCost:
    """Return what head and loss cost besides products.

    Args:
        tokens: bytes of the hidden states of all positions.
    """
    language, keeping, frozen = config.model.language, ring.keeping, FrozenParts.of(config.training)
    logits = work.num_supervised * language.vocab_size / keeping.tensor
    forward = PassCost(memory=_LOSS_FORWARD * logits) + ring.gather(tokens)
    forward += ring.all_reduce(4 * work.num_supervised, calls=3)
    if frozen.vision and frozen.resampler and frozen.language_model:
        return StageCost(forward)
    hidden = work.num_supervised * language.hidden_size * keeping.element
    return StageCost(forward, PassCost(memory=_LOSS_BACKWARD * logits) + ring.all_reduce(hidden))


def _layer(unit: StageCost, line: _Line, keeping: Keeping) -> StageCost:
    """Return a layer with its traffic and what is recomputed."""
    memory = _layer_memory(line.shape, line.positions, keeping)
    collectives = _collectives(line.positions * line.shape.width, keeping, gathers_again=line.trained)
    forward = unit.forward + collectives.forward + PassCost(memory=memory, launches=_FORWARD_SHARE)
    if not unit.backward.products:
        return StageCost(forward)
    backward = unit.backward + collectives.backward + PassCost(memory=2 * memory, launches=1 - _FORWARD_SHARE)
    if keeping.recompute == "full":
        backward += forward
    elif keeping.recompute == "selective":
        backward += PassCost(attention=unit.forward.attention)
    return StageCost(forward, backward)


def _layer_memory(shape: LayerShape, positions: float, keeping: Keeping) -> float:
    """Return the bytes that the element-wise kernels of a layer's forward pass read and write."""
    outside = 20 if shape.rotary else 28
    inside = 8 * shape.width if shape.rotary else 0
    inside += (6 if shape.gated else 4) * shape.ffn
    per_position = outside * shape.width * keeping.outside + inside / keeping.tensor
    return positions * per_position * keeping.element / 2


def _collectives(size: float, keeping: Keeping, *, gathers_again: bool) -> StageCost:
    """Return the collectives of a layer whose input has ``size`` elements."""
    if keeping.tensor == 1:
        return StageCost(PassCost(), PassCost())
    received = size * keeping.element * (keeping.tensor - 1) / keeping.tensor
    # Two pairs of all-gather and reduce-scatter, or two all-reduces, which move as much.
    forward = PassCost(gathered=4 * received, collectives=4)
    again = 2 * received if keeping.sequence and gathers_again else 0.0
    return StageCost(forward, forward + PassCost(gathered=again, hidden=again))
