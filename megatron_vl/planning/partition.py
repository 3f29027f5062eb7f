"""Split a sequence of costs into consecutive groups so that the most expensive group is as cheap as possible.

Two exact dynamic programs do it. The first finds the smallest possible maximum. The second finds, among all splits that
reach it, the one with the smallest sum of squares. The maximum alone would leave the other groups arbitrarily uneven.
Ties go to the earliest split, so the result is a pure function of the costs. With n costs and k groups both take O(k
n^2), vectorized over the last axis.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def balanced_partition(costs: Sequence[float], num_groups: int) -> list[int]:
    """Return sizes of ``num_groups`` non-empty consecutive groups of ``costs`` (>= 0) with the smallest maximum."""
    assert 1 <= num_groups <= len(costs)
    ends = np.concatenate([[0.0], np.cumsum(np.asarray(costs, dtype=np.float64))])
    group = ends[None, :] - ends[:, None]  # group[i, j] = cost of the group that holds units i..j-1
    group[np.tri(len(ends), dtype=bool)] = np.inf
    bottleneck = _smallest_maximum(group, num_groups)
    squares = np.where(group <= bottleneck * (1 + 1e-12), group / max(bottleneck, 1e-300), np.inf) ** 2
    best, cuts = squares[0], []
    for _ in range(num_groups - 1):
        totals = best[:, None] + squares
        cuts.append(totals.argmin(axis=0))
        best = totals.min(axis=0)
    sizes, stop = [], len(costs)
    for cut in reversed(cuts):
        sizes.append(stop - int(cut[stop]))
        stop = int(cut[stop])
    return [stop, *reversed(sizes)]


def _smallest_maximum(group: NDArray[np.float64], num_groups: int) -> float:
    best = group[0]
    for _ in range(num_groups - 1):
        best = np.maximum(best[:, None], group).min(axis=0)
    return float(best[-1])
