"""How often the samples of each source are used.

By ``weight`` alone: 2 takes every sample twice, 0.5 every other one.

By amounts, as papers' tables give them: a source has ``samples: 280M``, or is in a ``group`` whose amount stands in
``mixture.groups``. The proportions of the amounts then hold exactly, and the total is as large as the data permit:
all amounts are scaled by one factor, at most 1, so that no group gives more than ``max_repeats`` times what it has.
Whoever has all the data of a table gets its numbers; whoever has a part gets its proportions. Within a group sources
share by the number of their samples times their ``weight``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Supply:
    """What one source has, and what is asked of it."""

    available: int
    """Samples that are fit for use."""
    weight: float = 1.0
    group: str | None = None
    """Name of the group whose amount it serves; None where weights alone decide."""


@dataclass(frozen=True)
class Draw:
    """How much is used."""

    counts: tuple[int, ...]
    """How many samples each source gives, repetitions counted."""
    factor: Fraction
    """What all amounts were multiplied by, at most 1."""
    scarcest: str
    """The group that has too few samples for its amount; empty if none has."""


def draw_samples(supplies: Sequence[Supply], amounts: dict[str, int], max_repeats: float = 1.0) -> Draw:
    """How much each source gives.

    ``amounts``: of each group, in samples. Groups without any sample give none and do not hold the others back.
    """
    have = {group: sum(supply.available for supply in supplies if supply.group == group) for group in amounts}
    repeats = Fraction(str(max_repeats))
    factors = {group: repeats * have[group] / amount for group, amount in amounts.items() if have[group]}
    factor, scarcest = min([(Fraction(1), ""), *((value, group) for group, value in factors.items())])
    drawn = [0] * len(supplies)
    for index, supply in enumerate(supplies):
        if supply.group is None:
            drawn[index] = math.floor(supply.available * Fraction(str(supply.weight)))
    for group, amount in amounts.items():
        members = [index for index, supply in enumerate(supplies) if supply.group == group and supply.available]
        shares = [supplies[index].available * Fraction(str(supplies[index].weight)) for index in members]
        for index, count in zip(members, _apportion(math.floor(amount * factor), shares), strict=True):
            drawn[index] = count
    return Draw(tuple(drawn), factor, scarcest)


def copies_of(available: int, drawn: int) -> IntArray:
    """int64[available]: how often each of a source's samples is used, spread evenly over them."""
    often, rest = divmod(drawn, max(available, 1))
    return often + np.diff(np.arange(available + 1) * rest // max(available, 1))  # not * drawn: beyond 64 bits


def _apportion(total: int, shares: Sequence[Fraction]) -> list[int]:
    """Whole numbers in proportion to ``shares`` that add up to ``total``: the largest remainders round up."""
    if not shares:
        return []
    exact = [total * share / sum(shares) for share in shares]
    counts = [math.floor(value) for value in exact]
    order = sorted(range(len(exact)), key=lambda index: (counts[index] - exact[index], index))
    for index in order[: total - sum(counts)]:
        counts[index] += 1
    return counts
