"""Real gloo ranks whose process groups also write down what they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vl.data.loading.batch import MicroBatch
from megatron_vl.parallel.rng import seed_all
from megatron_vl.parallel.topology import Topology
from megatron_vl.rehearsal.batches import make_batches
from megatron_vl.rehearsal.places import Grid
from megatron_vl.rehearsal.rank import rehearse_rank, said_by_all
from megatron_vl.rehearsal.recorder import Recorder, RecordingGroup, operation
from megatron_vl.rehearsal.records import Operation
from megatron_vl.rehearsal.step import Step
from megatron_vl.training.parallel_model import build_parallel_model
from megatron_vl.training.step import train_step
from tests.helpers.ranks import Start


class _Both(dist.Work):
    """A message of gloo, and what was noted of it."""

    def __init__(self, real: dist.Work, noted: dist.Work) -> None:
        super().__init__()
        self._real, self._noted = real, noted

    def wait(self, timeout: timedelta | None = None) -> bool:
        self._noted.wait()
        return self._real.wait()


class SpiedGroup(RecordingGroup):
    """A group of gloo."""

    def __init__(self, about: Any, recorder: Recorder) -> None:
        super().__init__(about, recorder)
        rank, size = about.group_rank, about.group_size
        self._gloo = dist.ProcessGroup(about.store, rank, size)
        backend = dist.ProcessGroupGloo(about.store, rank, size, timedelta(seconds=60))
        self._gloo._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, backend)

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> dist.Work:  # type: ignore[override]
        self._gloo.allreduce(tensors, opts).wait()
        return super().allreduce(tensors, opts)

    def allreduce_coalesced(self, tensors: list[Tensor], opts: Any = None) -> dist.Work:
        self._gloo.allreduce_coalesced(tensors, opts).wait()
        return super().allreduce_coalesced(tensors, opts)

    def broadcast(self, tensors: list[Tensor], opts: Any) -> dist.Work:  # type: ignore[override]
        self._gloo.broadcast(tensors, opts).wait()
        return self._collective("broadcast", tensors, root=self._ranks[opts.rootRank])

    def allgather(  # type: ignore[override]
        self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None
    ) -> dist.Work:
        self._gloo.allgather(outputs, inputs, opts).wait()
        return self._collective("all-gather", inputs, times=self.size())

    def all_gather_single(self, output: Tensor, own: Tensor, opts: Any = None) -> dist.Work:
        self._gloo.allgather([list(output.chunk(self.size()))], [own]).wait()
        return super().all_gather_single(output, own, opts)

    def all_gather_single_coalesced(self, outputs: list[Tensor], own: list[Tensor], opts: Any = None) -> dist.Work:
        for output, source in zip(outputs, own, strict=True):
            self._gloo.allgather([list(output.chunk(self.size()))], [source]).wait()
        return super().all_gather_single_coalesced(outputs, own, opts)

    def reduce_scatter_single(self, output: Tensor, source: Tensor, opts: Any = None) -> dist.Work:
        total = source.clone()
        self._gloo.allreduce([total]).wait()
        output.copy_(total.chunk(self.size())[self._rank])
        return super().reduce_scatter_single(output, source, opts)

    def reduce_scatter_single_coalesced(
        self, outputs: list[Tensor], sources: list[Tensor], opts: Any = None
    ) -> dist.Work:
        for output, source in zip(outputs, sources, strict=True):
            total = source.clone()
            self._gloo.allreduce([total]).wait()
            output.copy_(total.chunk(self.size())[self._rank])
        return super().reduce_scatter_single_coalesced(outputs, sources, opts)

    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    def barrier(self, opts: Any = None) -> dist.Work:
        self._gloo.barrier().wait()
        return super().barrier(opts)

    def send(self, tensors: list[Tensor], peer: int, tag: int) -> dist.Work:
        real = self._gloo.send(tensors, peer, tag)
        return _Both(real, self._recorder.note(operation("send", self._name, tensors, peer=self._ranks[peer])))

    def recv(self, tensors: list[Tensor], peer: int, tag: int) -> dist.Work:
        real = self._gloo.recv(tensors, peer, tag)
        return _Both(real, self._recorder.note(operation("receive", self._name, tensors, peer=self._ranks[peer])))


Plain = list[tuple[Any, ...]]
"""A program without what only names things."""


def program_and_rehearsal(start: Start, steps: dict[int, Step], grid: Grid) -> tuple[Plain, Plain, str]:
    """What a real rank of gloo asks for in a step, and what its rehearsal does; and the place of the rank."""
    place = grid.place(start.launch.rank)
    step = steps.get(place.data, steps[grid.data - 1])
    real = _real(start, step, grid)
    rehearsed = rehearse_rank(step, grid, place, said_by_all(step.config))
    return _plain(real.program, real.groups), _plain(rehearsed.program, rehearsed.groups), str(place)


def _real(start: Start, step: Step, grid: Grid) -> Recorder:
    recorder, place = Recorder(), grid.place(start.launch.rank)
    recorder.start(start.launch.rank, grid.world_size, group=SpiedGroup, init_method=start.init_method)
    try:
        with Topology(step.config.parallel, start.launch) as topology:
            seed_all(step.config.training.seed)
            model = build_parallel_model(step.config, topology)
            batches = [_with_pixels(batch) for batch in make_batches(step, grid, place)]
            assert not train_step(model, batches, config=step.config, topology=topology, step=0).skipped
    finally:
        dist.destroy_process_group()
    return recorder


def _with_pixels(batch: MicroBatch) -> MicroBatch:
    if batch.pixels is None or batch.tokens.is_meta:
        return batch
    return replace(batch, pixels=torch.zeros(batch.pixels.shape, dtype=torch.uint8))


def _plain(program: Sequence[object], groups: dict[str, tuple[int, ...]]) -> Plain:
    plain: Plain = []
    for step in program:
        if isinstance(step, Operation):
            shapes = step.shapes if step.dtype != "uint8" or step.kind != "all-gather" else "an object"
            plain.append((step.kind, groups[step.group], shapes, step.dtype, step.peer))
        else:
            plain.append(("wait", step.step))  # type: ignore[attr-defined]
    return plain
