"""The order in which pipeline ranks compute, and a simulation of how long it takes.

The orders are those of Megatron-Core: 1F1B, and with virtual stages the interleaved one, in which micro-batches
take turns in groups of the pipeline size. In the simulation every pass of every stage has its own duration. A pass
begins when its rank is free and what it needs has arrived. Plain 1F1B waits for each message, so a message keeps its
sender busy; with virtual stages messages travel while the ranks compute.

Equal stages give the closed forms: (m + p - 1)(f + b) for 1F1B, and a bubble of (p - 1) / (m v) of the ideal time for v
virtual stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias


@dataclass(frozen=True)
class Pipeline:
    """The sizes of a schedule."""

    size: int
    virtual: int
    micro_batches: int

    @property
    def num_stages(self) -> int:
        return self.size * self.virtual


@dataclass(frozen=True)
class Pass:
    """A forward or backward pass of one chunk of a rank on one micro-batch."""

    micro_batch: int
    chunk: int
    is_backward: bool


@dataclass(frozen=True)
class StageTimes:
    """Durations of one (virtual) stage for a micro-batch, in seconds."""

    forward: float
    backward: float
    send: float = 0.0
    """Time of the message to the next stage, and of the gradient that comes back."""


Durations: TypeAlias = StageTimes | Sequence[StageTimes]
"""Of one stage: the same for all micro-batches, or those of each micro-batch."""


@dataclass(frozen=True)
class Timed:
    """A pass and when it runs."""

    what: Pass
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """What every rank does, and when."""

    ranks: tuple[tuple[Timed, ...], ...]
    shift: float = 0.0
    """Time of the micro-batches that were not simulated, since the schedule repeats itself; before the cool-down."""

    def end_of(self, rank: int) -> float:
        """Return when a rank has computed its last pass."""
        return self.ranks[rank][-1].end + self.shift

    @property
    def end(self) -> float:
        return max(self.end_of(rank) for rank in range(len(self.ranks)))


def rank_order(pipeline: Pipeline, rank: int) -> list[Pass]:
    """Return the passes of one pipeline rank in their order; ``micro_batches`` is a multiple of the size if virtual."""
    size, virtual, count = pipeline.size, pipeline.virtual, pipeline.micro_batches
    if virtual == 1:
        forwards = [(number, 0) for number in range(count)]
        backwards, warm_up = forwards, min(size - rank - 1, count)
    else:
        assert count % size == 0
        forwards = [
            (first + number, chunk)
            for first in range(0, count, size)
            for chunk in range(virtual)
            for number in range(size)
        ]
        backwards = [(number, virtual - 1 - chunk) for number, chunk in forwards]
        warm_up = min(2 * (size - rank - 1) + (virtual - 1) * size, len(forwards))
    order = [Pass(*item, False) for item in forwards[:warm_up]]
    for position in range(warm_up, len(forwards)):
        order += [Pass(*forwards[position], False), Pass(*backwards[position - warm_up], True)]
    return order + [Pass(*item, True) for item in backwards[len(forwards) - warm_up :]]


@dataclass
class _Clock:
    """The state of a simulation."""

    pipeline: Pipeline
    times: Sequence[Durations]
    ended: dict[tuple[int, int, bool], float] = field(default_factory=dict)
    """When what a pass has computed is at the next stage: by stage, micro-batch and direction."""

    def ready(self, stage: int, what: Pass) -> float | None:
        """Return when the input of a pass has arrived, or None if the pass that gives it has not run."""
        if not what.is_backward:
            return 0.0 if stage == 0 else self.ended.get((stage - 1, what.micro_batch, False))
        last = stage == self.pipeline.num_stages - 1
        return self.ended.get((stage, what.micro_batch, False) if last else (stage + 1, what.micro_batch, True))

    def run(self, stage: int, what: Pass, start: float) -> float:
        """Compute a pass; return when its rank is free again."""
        own = self._times(stage, what)
        computed = start + (own.backward if what.is_backward else own.forward)
        if what.is_backward:
            message = self._times(stage - 1, what).send if stage > 0 else 0.0
        else:
            message = own.send if stage < self.pipeline.num_stages - 1 else 0.0
        self.ended[stage, what.micro_batch, what.is_backward] = computed + message
        return computed + (message if self.pipeline.virtual == 1 else 0.0)

    def _times(self, stage: int, what: Pass) -> StageTimes:
        own = self.times[stage]
        return own if isinstance(own, StageTimes) else own[what.micro_batch]


def simulate(pipeline: Pipeline, times: Sequence[Durations], starts: Sequence[float] = ()) -> Timeline:
    """Run a schedule.

    Args:
        times: durations of each stage in the order of the model.
        starts: when each rank may begin; zero by default.
    """
    size = pipeline.size
    clock = _Clock(pipeline, times)
    orders = [rank_order(pipeline, rank) for rank in range(size)]
    done: list[list[Timed]] = [[] for _ in range(size)]
    free = list(starts) or [0.0] * size
    waiting = set(range(size))
    while waiting:
        moved = False
        for rank in sorted(waiting):
            order, own = orders[rank], done[rank]
            while len(own) < len(order):
                what = order[len(own)]
                stage = what.chunk * size + rank
                ready = clock.ready(stage, what)
                if ready is None:
                    break
                start = max(free[rank], ready)
                free[rank] = clock.run(stage, what, start)
                own.append(Timed(what, start, free[rank]))
                moved = True
            if len(own) == len(order):
                waiting.discard(rank)
        assert moved, "the schedule waits for itself"
    return Timeline(tuple(map(tuple, done)))


def simulate_repeating(pipeline: Pipeline, times: Sequence[StageTimes], starts: Sequence[float] = ()) -> Timeline:
    """Return :func:`simulate` with a part of the micro-batches, and the time of the others added.

    After the warm-up the schedule repeats itself once for every group of micro-batches: one for 1F1B, ``size`` with
    virtual stages. So the time of a further group is that between the last two.
    """
    group = pipeline.size if pipeline.virtual > 1 else 1
    enough = 8 * pipeline.size
    if pipeline.micro_batches <= enough + group:
        return simulate(pipeline, times, starts)
    long = simulate(replace(pipeline, micro_batches=enough), times, starts)
    short = simulate(replace(pipeline, micro_batches=enough - group), times, starts)
    further = (pipeline.micro_batches - enough) // group * (long.end - short.end)
    return replace(long, shift=further)


def held_at_most(pipeline: Pipeline, rank: int, kept: Sequence[float], working: Sequence[float]) -> tuple[float, float]:
    """Return the largest memory of a rank in a step: what micro-batches keep then, and what the pass needs besides.

    Args:
        kept: bytes that each chunk of the rank keeps of a micro-batch between its passes.
        working: bytes that the backward pass of each chunk needs besides.
    """
    if pipeline.virtual == 1:
        return min(pipeline.micro_batches, pipeline.size - rank) * kept[0], working[0]
    groups = 3 * pipeline.size  # the warm-up and a turn; the rest repeats
    order = rank_order(replace(pipeline, micro_batches=min(pipeline.micro_batches, groups)), rank)
    held, most = 0.0, (0.0, 0.0)
    for what in order:
        if what.is_backward:
            most = max(most, (held, working[what.chunk]), key=sum)
            held -= kept[what.chunk]
        else:
            held += kept[what.chunk]
    return most
