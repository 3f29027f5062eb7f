"""Who computes which rows of a global batch: equal numbers of rows, nearly equal work.

Rows differ in work: their lines are padded to one length, but the vision tower runs once per image, and the
output layer once per label. Dealt as they come, 16 rows a rank, the most loaded of 64 ranks has 8 % more than the
average, and all others wait for it. Here rows are dealt to ranks, and those of a rank to micro-batches, in the
same two moves each time:

    deal     from the most expensive to the cheapest, one for each bin in a round; in a round, the most expensive goes
             to the least loaded bin
    swap     fullest and emptiest bin, second fullest and second emptiest, ... trade the pair of members that
             leaves them most equal, until no trade helps

Each rank computes its most expensive micro-batch first, so that those of one number are alike everywhere. Each finds
the deal by itself, so work is counted in whole numbers, whose sums are exact on any processor. Which
rows are in the batch, and hence what is learned, does not depend on the deal.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
_MAX_ROUNDS = 32
"""Rounds of swaps; about 6 are needed for 16 rows a rank at any number of ranks."""
_TOLERANCE = 2048
"""Bins that differ by less than this part of their work are equal enough."""


def row_costs(lengths: npt.NDArray[np.integer], images: npt.NDArray[np.integer], *, image_cost: float) -> IntArray:
    """Work by which rows differ, in labels: one for each token, and what an image adds to the labels in its place."""
    return lengths.astype(np.int64) + np.rint(image_cost * images).astype(np.int64)


def deal(costs: IntArray, *, num_ranks: int) -> IntArray:
    """int64[ranks, rows]: positions in the batch that each data-parallel rank computes, most expensive first.

    ``len(costs)`` must be a multiple of the ranks. Deterministic.
    """
    return _deal_evenly(costs, num_ranks)


def split(costs: IntArray, positions: IntArray, *, num_micro_batches: int) -> IntArray:
    """int64[micro-batches, rows]: the positions of one rank as micro-batches, most expensive first; deterministic."""
    parts = positions[_deal_evenly(costs[positions], num_micro_batches)]
    return np.sort(parts[np.argsort(-costs[parts].sum(axis=1), kind="stable")], axis=1)


def _deal_evenly(costs: IntArray, num_bins: int) -> IntArray:
    """int64[bins, size]: members of bins of equal size and nearly equal cost, the most expensive first in each bin."""
    assert len(costs) and len(costs) % num_bins == 0, f"{len(costs)} rows cannot be dealt evenly to {num_bins}"
    turns = np.argsort(-costs, kind="stable").reshape(-1, num_bins)
    members = np.empty((num_bins, len(turns)), dtype=np.int64)
    loads = np.zeros(num_bins, dtype=np.int64)
    for number, turn in enumerate(turns):
        bins = np.argsort(loads, kind="stable")
        members[bins, number] = turn
        loads[bins] += costs[turn]
    for _ in range(_MAX_ROUNDS):
        if not _swap(costs, members):
            break
    return np.take_along_axis(members, np.argsort(-costs[members], axis=1, kind="stable"), axis=1)


def _swap(costs: IntArray, members: IntArray) -> bool:
    """Let each pair of a full and an empty bin trade one member for one; returns whether any did."""
    num_bins, size = members.shape
    values = costs[members]
    loads = values.sum(axis=1)
    order = np.argsort(loads, kind="stable")
    empty, full = order[: num_bins // 2], order[::-1][: num_bins // 2]
    uneven = loads[full] - loads[empty] > loads[full] // _TOLERANCE
    empty, full = empty[uneven], full[uneven]
    before = loads[full] - loads[empty]
    moved = values[full][:, :, None] - values[empty][:, None, :]
    after = np.abs(before[:, None, None] - 2 * moved).reshape(len(full), size * size)
    best = after.argmin(axis=1)
    helps = after[np.arange(len(full)), best] < before
    give, take = np.divmod(best[helps], size)
    full, empty = full[helps], empty[helps]
    members[full, give], members[empty, take] = members[empty, take], members[full, give]
    return bool(helps.any())
