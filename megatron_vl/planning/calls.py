"""What a pipeline rank does in a step: its passes, the calls that exchange messages, and the waits for messages.

The lists are those of Megatron-Core 0.16.1 as this project configures it (``model/configs.py``):
``forward_backward_pipelining_without_interleaving`` and ``..._with_interleaving`` of its module ``schedules``.
``tests/unit/planning/test_calls.py`` compares them, step by step. (0.19.2 waits earlier for an activation that it has
sent in the steady state.) A call is one ``P2PCommunicator._communicate`` of ``p2p_communication.py``. It has two parts:

1. The ranks tell each other the shapes of all its messages, since those vary (``variable_seq_lengths``). They always
   wait for this, even where messages overlap. So a rank cannot leave a call before its neighbor has come to the call
   for the same message, although it may need that message only after its next pass.
2. The messages start. Without virtual stages, and in the warm-up and the cool-down with them, the rank waits for them
   at once. In the steady state of virtual stages it waits for one that it receives before the pass that needs it, and
   for one that it has sent after the next call of the same direction. Only this part overlaps with computation.

The order of the messages within a call does not matter, since their shapes are exchanged together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from megatron_vl.planning.schedule import Pass, Pipeline, rank_order

Message: TypeAlias = int
"""Of what a stage sends in a step: see :func:`message`."""
Messages: TypeAlias = tuple[Message, ...]


class Call(NamedTuple):
    """Messages whose shapes are exchanged, and which start then."""

    sends: Messages
    receives: Messages


class Wait(NamedTuple):
    """The rank waits until messages that it sends or receives have arrived."""

    messages: Messages


Step: TypeAlias = Pass | Call | Wait


def message(pipeline: Pipeline, stage: int, what: Pass) -> Message:
    """Return the number of what a stage sends after a pass; numbers are below 2 stages x micro-batches."""
    return 2 * (stage * pipeline.micro_batches + what.micro_batch) + what.is_backward


def rank_program(pipeline: Pipeline, rank: int) -> list[Step]:
    """Return what a pipeline rank does, in its order; without calls and waits for no message."""
    order = rank_order(pipeline, rank)
    program = _Program([_Turn.of(pipeline, rank, one) for one in order])
    if pipeline.virtual == 1:
        program.add_plain(warm_up=min(pipeline.size - rank - 1, pipeline.micro_batches))
    else:
        ahead = 2 * (pipeline.size - rank - 1) + (pipeline.virtual - 1) * pipeline.size
        program.add_interleaved(warm_up=min(ahead, len(order) // 2))
    return program.steps


class _Turn(NamedTuple):
    """A pass, what it takes and what it gives."""

    what: Pass
    input: Messages
    output: Messages

    @classmethod
    def of(cls, pipeline: Pipeline, rank: int, what: Pass) -> _Turn:
        _, chunk, is_backward = what
        stage, last = chunk * pipeline.size + rank, pipeline.num_stages - 1
        before, begins, ends = (stage + 1, last, 0) if is_backward else (stage - 1, 0, last)
        return cls(
            what,
            () if stage == begins else (message(pipeline, before, what),),
            () if stage == ends else (message(pipeline, stage, what),),
        )


class _Program:
    """The steps of a rank while they are put together."""

    def __init__(self, turns: Sequence[_Turn]) -> None:
        self.steps: list[Step] = []
        self.forwards = [one for one in turns if not one.what.is_backward]
        self.backwards = [one for one in turns if one.what.is_backward]

    def add_plain(self, warm_up: int) -> None:
        """Add the steps of 1F1B."""
        forwards, backwards = self.forwards, self.backwards
        for one in forwards[:warm_up]:
            self._exchange((), one.input)
            self.steps.append(one.what)
            self._exchange(one.output, ())
        steady = len(forwards) - warm_up
        if steady:
            self._exchange((), forwards[warm_up].input)
        for number in range(steady):
            forward, backward = forwards[warm_up + number], backwards[number]
            self.steps.append(forward.what)
            self._exchange(forward.output, backward.input)
            self.steps.append(backward.what)
            self._exchange(backward.output, forwards[warm_up + number + 1].input if number < steady - 1 else ())
        for one in backwards[steady:]:
            self._exchange((), one.input)
            self.steps.append(one.what)
            self._exchange(one.output, ())

    def add_interleaved(self, warm_up: int) -> None:
        """Add the steps of the interleaved schedule. After each pass, the input of the next one is received."""
        forwards, backwards = self.forwards, self.backwards
        steady = len(forwards) - warm_up
        self._exchange((), forwards[0].input)
        for number, one in enumerate(forwards[:warm_up], start=1):
            self.steps.append(one.what)
            self._exchange(one.output, _input_of(forwards, number))
        if steady:
            self._call((), backwards[0].input)
            self._add_steady(warm_up)
            self._wait(backwards[steady].input)
        else:
            self._exchange((), backwards[0].input)
        for number, one in enumerate(backwards[steady:], start=steady + 1):
            self.steps.append(one.what)
            self._exchange(one.output, _input_of(backwards, number))
        if steady:
            self._wait(backwards[steady - 1].output)

    def _add_steady(self, warm_up: int) -> None:
        """Add the steady state, in which waits follow one pass or one call later than without overlap."""
        forwards, backwards = self.forwards[warm_up:], self.backwards
        for number, forward in enumerate(forwards):
            if number:
                self._wait(forward.input)
            self._overlap(forwards, number)
            self._wait(backwards[number].input)
            self._overlap(backwards, number)

    def _overlap(self, turns: Sequence[_Turn], number: int) -> None:
        """Add a pass, its call, and the wait for what the previous one has sent."""
        one = turns[number]
        self.steps.append(one.what)
        self._call(one.output, _input_of(turns, number + 1))
        if number:
            self._wait(turns[number - 1].output)

    def _call(self, sends: Messages, receives: Messages) -> None:
        if sends or receives:
            self.steps.append(Call(sends, receives))

    def _wait(self, messages: Messages) -> None:
        if messages:
            self.steps.append(Wait(messages))

    def _exchange(self, sends: Messages, receives: Messages) -> None:
        """Add a call, and the wait for all its messages."""
        if sends or receives:
            self.steps.append(Call(sends, receives))
            self.steps.append(Wait(sends + receives))


def _input_of(turns: Sequence[_Turn], number: int) -> Messages:
    """Return what a pass takes, or nothing after the last one."""
    return turns[number].input if number < len(turns) else ()
