"""Programs of ranks, made by hand."""

from __future__ import annotations

from megatron_vl.rehearsal.places import Place
from megatron_vl.rehearsal.records import Held, Operation, Rehearsed, Shape, Wait

PAIR = "pair"
"""A process group of ranks 0 and 1."""


def sent(peer: int, shape: Shape = (4, 1, 8), kind: str = "send") -> Operation:
    """A message of bf16."""
    return Operation(kind, PAIR, (shape,), "bfloat16", 2 * shape[0] * shape[1] * shape[2], peer)


def received(peer: int, shape: Shape = (4, 1, 8)) -> Operation:
    """A message of bf16."""
    return sent(peer, shape, "receive")


def reduced(size: int = 6, kind: str = "all-reduce") -> Operation:
    """A collective of both ranks."""
    return Operation(kind, PAIR, ((size,),), "float32", 4 * size)


def rank(number: int, *program: Operation | Wait) -> Rehearsed:
    """A rank of a pipeline of two, and what it asks for."""
    held = Held(0, 0, 0, 0, frozenset(), 0, 0, 0, 0)
    return Rehearsed(number, Place(0, number, 0), held, {PAIR: (0, 1)}, program, 0)
