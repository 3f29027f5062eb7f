"""Runs on a rank: steps in which the linear layers of a tower keep a copy of their weight, as Transformer Engine does.

A linear layer of Transformer Engine multiplies with a quantized copy of its weight. It makes the copy in the first
pass, and anew in passes for which ``is_first_microbatch`` is set. The backward pass of such a pass replaces the sum of
the weight gradients; the others add to it. The stand-ins here keep a plain copy instead, compute as usual, and note in
each pass whether the copy is the weight.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from megatron.core import fp8_utils
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader

from megatron_vl.backends.local.backend import LocalBackend
from megatron_vl.checkpoint import contents
from megatron_vl.config.schema import RunConfig
from megatron_vl.model import build
from megatron_vl.parallel.rng import seed_all
from megatron_vl.parallel.topology import Topology
from megatron_vl.training.parallel_model import ParallelModel, build_parallel_model
from megatron_vl.training.step import evaluate, train_step
from tests.helpers.ranks import Start
from tests.helpers.tiny import micro_batches
from tests.parallel.gradients import own_images

STEPS = 3


@dataclass
class Notes:
    """What is shared by the stand-ins of a rank."""

    open: list[int | None] = field(default_factory=list)
    """FP8 contexts that are open: the number of a layer, or None for all layers of a tower."""
    again: int = 0
    """Layers that Transformer Engine's checkpoint function was asked to compute again."""


@dataclass
class Passes:
    """What one linear layer did in one step."""

    number: int | None
    """The layer in whose FP8 context it ran; None in bf16."""
    copies: list[Tensor]
    """Its copies of the weight, by pass in FP8."""
    stale: int
    """Passes in FP8 whose copy was not the weight."""
    replacing: list[bool]
    """Whether a backward pass replaces the sum of the gradients, in their order."""


class _Replace(torch.autograd.Function):
    """The identity; its backward pass notes whether it belongs to a first micro-batch."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, first: bool, noted: list[bool]) -> Tensor:
        ctx.first, ctx.noted = first, noted
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        ctx.noted.append(ctx.first)
        return gradients[0], None, None


class _Keeping(nn.Module):
    """A linear layer that keeps a copy of its weight."""

    weight: Tensor
    notes: Notes

    def keep(self, notes: Notes) -> None:
        """Begin with no copy."""
        self.notes, self.is_first_microbatch = notes, True
        self.kept: Tensor | None = None
        self.passes = Passes(None, [], 0, [])

    def take_passes(self) -> Passes:
        """What it did since the last call."""
        taken, self.passes = self.passes, Passes(None, [], 0, [])
        return taken

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        first, self.is_first_microbatch = self.is_first_microbatch, False
        if self.notes.open:
            if first or self.kept is None:
                self.kept = self.weight.detach().clone()
            self.passes.number = self.notes.open[-1]
            self.passes.copies.append(self.kept)
            self.passes.stale += not torch.equal(self.kept, self.weight)
        output, bias = super().forward(*args, **kwargs)
        return _Replace.apply(output, first, self.passes.replacing), bias

    def get_extra_state(self) -> Tensor:
        """Bytes of its own, as Transformer Engine's modules have."""
        return torch.zeros(3, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        assert state is None, "bytes of a checkpoint would be unpickled"


class _Column(_Keeping, ColumnParallelLinear):
    """A column-parallel one."""


class _Row(_Keeping, RowParallelLinear):
    """A row-parallel one."""


def build_keeping(config: RunConfig, topology: Topology, notes: Notes) -> ParallelModel:
    """Build the model, and let the linear layers of both towers keep copies."""
    model = build_parallel_model(config, topology)
    kinds = {ColumnParallelLinear: _Column, RowParallelLinear: _Row}
    for wrapped in model.all_wrapped:
        for name, module in wrapped.module.named_modules():
            if ".layers." in name and type(module) in kinds:
                module.__class__ = kinds[type(module)]
                module.keep(notes)
    return model


@contextlib.contextmanager
def stand_ins(notes: Notes) -> Iterator[None]:
    """Take the place of Transformer Engine's contexts and its checkpoint function, with the local backend's layers."""

    @contextlib.contextmanager
    def in_fp8(config: Any, layer_no: int = -1, is_init: bool = False) -> Iterator[None]:
        if fp8_utils.is_first_last_bf16_layer(config, layer_no):
            yield
            return
        notes.open.append(None if layer_no < 0 else layer_no)
        yield
        notes.open.pop()

    def checkpoint(run: Any, *args: Any) -> Tensor:
        notes.again += 1
        output: Tensor = torch.utils.checkpoint.checkpoint(run, args[-1], use_reentrant=True)
        return output

    with (
        mock.patch.object(build, "select_backend", lambda *_, **__: LocalBackend()),
        mock.patch.object(fp8_utils, "get_fp8_context", in_fp8),
        mock.patch("megatron.core.extensions.transformer_engine.te_checkpoint", checkpoint),
    ):
        yield


@dataclass(frozen=True)
class Trained:
    """What a rank did in some steps."""

    steps: list[dict[str, Passes]]
    """By the name of the linear layer."""
    again: int
    validated: dict[str, Passes]
    """In the validation between the first two steps."""


def train_with_copies(start: Start, config: RunConfig, schedule_knows: bool = True) -> Trained:
    """Train ``STEPS`` steps, with a validation after the first one.

    Args:
        schedule_knows: whether the configuration of the schedule has FP8; without it, nothing works as it should.
    """
    notes = Notes()
    with start.topology(config.parallel) as topology, stand_ins(notes):
        seed_all(config.training.seed)
        model = build_keeping(config, topology, notes)
        if not schedule_knows:
            for wrapped in model.all_wrapped:
                wrapped.config.fp8 = None
        steps, validated = [], {}
        for step in range(STEPS):
            train_step(model, _batches(config, topology, step), config=config, topology=topology, step=step)
            steps.append(_take(model))
            if step == 0:
                batches = _batches(config, topology, step)
                evaluate(model.wrapped, [batches], topology=topology, encoder=model.encoder)
                validated = _take(model)
        return Trained(steps, notes.again, validated)


def saved_and_loaded(start: Start, config: RunConfig, root: Path) -> list[str]:
    """Names of the tensors in a checkpoint after a step; loading it must hand no bytes to a layer."""
    notes = Notes()
    with start.topology(config.parallel) as topology, stand_ins(notes):
        model = build_keeping(config, topology, notes)
        train_step(model, _batches(config, topology, 0), config=config, topology=topology, step=0)
        trained = contents.Trained(model.chunks, model.optimizer)
        path = contents.save(trained, {"step": 1}, config=config, topology=topology, root=root)
        contents.load(trained, path, config=config, topology=topology)
        return sorted(FileSystemReader(path).read_metadata().state_dict_metadata)


def _batches(config: RunConfig, topology: Topology, step: int) -> Sequence[Any]:
    batches = micro_batches(config.model, 4 * topology.dp_size, seed=100 * step)
    return own_images(batches[topology.dp_rank :: topology.dp_size], config, topology)


def _take(model: ParallelModel) -> dict[str, Passes]:
    return {
        name: module.take_passes()
        for wrapped in model.all_wrapped
        for name, module in wrapped.module.named_modules()
        if isinstance(module, _Keeping)
    }
