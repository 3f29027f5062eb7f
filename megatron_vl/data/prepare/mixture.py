"""Number of uses of the samples of each source.

With ``weight`` alone, 2 takes every sample twice, and 0.5 takes every other sample.

With amounts, as in the tables of papers, a source has ``samples: 280M``, or is in a ``group`` whose amount is in
``mixture.groups``. The proportions of the amounts then hold exactly, and the total is as large as the data permit. All
amounts are scaled by one factor, at most 1, so that no group gives more than ``max_repeats`` times its samples. With
all the data you get the paper's counts. With part of the data you get the same proportions. Within a group, the share
of a source is the number of its samples times its ``weight``.
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
    """The samples that one source has, and the amount it serves."""

    available: int
    """Samples that passed all filters."""
    weight: float = 1.0
    group: str | None = None
    """Name of the group whose amount the source serves. None: only weights count."""


@dataclass(frozen=True)
class Draw:
    """Amounts that are used."""

    counts: tuple[int, ...]
    """Samples from each source, including repetitions."""
    factor: Fraction
    """Factor that scaled all amounts, at most 1."""
    scarcest: str
    """The group that has too few samples for its amount; empty if none has."""


def draw_samples(supplies: Sequence[Supply], amounts: dict[str, int], max_repeats: float = 1.0) -> Draw:
    """Compute the number of samples from each source.

    ``amounts``: samples of each group. A group without any sample gives none and does not reduce the others.
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


def uses_before(samples: IntArray, available: int, drawn: int) -> IntArray:
    """Return the uses of all samples of a source that come before some, int64[n] each.

    The ``drawn`` uses are spread evenly over the ``available`` samples. So the uses of any samples follow from their
    positions alone.
    """
    often, rest = divmod(drawn, max(available, 1))
    return often * samples + samples * rest // max(available, 1)  # samples * drawn would exceed 64 bits


def _apportion(total: int, shares: Sequence[Fraction]) -> list[int]:
    """Return integers in proportion to ``shares`` with the sum ``total``; the largest remainders are rounded up."""
    if not shares:
        return []
    exact = [total * share / sum(shares) for share in shares]
    counts = [math.floor(value) for value in exact]
    order = sorted(range(len(exact)), key=lambda index: (counts[index] - exact[index], index))
    for index in order[: total - sum(counts)]:
        counts[index] += 1
    return counts
