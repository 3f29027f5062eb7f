"""The memory that each rank of a run needs, part by part.

Weights, gradients and optimizer are exact counts of ``parameters.py``, without the padding of buckets. In bf16 a
parameter that trains takes 2 bytes, 4 for its fp32 gradient, 4 for its master and 8 for its moments; a frozen one takes
2. The distributed optimizer divides masters and moments by the data-parallel size. In fp32 there are no masters. A
weight that is multiplied in FP8 takes up to 2 bytes more, for a copy along its rows and one along its columns
(Transformer Engine 2.11, ``module/base.py``, ``get_weight_workspace``). Scales of blocks are not counted.

Activations follow ``activations.py`` for each chunk, and the schedule for how many micro-batches are held at once
(``held_at_most`` of ``schedule.py``): min(m, p - i) on rank i of plain 1F1B, more with virtual stages.

Besides, the backward pass of a micro-batch needs the most of three: the logits with the gradient of the output layer,
the gradients of a layer, and the gradient of the word embedding. A gradient has memory of its own before it is added to
the sum. ``benchmarks/planned_memory.py`` compares the peaks of real ranks.

Not counted are the CUDA context, NCCL's buffers, fragments of the allocator, and temporary memory of the optimizer,
which runs when the activations are gone. They need the share of the memory that a plan leaves free (:data:`USABLE`),
and the difference between a data sheet's GB and what a device shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from megatron_vl.config.batch import data_parallel_size, model_parallel_size
from megatron_vl.config.schema import RunConfig
from megatron_vl.planning.activations import (
    Keeping,
    boundary_bytes,
    chunk_bytes,
    embedding_working_bytes,
    head_working_bytes,
    logits_bytes,
    working_bytes,
)
from megatron_vl.planning.flops import FrozenParts, Work
from megatron_vl.planning.layout import PipelineLayout, StageLayout, vision_part
from megatron_vl.planning.parameters import RankParameters, parameters_by_rank, stage_tensors, trains
from megatron_vl.planning.schedule import Pipeline, held_at_most
from megatron_vl.planning.vision_share import VisionShare

USABLE = 0.92
"""Share of a GPU's memory that a plan may use."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes of the GPU memory of one rank at its fullest moment."""

    weights: float
    gradients: float
    masters: float
    moments: float
    activations: float
    logits: float
    working: float
    """What the backward pass needs besides, as gradients."""
    communication: float
    """Messages between stages, and gathered inputs under sequence parallelism."""

    @property
    def total(self) -> float:
        return float(sum(getattr(self, item.name) for item in fields(self)))

    @property
    def optimizer(self) -> float:
        """Masters and moments."""
        return self.masters + self.moments


@dataclass(frozen=True)
class Layout:
    """The layout of a run, and what is known of each rank of it."""

    stages: PipelineLayout
    ranks: tuple[RankParameters, ...]
    """By pipeline rank. Tensor-parallel ranks hold the same amounts."""
    trained: tuple[float, ...]
    """Elements of all tensors that train there."""
    everywhere: float = 0.0
    """Elements that train of the vision part that every rank holds whole; ``ranks`` counts them too."""

    @classmethod
    def of(cls, config: RunConfig, stages: PipelineLayout) -> Layout:
        """Count the parameters of each rank; raises ``ConfigError`` if tensor parallelism cannot split them."""
        frozen, tensor = FrozenParts.of(config.training), config.parallel.tensor_model_parallel_size

        def sizes(stage: StageLayout) -> list[int]:
            specs = stage_tensors(config.model, stage)
            return [spec.local_size(tensor) for spec in specs if trains(spec.name, frozen)]

        ranks = [rank for rank in parameters_by_rank(config, stages) if rank.tensor_rank == 0]
        trained = [sizes(stage) for stage in stages.stages]
        whole = config.parallel.vision_parallel == "data"
        vision = stage_tensors(config.model, vision_part(config.model)) if whole else []
        everywhere = sum(spec.size for spec in vision if trains(spec.name, frozen))
        return cls(stages, tuple(ranks), tuple(map(sum, trained)), everywhere)


def rank_memories(
    config: RunConfig, layout: Layout, work: Work, *, world_size: int, micro_batches: int
) -> tuple[RankMemory, ...]:
    """Return the memory of each pipeline rank.

    Args:
        work: of one micro-batch.
        micro_batches: of a data-parallel rank in a step.
    """
    data_parallel = data_parallel_size(config.parallel, world_size)
    memories = schedule_memories(config, layout, work, data_parallel=data_parallel, micro_batches=micro_batches)
    return with_vision(memories, VisionShare.of(config, work, micro_batches, layout.everywhere))


def schedule_memories(
    config: RunConfig, layout: Layout, work: Work, *, data_parallel: int, micro_batches: int
) -> tuple[RankMemory, ...]:
    """Return :func:`rank_memories` in the schedule alone, without what a vision part on every rank needs besides."""
    keeping = Keeping.of(config)
    pipeline = Pipeline(layout.stages.pipeline_size, layout.stages.virtual_size, micro_batches)
    return tuple(
        RankMemory(
            **state_bytes(config, layout.ranks[rank], data_parallel, everywhere=layout.everywhere),
            **_held(config, layout, work, keeping, (pipeline, rank)),
            communication=_communication(config, layout.stages, rank, work, keeping),
        )
        for rank in range(pipeline.size)
    )


