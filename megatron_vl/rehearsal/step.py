"""The step of a rehearsal: how many images its micro-batches have, and the shapes of the messages that they cause.

A micro-batch has the images of the planned mean row (``planning/rows.py``), rounded so that the mean stays; the second
one has text alone. A step of many micro-batches repeats itself after its warm-up, so no more are rehearsed than fill
the pipeline twice.

Which shapes a rank will receive follows from the order of passes of ``planning/schedule.py`` and from the layout. The
rehearsal finds out whether that is what the other rank sends.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import floor

from megatron_vl.config.schema import RunConfig
from megatron_vl.planning.layout import PipelineLayout
from megatron_vl.planning.rows import Row
from megatron_vl.planning.schedule import Pipeline, rank_order
from megatron_vl.planning.traffic import returns_gradient
from megatron_vl.rehearsal.records import Operation, Program, Shape

ZERO = (1, 1, 1)
"""What a stage sends back if nothing before it trains (``model/qwen_vl.py``)."""


def count_images(config: RunConfig, row: Row, micro_batches: int) -> tuple[int, ...]:
    """Return the images of each rehearsed micro-batch, of a step of so many on each data-parallel rank."""
    parallel = config.parallel
    number = min(micro_batches, max(4, 2 * parallel.pipeline_model_parallel_size))
    mean = row.images * config.training.micro_batch_size
    room = (config.training.micro_batch_size * config.data.seq_length - 1) // (config.model.resampler.num_queries + 2)
    counts = [min(room, floor((index + 1) * mean) - floor(index * mean)) for index in range(number)]
    return tuple(0 if index == 1 else count for index, count in enumerate(counts))


@dataclass(frozen=True)
class Step:
    """The micro-batches of one step of a data-parallel rank, by their numbers of images."""

    config: RunConfig
    layout: PipelineLayout
    images: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.config.training.micro_batch_size * self.config.data.seq_length

    def num_supervised(self, micro_batch: int) -> int:
        """Return the supervised tokens of a micro-batch: all but the slots of its images and their markers."""
        return self.num_tokens - self.images[micro_batch] * (self.config.model.resampler.num_queries + 2)

    def shapes_to(self, pipeline_rank: int) -> dict[int, list[Shape]]:
        """Return the shapes of the messages to a pipeline rank, by the pipeline rank that sends them, in order."""
        size, virtual = self.layout.pipeline_size, self.layout.virtual_size
        pipeline = Pipeline(size, virtual, len(self.images))
        return {
            sender: [shape for receiver, shape in self._sent(pipeline, sender) if receiver == pipeline_rank]
            for sender in range(size)
            if size > 1
        }

    def _sent(self, pipeline: Pipeline, sender: int) -> Iterator[tuple[int, Shape]]:
        for one in rank_order(pipeline, sender):
            stage = one.chunk * pipeline.size + sender
            if not one.is_backward and stage < pipeline.num_stages - 1:
                yield (sender + 1) % pipeline.size, self.output_shape(stage, one.micro_batch)
            elif one.is_backward and stage > 0:
                yield (sender - 1) % pipeline.size, self.gradient_shape(stage, one.micro_batch)

    def stage_messages(self, program: Program) -> list[Operation]:
        """Return the activations and gradients between stages that a rank sends and receives, in order."""
        return [message for message in _messages(program) if not self._is_feature(message)]

    def feature_messages(self, program: Program) -> list[Operation]:
        """Return the features and their gradients that a rank exchanges where all ranks encode images."""
        return [message for message in _messages(program) if self._is_feature(message)]

    def _is_feature(self, message: Operation) -> bool:
        if self.config.parallel.vision_parallel == "pipeline":
            return False
        return message.shapes[0][1] == self.config.model.resampler.num_queries  # of the packed sequence it is 1

    def output_shape(self, stage: int, micro_batch: int) -> tuple[int, int, int]:
        """Return the shape that a stage sends to the next one, from each of its ranks."""
        model, parallel, own = self.config.model, self.config.parallel, self.layout.stages[stage]
        parts = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
        images = max(self.images[micro_batch], 1)
        if own.language_layers:
            return self.num_tokens // parts, 1, model.language.hidden_size
        if own.resampler:
            return model.resampler.num_queries, images, model.language.hidden_size
        return model.num_patches // parts, images, model.vision.hidden_size

    def gradient_shape(self, stage: int, micro_batch: int) -> tuple[int, int, int]:
        """Return the shape that a stage sends back to the one before it."""
        if not returns_gradient(self.config, self.layout.stages[stage - 1]):
            return ZERO
        return self.output_shape(stage - 1, micro_batch)


def _messages(program: Program) -> Iterator[Operation]:
    """Yield the messages of a program without those that announce a shape."""
    for step in program:
        if isinstance(step, Operation) and step.kind in ("send", "receive") and step.dtype != "int64":
            yield step
