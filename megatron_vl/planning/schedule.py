"""The order in which pipeline ranks compute, and what they hold meanwhile.

The orders are those of Megatron-Core: 1F1B, and with virtual stages the interleaved one, in which micro-batches
take turns in groups of the pipeline size. What ranks say to each other between the passes is in ``calls.py``, and how
long it all takes in ``simulation.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple


@dataclass(frozen=True)
class Pipeline:
    """The sizes of a schedule."""

    size: int
    virtual: int
    micro_batches: int

    @property
    def num_stages(self) -> int:
        return self.size * self.virtual


class Pass(NamedTuple):
    """A forward or backward pass of one chunk of a rank on one micro-batch."""

    micro_batch: int
    chunk: int
    is_backward: bool


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
