"""What is known of a rank after its rehearsal. No torch: the process that compares needs none."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vl.rehearsal.places import Place

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Operation:
    """Something that a rank asked of a process group."""

    kind: str
    """``send``, ``receive``, or the name of a collective."""
    group: str
    """The name of the process group, the same on all of its members."""
    shapes: tuple[Shape, ...]
    dtype: str
    num_bytes: int
    """Bytes of the message; of a collective those of the whole: what is gathered, reduced or broadcast."""
    peer: int | None = None
    """Global rank of the other side; of a broadcast its source."""

    def __str__(self) -> str:
        what = " + ".join("x".join(map(str, shape)) or "1" for shape in self.shapes)
        return f"{self.kind} of {what} {self.dtype}"


@dataclass(frozen=True, slots=True)
class Wait:
    """A place where a rank goes on only when an operation is complete."""

    step: int
    """The place of the operation in the program of the rank."""


Program = tuple[Operation | Wait, ...]
"""What a rank asks for and waits for, in order."""


@dataclass(frozen=True)
class Held:
    """What a rank holds."""

    trained: int
    """Elements of its parameters that train."""
    frozen: int
    padding: int
    """Elements of the buffers of gradients that belong to no parameter."""
    vision_padding: int
    """The same of a vision part that every rank holds."""
    buckets: frozenset[int]
    """Elements of each part of these buffers that is reduced at once."""
    norms: int
    """Elements that train whose gradients tensor-parallel ranks sum under sequence parallelism."""
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    """Moments, and the fp32 copies of bf16 weights."""


@dataclass(frozen=True)
class Rehearsed:
    """The report of one rank."""

    rank: int
    place: Place
    held: Held
    groups: dict[str, tuple[int, ...]]
    """The global ranks of each of its process groups."""
    program: Program
    start: int
    """Where the step begins in the program; what comes before belongs to the start of a run."""


@dataclass(frozen=True)
class Membership:
    """What one rank believes of itself."""

    rank: int
    place: Place
    groups: dict[str, tuple[int, ...]]
    """The global ranks of each of its groups, by name."""
