"""Time every pass of every stage on this rank, without changing what is computed.

Forward passes are those of the wrapped chunks: two hooks of the module, while a step is timed. Backward passes have no
module. Megatron-Core's schedules call ``timers`` of the configuration around each, in the order that
``planning/schedule.py`` knows. The vision part under ``vision_parallel data`` calls the same timers
(``training/image_encoder.py``). Outside of timed steps there are neither hooks nor timers.

On CUDA the moments are events on the stream: kernels run as they would, and the host waits once, after the step. So a
pass includes the time in which the device waits for the launches of its kernels. Without CUDA they are the clock's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from megatron_vl.data.loading.batch import MicroBatch
from megatron_vl.parallel.topology import Topology
from megatron_vl.planning.schedule import Pass, Pipeline, rank_order
from megatron_vl.planning.stage_profile import VisionTimes
from megatron_vl.training.image_encoder import BACKWARD, FORWARD
from megatron_vl.training.parallel_model import ParallelModel

Ranges = Callable[[str], AbstractContextManager[Any]]
"""Gives a range of a trace for a name."""
_CORE_BACKWARD = "backward-compute"


class StagePass(NamedTuple):
    """A pass of a stage on a micro-batch."""

    stage: int
    micro_batch: int
    is_backward: bool

    @property
    def name(self) -> str:
        """Return the name of its range."""
        return f"{'backward' if self.is_backward else 'forward'} stage {self.stage} micro-batch {self.micro_batch}"


@dataclass(frozen=True)
class TimedStep:
    """The seconds of one step on this rank."""

    step: int
    """From 1, as in the log."""
    passes: dict[StagePass, float]
    vision: VisionTimes | None


@dataclass
class _Span:
    """Something between two moments."""

    range: AbstractContextManager[Any]
    begin: Any
    end: Any = None


@dataclass
class _Spans:
    """The spans of a step by name. Each name runs once at a time."""

    ranges: Ranges
    cuda: bool
    open: dict[str, _Span] = field(default_factory=dict)
    closed: dict[str, _Span] = field(default_factory=dict)

    def begin(self, name: str) -> None:
        span = self.open[name] = _Span(self.ranges(name), None)
        span.range.__enter__()
        span.begin = self._now()

    def end(self, name: str) -> None:
        span = self.closed[name] = self.open.pop(name)
        span.end = self._now()
        span.range.__exit__(None, None, None)

    def seconds(self, name: str) -> float:
        """Return the time of a closed span, after the device has done all its work; zero for one that never was."""
        span = self.closed.get(name)
        if span is None:
            return 0.0
        return float(span.begin.elapsed_time(span.end)) / 1e3 if self.cuda else float(span.end - span.begin)

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class _CoreTimers:
    """What Megatron-Core calls ``timers``: it gives a timer for a name."""

    def __init__(self, spans: _Spans, backward: Iterator[StagePass]) -> None:
        self._spans, self._backward = spans, backward
        self._now: str | None = None
        """The name of the backward pass that runs."""

    def __call__(self, name: str, log_level: int | None = None) -> _CoreTimer:
        return _CoreTimer(self, name)

    def start(self, name: str) -> None:
        if name == _CORE_BACKWARD:
            name = self._now = next(self._backward).name
        self._spans.begin(name)

    def stop(self, name: str) -> None:
        if name == _CORE_BACKWARD:
            assert self._now is not None, "a backward pass ends that has not begun"
            name = self._now
        self._spans.end(name)


@dataclass(frozen=True)
class _CoreTimer:
    """One timer of Megatron-Core. Its barrier would make ranks wait that otherwise would not."""

    timers: _CoreTimers
    name: str

    def start(self, barrier: bool = False) -> None:
        self.timers.start(self.name)

    def stop(self, barrier: bool = False) -> None:
        self.timers.stop(self.name)


class StageClock:
    """Times the steps of a model on this rank."""

    def __init__(self, model: ParallelModel, topology: Topology, ranges: Ranges) -> None:
        self._model, self._topology, self._ranges = model, topology, ranges
        self.timed: list[TimedStep] = []

    @contextmanager
    def step(self, step: int, batches: Sequence[MicroBatch]) -> Iterator[None]:
        """Time a training step.

        Args:
            step: its number, from 0.
            batches: the micro-batches of this data-parallel rank.
        """
        cuda = self._topology.device.type == "cuda"
        spans, order = _Spans(self._ranges, cuda), self._order(len(batches))
        timers = _CoreTimers(spans, (one for one in order if one.is_backward))
        configs = {id(chunk.config): chunk.config for chunk in self._model.all_wrapped}
        hooks = [hook for number in range(self._topology.vp_size) for hook in self._hooks(number, spans)]
        for config in configs.values():
            config.timers = timers
        try:
            with self._ranges(f"step {step + 1}"):
                yield
        finally:
            for config in configs.values():
                config.timers = None
            for hook in hooks:
                hook.remove()
        if cuda:
            torch.cuda.synchronize()
        seconds = {one: spans.seconds(one.name) for one in order}
        self.timed.append(TimedStep(step + 1, seconds, self._vision(step + 1, spans, batches)))

    def _order(self, micro_batches: int) -> list[StagePass]:
        """Return the passes of this rank in their order."""
        topology = self._topology

        def of(what: Pass) -> StagePass:
            return StagePass(what.chunk * topology.pp_size + topology.pp_rank, what.micro_batch, what.is_backward)

        pipeline = Pipeline(topology.pp_size, topology.vp_size, micro_batches)
        return [of(what) for what in rank_order(pipeline, topology.pp_rank)]

    def _hooks(self, chunk: int, spans: _Spans) -> list[Any]:
        """Time the forward passes of a chunk; they run in the order of micro-batches."""
        stage, wrapped = chunk * self._topology.pp_size + self._topology.pp_rank, self._model.wrapped[chunk]
        begun: list[StagePass] = []

        def begin(module: nn.Module, inputs: Any) -> None:
            begun.append(StagePass(stage, len(begun), False))
            spans.begin(begun[-1].name)

        def end(module: nn.Module, inputs: Any, output: Any) -> None:
            spans.end(begun[-1].name)

        return [wrapped.register_forward_pre_hook(begin), wrapped.register_forward_hook(end)]

    def _vision(self, step: int, spans: _Spans, batches: Sequence[MicroBatch]) -> VisionTimes | None:
        if self._model.encoder is None:
            return None
        images = sum(len(batch.pixels) for batch in batches if batch.pixels is not None)
        forward, backward = spans.seconds(FORWARD), spans.seconds(BACKWARD)
        return VisionTimes(step, self._topology.rank, images, forward, backward)
