"""Compute logits, image features, loss and gradient norms of a checkpoint on given tokens and pixels, at any layout.

The results serve comparisons with another implementation. So they are always unsharded and under published names.
Logits and features are those of evaluation mode, loss and gradients those of training mode. The two differ in rows
above the native length (``model/rotary.py``).

Norms need no unsharded gradient. Squares add up over tensor-parallel shards, and a replicated gradient counts on one
rank. Gate and up are one tensor here and two in the published layout; a shard holds them in their order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_vl.config.schema import ModelConfig, ParallelConfig, RunConfig, TrainingConfig
from megatron_vl.conversion.qwen_vl import correspondences
from megatron_vl.data.loading.batch import MicroBatch
from megatron_vl.evaluation.forward_inputs import ForwardInputs, idle_batch
from megatron_vl.model.qwen_vl import QwenVL
from megatron_vl.parallel.collectives import to_rank_0
from megatron_vl.parallel.topology import Topology
from megatron_vl.training.parallel_model import wrap_chunks
from megatron_vl.training.step import evaluating, forward_backward


@dataclass(frozen=True)
class ForwardOutputs:
    """This rank's outputs of a forward pass: one tensor for each micro-batch, on the CPU in fp32."""

    logits: list[Tensor]
    """float32[m, padded vocabulary / tp] each, on ranks with the head."""
    features: list[Tensor]
    """float32[queries, n, h] each, on ranks with the resampler."""


def forward_config(saved: RunConfig, parallel: ParallelConfig, *, seq_length: int, bf16: bool) -> RunConfig:
    """Return the configuration of a saved model at a layout, with everything trainable."""
    return replace(
        saved,
        parallel=replace(parallel, use_distributed_optimizer=False),
        data=replace(saved.data, seq_length=seq_length, attention_span="row", valid_data_path=()),
        training=TrainingConfig(bf16=bf16),
    )


def forward(
    chunks: Sequence[QwenVL], inputs: ForwardInputs, *, config: RunConfig, topology: Topology
) -> dict[str, Tensor]:
    """Compute everything that ``inputs`` allow; every rank calls it.

    Returns:
        On rank 0 ``logits`` float32[b, s, vocabulary]; with pixels ``visual_output`` float32[n, queries, h]; with
        labels ``loss``, ``grad_norm_total`` and ``grad_norm.<published name>``, float32[1] each. Elsewhere nothing.

    Raises:
        DataError: if the inputs do not fit the model.
    """
    inputs.check(config.model)
    mine = _deal(inputs.micro_batches(config.model, labels=None), config, topology)
    outputs = _assemble(run_eval_forward(chunks, mine, topology=topology), inputs, config.model, topology)
    if inputs.labels is not None:
        mine = _deal(inputs.micro_batches(config.model, labels=inputs.labels), config, topology)
        norms = loss_and_grad_norms(chunks, mine, config=config, topology=topology)
        outputs |= norms if topology.rank == 0 else {}
    return outputs


@torch.no_grad()
def run_eval_forward(chunks: Sequence[QwenVL], batches: list[MicroBatch], *, topology: Topology) -> ForwardOutputs:
    """Run micro-batches in evaluation mode and keep the outputs of resampler and head."""
    heads = [chunk.language_model.output_layer for chunk in chunks if chunk.language_model and chunk.stage.head]
    resamplers = [chunk.resampler for chunk in chunks if chunk.resampler]
    with evaluating(chunks), outputs_of(heads) as logits, outputs_of(resamplers) as features:
        forward_backward(chunks, batches, topology=topology, forward_only=True)
    return ForwardOutputs(logits, features)


def loss_and_grad_norms(
    chunks: Sequence[QwenVL], batches: list[MicroBatch], *, config: RunConfig, topology: Topology
) -> dict[str, Tensor]:
    """Return mean loss and gradient norms in training mode, on every rank; whole gradients stay in ``main_grad``."""
    wrapped = wrap_chunks(chunks, config)
    for chunk in wrapped:
        chunk.train()
        chunk.zero_grad_buffer()
    loss, _ = forward_backward(wrapped, batches, topology=topology, forward_only=False)
    squares = _squared_norms(chunks, config.model, topology)
    values = {f"grad_norm.{name}": square**0.5 for name, square in squares.items()}
    values |= {"loss": loss.mean, "grad_norm_total": sum(squares.values()) ** 0.5}
    return {name: torch.tensor([value], dtype=torch.float32) for name, value in values.items()}


def _squared_norms(chunks: Sequence[QwenVL], model: ModelConfig, topology: Topology) -> dict[str, float]:
    """Return the squared norm of the gradient of every trained tensor, by published name, on every rank."""
    parameters = {name: parameter for chunk in chunks for name, parameter in chunk.named_parameters()}
    names: list[str] = []
    squares: list[float] = []
    for entry in correspondences(model):
        if entry.spec.is_buffer:
            continue
        names += entry.hf_names
        parameter = parameters.get(entry.spec.name)
        if parameter is None or (entry.spec.split_axis is None and topology.tp_rank != 0):
            squares += [0.0 for _ in entry.hf_names]
        else:
            shares = parameter.main_grad.chunk(len(entry.hf_names))
            squares += [float(torch.linalg.vector_norm(share, dtype=torch.float64)) ** 2 for share in shares]
    summed = torch.tensor(squares, dtype=torch.float64, device=topology.device)
    dist.all_reduce(summed, group=topology.groups.mp)
    return dict(zip(names, summed.tolist(), strict=True))


def _deal(batches: list[MicroBatch], config: RunConfig, topology: Topology) -> list[MicroBatch]:
    """Return the micro-batches of this data-parallel rank; each rank gets the same number."""
    idle = [idle_batch(config.model)] * (-len(batches) % topology.dp_size)
    return [*batches, *idle][topology.dp_rank :: topology.dp_size]


def _assemble(
    local: ForwardOutputs, inputs: ForwardInputs, model: ModelConfig, topology: Topology
) -> dict[str, Tensor]:
    """Combine the outputs of all ranks on rank 0."""
    spans = [len(starts) for starts in inputs.span_starts(model)]
    mine = range(topology.dp_rank, len(spans), topology.dp_size)
    pieces = {("logits", row, topology.tp_rank): piece for row, piece in zip(mine, local.logits, strict=False)}
    pieces |= {("features", row, 0): piece for row, piece in zip(mine, local.features, strict=False) if spans[row]}
    outputs = {}
    if topology.rank == 0:
        outputs["logits"] = torch.empty(*inputs.input_ids.shape, model.language.vocab_size)
        if inputs.pixels is not None:
            size = (len(inputs.pixels), model.resampler.num_queries, model.language.hidden_size)
            outputs["visual_output"] = torch.empty(size)
    for (kind, row, shard), piece in to_rank_0(pieces, topology=topology):
        if kind == "logits":
            place = outputs["logits"][row, :, shard * piece.shape[1] :][:, : piece.shape[1]]
            place.copy_(piece[:, : place.shape[1]])  # what is cut off pads the vocabulary
        else:
            first = sum(spans[:row])
            outputs["visual_output"][first : first + spans[row]] = piece.transpose(0, 1)
    return outputs


@contextmanager
def outputs_of(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Copy the outputs of modules while the block runs: the loss, for one, overwrites the memory of the logits."""
    copies: list[Tensor] = []

    def copy(_: nn.Module, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
        value = output if isinstance(output, Tensor) else output[0]
        copies.append(value.to("cpu", torch.float32, copy=True))

    hooks = [module.register_forward_hook(copy) for module in modules]
    try:
        yield copies
    finally:
        for hook in hooks:
            hook.remove()
