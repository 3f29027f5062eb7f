"""One training step: forward and backward of all micro-batches, division by the global token count, clipping, update.

The loss is summed over supervised tokens. Megatron-Core divides its gradients once, at the end of the schedule, by the
number of these tokens in the global batch over all ranks (``training/parallel_model.py``). So a token has the same
weight in any micro-batch, row or rank. Rows without images do not dilute the gradients of the vision tower.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from torch import Tensor, nn

from megatron_vl.config.schema import RunConfig
from megatron_vl.data.loading.batch import MicroBatch
from megatron_vl.parallel.arrival import Arrivals
from megatron_vl.parallel.collectives import from_last_stage, max_over_world, sum_over_data_parallel
from megatron_vl.parallel.schedule import StepInputs, run_schedule
from megatron_vl.parallel.topology import Topology
from megatron_vl.planning.flops import Work
from megatron_vl.training.image_encoder import EncodedStep, ImageEncoder
from megatron_vl.training.optimizer import LearningRates, set_groups
from megatron_vl.training.parallel_model import ParallelModel


@dataclass(frozen=True)
class LossSum:
    """A loss over many tokens, on every rank."""

    total: float
    num_tokens: int
    not_finite: tuple[int, ...] = ()
    """Micro-batches of this rank whose loss is not finite; known on the last pipeline stage."""

    def __add__(self, other: LossSum) -> LossSum:
        return LossSum(self.total + other.total, self.num_tokens + other.num_tokens)

    @property
    def mean(self) -> float:
        """Loss per supervised token; NaN if there was none."""
        return self.total / self.num_tokens if self.num_tokens else math.nan


@dataclass(frozen=True)
class Counts:
    """What was read, over all data-parallel ranks."""

    images: int = 0
    """Images that the vision tower encoded for slots. The blank image of a text-only micro-batch does not count."""
    samples: int = 0
    tokens: int = 0
    """Tokens that are not padding."""
    squared_spans: float = 0.0
    """Sum of squared lengths of attention spans, without padding."""

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.images + other.images,
            self.samples + other.samples,
            self.tokens + other.tokens,
            self.squared_spans + other.squared_spans,
        )


class MicroBatchPlace(NamedTuple):
    """The position of a micro-batch in a step."""

    dp_rank: int
    micro_batch: int


@dataclass(frozen=True)
class StepResult:
    """The result of one update."""

    loss: LossSum
    counts: Counts
    learning_rates: LearningRates
    grad_norm: float
    skipped: bool
    """Whether loss or gradient was not finite; then no rank changed its weights."""
    culprits: tuple[MicroBatchPlace, ...] = ()
    """Of a skipped step, the micro-batches whose loss was not finite; empty if only the gradient was not finite."""


def train_step(
    model: ParallelModel, batches: list[MicroBatch], *, config: RunConfig, topology: Topology, step: int
) -> StepResult:
    """Train on the micro-batches of one step.

    Args:
        batches: the micro-batches of this data-parallel rank.
        step: number of the step, from 0; sets the learning rates.
    """
    model.zero_grad()
    loss, counts = forward_backward(
        model.wrapped, batches, topology=topology, forward_only=False, encoder=model.encoder
    )
    rates = set_groups(model.optimizer, config, step)
    model.optimizer.prepare_grads()
    grad_norm = float(model.optimizer.get_grad_norm())
    finite = math.isfinite(loss.total) and math.isfinite(grad_norm) and _replicas_finite(model.optimizer)
    if max_over_world(float(not finite), device=topology.device):
        culprits = _gather_places(loss.not_finite, topology=topology)
        return StepResult(loss, counts, rates, grad_norm, skipped=True, culprits=culprits)
    _update(model.optimizer, grad_norm, clip=config.optimizer.clip_grad)
    return StepResult(loss, counts, rates, grad_norm, skipped=False)


def _replicas_finite(optimizer: ChainedOptimizer) -> bool:
    """Check the gradients that this rank holds as replicas of another tensor-parallel rank's.

    The norm counts each parameter once, so it does not show a fault in a replica alone.
    """
    replicas = [value for value in _parameters(optimizer) if not param_is_not_tensor_parallel_duplicate(value)]
    gradients = [value.grad for value in replicas if value.grad is not None]
    return not gradients or bool(torch.stack(torch._foreach_norm(gradients)).isfinite().all())


def _gather_places(indices: tuple[int, ...], *, topology: Topology) -> tuple[MicroBatchPlace, ...]:
    """Return the micro-batches that any rank names, in order."""
    gathered: list[list[MicroBatchPlace]] = [[] for _ in range(topology.world_size)]
    dist.all_gather_object(gathered, [MicroBatchPlace(topology.dp_rank, index) for index in indices])
    return tuple(sorted({place for places in gathered for place in places}))


def _parameters(optimizer: ChainedOptimizer) -> list[Tensor]:
    """Return what the optimizer updates on this rank."""
    return [value for member in optimizer.chained_optimizers for value in member.get_parameters()]


def _update(optimizer: ChainedOptimizer, grad_norm: float, *, clip: float) -> None:
    """Update once. Megatron-Core's own step does not check the norm: without a loss scale it accepts every gradient."""
    parameters = _parameters(optimizer)
    if clip > 0.0 and parameters:
        clip_grad_by_total_norm_fp32(parameters, max_norm=clip, total_norm=grad_norm)
    optimizer.step_with_ready_grads()


