"""How long a schedule takes: when every rank begins and ends each of its passes.

Every pass of every stage has its own duration. Ranks follow their lists of passes, calls and waits (``calls.py``):

- A rank leaves a call when every neighbor has come to the call for the same message. So a rank whose neighbor is slower
  waits for it even where it could compute the next pass.
- A message starts when both sides have left their calls, and takes the time of its stage. Messages do not disturb one
  another.

Nothing stores a message on its way: a send is complete when the receiver has asked for it. So it is with gloo, whose
TCP transport sends after the peer has announced its buffer. ``benchmarks/schedule.py`` compares these times with
Megatron-Core's schedules over gloo. With NCCL, the shapes of a message (24 bytes) may leave before the receiver asks
for them; the message itself cannot where it is larger than NCCL's buffers (4 MiB). There a rank with virtual stages may
wait less than is simulated, by about 2 % of a step at most. This was calculated and not measured: no machine with
several GPUs was there. Without virtual stages it changes nothing.

Equal stages without messages give the closed forms: (m + p - 1)(f + b) for 1F1B, and a bubble of (p - 1) / (m v) of the
ideal time for v virtual stages. With virtual stages that are unequal, ranks wait more than if messages overlapped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from megatron_vl.planning.calls import Call, Message, Wait, rank_program
from megatron_vl.planning.schedule import Pass, Pipeline


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
    ends: tuple[float, ...]
    """When each rank leaves the schedule: its last gradient has been sent."""
    shift: float = 0.0
    """Time of the micro-batches that were not simulated, since the schedule repeats itself; before the cool-down."""

    def end_of(self, rank: int) -> float:
        """Return when a rank leaves the schedule."""
        return self.ends[rank] + self.shift

    @property
    def end(self) -> float:
        return max(self.ends) + self.shift


def simulate(pipeline: Pipeline, times: Sequence[Durations], starts: Sequence[float] = ()) -> Timeline:
    """Run a schedule.

    Args:
        times: durations of each stage in the order of the model, in seconds.
        starts: when each rank may begin, in seconds, not negative; zero by default.
    """
    durations = [[own] * pipeline.micro_batches if isinstance(own, StageTimes) else own for own in times]
    board = _Board.of(durations)
    begin = list(starts) or [0.0] * pipeline.size
    ranks = [_Rank(pipeline, rank, durations, begin[rank]) for rank in range(pipeline.size)]
    running: list[tuple[Iterator[_Wanted], _Wanted]] = [(rank.run(board), ([0.0], 0)) for rank in ranks]
    while running:
        remaining = []
        moved = False
        for steps, wanted in running:
            table, number = wanted
            if table[number] != _NOT_YET:
                moved = True
                following = next(steps, None)
                if following is not None:
                    remaining.append((steps, following))
            else:
                remaining.append((steps, wanted))
        assert moved, "the schedule waits for itself"
        running = remaining
    return Timeline(tuple(tuple(rank.done) for rank in ranks), tuple(rank.now for rank in ranks))


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


_NOT_YET = -1.0
_Table: TypeAlias = list[float]
"""The time of something, by message; ``_NOT_YET`` before it has happened."""
_Wanted: TypeAlias = tuple[_Table, Message]


@dataclass(frozen=True)
class _Board:
    """When the two sides of each message come to their call, when they leave it, and how long the message takes."""

    sender_came: _Table
    receiver_came: _Table
    sender_left: _Table
    receiver_left: _Table
    seconds: list[float]

    @classmethod
    def of(cls, durations: Sequence[Sequence[StageTimes]]) -> _Board:
        """Return a board on which nothing has happened."""
        seconds = []
        for stage, own in enumerate(durations):
            before = durations[stage - 1] if stage else own
            for forward, backward in zip(own, before, strict=True):
                seconds += [forward.send, backward.send]

        def empty() -> _Table:
            return [_NOT_YET] * len(seconds)

        return cls(empty(), empty(), empty(), empty(), seconds)


@dataclass
class _Rank:
    """A rank on its way through its program."""

    pipeline: Pipeline
    rank: int
    durations: Sequence[Sequence[StageTimes]]
    now: float
    done: list[Timed] = field(default_factory=list)

    def run(self, board: _Board) -> Iterator[_Wanted]:
        """Go through the program; yield what must have happened elsewhere before the rank can go on."""
        for step in rank_program(self.pipeline, self.rank):
            if isinstance(step, Pass):
                own = self.durations[step.chunk * self.pipeline.size + self.rank][step.micro_batch]
                start = self.now
                self.now += own.backward if step.is_backward else own.forward
                self.done.append(Timed(step, start, self.now))
            elif isinstance(step, Call):
                yield from self._meet(step, board)
            else:
                yield from self._wait(step, board)

    def _meet(self, call: Call, board: _Board) -> Iterator[_Wanted]:
        """Come to a call, and leave the exchange of shapes when all neighbors have come."""
        sends, receives = call
        now = self.now
        for message in sends:
            board.sender_came[message] = now
        for message in receives:
            board.receiver_came[message] = now
        for messages, came in ((sends, board.receiver_came), (receives, board.sender_came)):
            for message in messages:
                if came[message] == _NOT_YET:
                    yield came, message
                if came[message] > now:
                    now = came[message]
        for message in sends:
            board.sender_left[message] = now
        for message in receives:
            board.receiver_left[message] = now
        self.now = now

    def _wait(self, step: Wait, board: _Board) -> Iterator[_Wanted]:
        """Wait until messages have arrived."""
        sender_left, receiver_left = board.sender_left, board.receiver_left
        for message in step.messages:
            if sender_left[message] == _NOT_YET:
                yield sender_left, message
            if receiver_left[message] == _NOT_YET:
                yield receiver_left, message
            self.now = max(self.now, board.seconds[message] + max(sender_left[message], receiver_left[message]))