def with_vision(memories: Sequence[RankMemory], share: VisionShare | None) -> tuple[RankMemory, ...]:
    """Add what the vision part on every rank needs.

    Each rank has two moments: in the schedule, and in the backward pass of the vision part after it. The fuller one
    counts. The first stage holds the features of all images in both.
    """
    if share is None:
        return tuple(memories)
    kept, working = share.backward_bytes
    found = []
    for rank, memory in enumerate(memories):
        communication = memory.communication + (share.feature_bytes if rank == 0 else 0.0)
        within = replace(memory, activations=memory.activations + share.kept_bytes, communication=communication)
        after = replace(memory, activations=kept, logits=0.0, working=working, communication=communication)
        found.append(max(within, after, key=lambda one: one.total))
    return tuple(found)


def state_bytes(
    config: RunConfig, rank: RankParameters, data_parallel: int, *, everywhere: float = 0.0
) -> dict[str, float]:
    """Return the bytes of weights, gradients, masters and moments of a rank, by name.

    Args:
        everywhere: the elements among those that train which all ranks of the world hold.
    """
    owned = float(rank.trained)
    if config.parallel.use_distributed_optimizer:
        world_size = data_parallel * model_parallel_size(config.parallel)
        owned = (rank.trained - everywhere) / data_parallel + everywhere / world_size
    return {
        "weights": _weight_bytes(config, rank) + rank.quantized * 2,
        "gradients": rank.trained * 4,
        "masters": owned * (4 if config.training.bf16 else 0),
        "moments": owned * 8,
    }


def checkpoint_host_bytes(config: RunConfig, layout: Layout, data_parallel: int) -> float:
    """Return the host memory that a save gathers on the rank that needs most.

    With the distributed optimizer each data-parallel rank owns its part of masters and moments (12 bytes a parameter in
    bf16); without it the first rank stores everything. The first one also stores the weights
    (``checkpoint/optimizer_owners.py``).
    """

    def of(rank: RankParameters) -> float:
        state = state_bytes(config, rank, data_parallel, everywhere=layout.everywhere)
        return state["masters"] + state["moments"] + _weight_bytes(config, rank)

    return max(map(of, layout.ranks))


def _weight_bytes(config: RunConfig, rank: RankParameters) -> int:
    return (rank.trained + rank.frozen) * (2 if config.training.bf16 else 4)


def _held(
    config: RunConfig, layout: Layout, work: Work, keeping: Keeping, where: tuple[Pipeline, int]
) -> dict[str, float]:
    """Return activations, logits and working memory of one rank at the moment when their sum is largest."""
    pipeline, rank = where
    chunks = layout.stages.stages_of_rank(rank)
    kept = [chunk_bytes(config, chunk, work, keeping) for chunk in chunks]
    logits = max(logits_bytes(config, work, keeping) if chunk.head else 0.0 for chunk in chunks)
    besides = [_besides(config, chunk, work, keeping) for chunk in chunks]
    held, most = held_at_most(pipeline, rank, kept, besides)
    shown = min(logits, most)
    return {"activations": held, "logits": shown, "working": most - shown}


def _besides(config: RunConfig, chunk: StageLayout, work: Work, keeping: Keeping) -> float:
    """Return what the backward pass of a chunk needs beside what is kept."""
    head = head_working_bytes(config, work, keeping) if chunk.head else 0.0
    layer = working_bytes(config, chunk, work, keeping)
    return max(head, layer, embedding_working_bytes(config, chunk, work, keeping))


def _communication(config: RunConfig, stages: PipelineLayout, rank: int, work: Work, keeping: Keeping) -> float:
    """Return the bytes of messages and gathered inputs.

    A rank holds an output until it is sent, and receives one; with virtual stages one more of each is on its way. Under
    sequence parallelism the input of a product is gathered, and again for the gradient of its weight.
    """
    total = 0.0
    if stages.pipeline_size > 1:
        numbers = [stages.stage_index(rank, chunk) for chunk in range(stages.virtual_size)]
        near = {number for own in numbers for number in (own - 1, own)} & set(range(len(stages.stages) - 1))
        largest = max(boundary_bytes(config, stages.stages[number], work, keeping) for number in near)
        total += largest * (4 if stages.virtual_size > 1 else 2)
    if keeping.sequence:
        total += 2 * _gathered_input(config, stages.stages_of_rank(rank), work, keeping)
    return total


def _gathered_input(config: RunConfig, chunks: Sequence[StageLayout], work: Work, keeping: Keeping) -> float:
    model = config.model
    tokens = config.data.seq_length * config.training.micro_batch_size * model.language.hidden_size
    patches = work.num_images * model.num_patches * model.vision.hidden_size
    sizes = [tokens for chunk in chunks if chunk.language_layers] + [patches for chunk in chunks if chunk.vision_layers]
    return keeping.element * max(sizes, default=0)