def forward_backward(
    chunks: Sequence[nn.Module],
    batches: list[MicroBatch],
    *,
    topology: Topology,
    forward_only: bool,
    encoder: ImageEncoder | None = None,
) -> tuple[LossSum, Counts]:
    """Run the schedule over the micro-batches. Sum the losses and counts over all ranks.

    Args:
        encoder: the vision part of this rank under ``vision_parallel data``.
    """
    encoded = encoder.encode(batches, forward_only=forward_only) if encoder else None
    records = run_schedule(
        chunks,
        _inputs(chunks, batches, encoded, topology),
        forward_step=_forward_step,
        forward_only=forward_only,
        topology=topology,
    )
    if encoded:
        encoded.go_backward()
    sums = torch.tensor([0.0, 0.0, *_count(batches)], dtype=torch.float64, device=topology.device)
    if topology.on_last_stage:
        sums[0] = sum(record["loss"].double() for record in records)
        sums[1] = sum(record["tokens"] for record in records)
    from_last_stage(sum_over_data_parallel(sums, topology=topology), topology=topology)
    loss, supervised, images, samples, tokens, squared_spans = sums.tolist()
    if encoder and not forward_only:
        encoder.finish_gradients(round(supervised))
    not_finite: tuple[int, ...] = ()
    if topology.on_last_stage and not math.isfinite(loss):
        not_finite = tuple(index for index, record in enumerate(records) if not record["loss"].isfinite())
    counts = Counts(round(images), round(samples), round(tokens), squared_spans)
    return LossSum(loss, round(supervised), not_finite), counts


@torch.no_grad()
def evaluate(
    chunks: Sequence[nn.Module],
    steps: Iterable[list[MicroBatch]],
    *,
    topology: Topology,
    encoder: ImageEncoder | None = None,
) -> LossSum:
    """Return the loss over all steps in evaluation mode, without changing anything."""
    total, tokens = 0.0, 0
    with evaluating([*chunks, encoder.chunk] if encoder else chunks):
        for batches in steps:
            loss, _ = forward_backward(chunks, batches, topology=topology, forward_only=True, encoder=encoder)
            total, tokens = total + loss.total, tokens + loss.num_tokens
    return LossSum(total, tokens)


@contextmanager
def evaluating(chunks: Sequence[nn.Module]) -> Iterator[None]:
    """Switch to evaluation mode; restore the mode of each chunk at the end."""
    modes = [chunk.training for chunk in chunks]
    try:
        for chunk in chunks:
            chunk.eval()
        yield
    finally:
        for chunk, mode in zip(chunks, modes, strict=True):
            chunk.train(mode)


def _count(batches: list[MicroBatch]) -> tuple[float, ...]:
    work = sum((batch.work for batch in batches), Work())
    samples = sum(batch.num_samples for batch in batches)
    return work.num_images, samples, work.num_tokens, work.sum_squared_spans


def _inputs(
    chunks: Sequence[nn.Module], batches: list[MicroBatch], encoded: EncodedStep | None, topology: Topology
) -> list[StepInputs]:
    """Return the inputs of each chunk; features of other ranks go to the first chunk of the first stage."""
    if encoded:
        batches = [replace(batch, pixels=None) for batch in batches]
    arrivals = Arrivals(batches, topology, takers=len(chunks))
    inputs = [StepInputs(arrivals, repeat(None)) for _ in chunks]
    if encoded and topology.pp_rank == 0:
        inputs[0] = StepInputs(arrivals, encoded.hand_over())
    return inputs


def _forward_step(
    inputs: Iterator[tuple[MicroBatch, Tensor | None]], chunk: nn.Module
) -> tuple[Tensor, Callable[[Tensor], Any]]:
    batch, features = next(inputs)
    return chunk(batch, features), lambda losses: _sum_losses(losses, batch)


def _sum_losses(losses: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return what Megatron-Core's schedule expects on the last stage: the summed loss, its token count, and a record.

    Args:
        losses: float32[m], one per supervised position.
    """
    total = losses.sum()
    tokens = torch.full((), batch.targets.numel(), dtype=torch.int, device=losses.device)
    return total, tokens, {"loss": total.detach().clone(), "tokens": tokens}
