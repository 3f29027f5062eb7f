"""Distribution of the rows of a global batch over ranks: equal numbers of rows, nearly equal work.

Rows differ in work. All are padded to one length, but the vision tower runs once per image, and rows hold more or fewer
tokens. If rows are dealt in their order, 16 per rank, the most loaded of 64 ranks has 8 % more work than the
average, and all other ranks wait for it. So rows are dealt to ranks, and the rows of a rank to micro-batches, in two
phases:

    deal     Take the rows from the most to the least expensive, one for each bin in a round. In each round, the most
             expensive row goes to the least loaded bin.
    swap     Pair the fullest bin with the emptiest, the second fullest with the second emptiest, and so on. Each pair
             trades the two members that make it most equal. Repeat until no trade helps.

Each rank computes its most expensive micro-batch first, so that micro-batches of equal index have similar work on all
ranks. Each rank computes the distribution by itself. So work is counted in integers, whose sums are exact on every
processor. The distribution does not change which rows are in the batch, and hence does not change what is learned.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
_MAX_ROUNDS = 32
"""Maximum rounds of swaps. About 6 are needed for 16 rows per rank at any number of ranks."""
_TOLERANCE = 2048
"""Two bins are equal enough if their difference is less than the load of the fuller one divided by this."""


def row_costs(lengths: npt.NDArray[np.integer], images: npt.NDArray[np.integer], *, image_cost: float) -> IntArray:
    """Return the work of each row in tokens, int64[rows]; ``lengths`` and ``images`` are integers[rows].

    A row costs its length, and ``image_cost`` tokens per image, rounded.
    """
    return lengths.astype(np.int64) + np.rint(image_cost * images).astype(np.int64)


def deal(costs: IntArray, *, num_ranks: int) -> IntArray:
    """Return the positions in the batch of each data-parallel rank, most expensive first, as int64[ranks, rows].

    ``costs`` is int64[batch]; its length must be a multiple of ``num_ranks``. The result is deterministic.
    """
    return _deal_evenly(costs, num_ranks)


def split(costs: IntArray, positions: IntArray, *, num_micro_batches: int) -> IntArray:
    """Split the positions of one rank into micro-batches, most expensive first.

    ``costs`` is int64[batch], ``positions`` int64[rows of the rank], the result int64[micro-batches, rows]. The result
    is deterministic.
    """
    parts = positions[_deal_evenly(costs[positions], num_micro_batches)]
    return np.sort(parts[np.argsort(-costs[parts].sum(axis=1), kind="stable")], axis=1)


def image_shares(counts: Sequence[int], *, rank: int, size: int) -> list[range]:
    """Return which images of each micro-batch a rank encodes, where ``size`` ranks share those of a step.

    All images take the same work. So the images of the step, in order, are cut into runs of equal length.

    Args:
        counts: the number of images of each micro-batch.
    """
    total = sum(counts)
    first, stop = rank * total // size, (rank + 1) * total // size
    shares, begin = [], 0
    for count in counts:
        own = range(max(first, begin), max(first, begin, min(stop, begin + count)))
        shares.append(range(own.start - begin, own.stop - begin))
        begin += count
    return shares


def _deal_evenly(costs: IntArray, num_bins: int) -> IntArray:
    """Return bins of equal size and nearly equal cost as int64[bins, size], most expensive members first."""
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
    """Trade one member for another in each pair of a full and an empty bin, in place; return whether any pair did.

    ``costs`` is int64[n], ``members`` int64[bins, size].
    """
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
