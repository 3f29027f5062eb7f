"""The rows that a step trains on: a pure function of (seed, index).

So a run that resumes needs only the number of rows it has consumed.

Index i counts the rows of the run, over all steps and ranks. Prefixes without weights form one pool: an epoch is a
shuffle of all their rows. Prefixes with weights are separate pools. The turns of each pool are spread evenly over the
run, and its n-th turn takes the n-th row of its own epochs. So after e epochs of a pool, each of its rows was taken
floor(e) or ceil(e) times, at every step.

The pool of an index, and the number of earlier turns of this pool, are computed by descending a binary tree over the
pools. Of the first i turns of a node, the left half has i times its share, rounded to the nearest integer; the right
half has the rest. This is exact integer arithmetic for any i, and needs no memory that grows with the run.

A shuffle is a keyed permutation of [0, n) whose value at any position is computed directly. It is a Feistel network
over the next power of four, iterated until the result is in range. So row number 10^9 costs as much as the first,
nothing is stored, and every data-parallel rank gets the same answer at any number of ranks and after any number of
restarts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from megatron_vl.config.data_files import parse_data_path

IntArray = npt.NDArray[np.int64]
_Share = Callable[[IntArray], IntArray]
_ROUNDS = 6
_PARTS = 1 << 30
"""Weights become shares of this many parts, at least one each. Products of two such numbers fit in 64 bits."""


def permute(positions: IntArray, size: int, key: IntArray | int) -> IntArray:
    """Map ``positions`` in [0, size), int64[n], through the permutation that ``key`` selects; return int64[n].

    ``key`` is one number, or int64[n] with one for each position.
    """
    assert size > 0
    half = np.uint64(max((size - 1).bit_length() + 1, 2) // 2)
    mask = np.uint64((1 << int(half)) - 1)
    keys = np.broadcast_to(np.asarray(key).astype(np.uint64), positions.shape)
    values = positions.astype(np.uint64)
    outside = np.ones(len(values), dtype=np.bool_)
    while outside.any():
        values[outside] = _feistel(values[outside], keys[outside], half, mask)
        outside = values >= size
    return values.astype(np.int64)


def _feistel(
    values: npt.NDArray[np.uint64], keys: npt.NDArray[np.uint64], half: np.uint64, mask: np.uint64
) -> npt.NDArray[np.uint64]:
    left, right = values >> half, values & mask
    for number in range(_ROUNDS):
        left, right = right, left ^ (_mix(right + _mix(keys + np.uint64(number + 1))) & mask)
    return (left << half) | right


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Hash uint64[n] to uint64[n] (the finalizer of splitmix64); arithmetic wraps."""
    values = (values + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def derive_key(*parts: IntArray | int) -> IntArray:
    """Derive one 63-bit key from several numbers (seed, purpose, epoch) or int64 arrays of one shape."""
    key = np.zeros(1, dtype=np.uint64)
    for part in parts:
        key = _mix(key ^ _mix(np.atleast_1d(np.asarray(part)).astype(np.uint64)))
    return (key >> np.uint64(1)).astype(np.int64)


@dataclass(frozen=True)
class Blend:
    """The order of rows over several data sets. Rows are numbered consecutively across them: row r of data set d is
    offset[d] + r."""

    sizes: tuple[int, ...]
    """Rows of each data set."""
    weights: tuple[float, ...] | None
    """Relative weights. None: all rows form one pool, each taken once per epoch."""
    seed: int

    ORDER: ClassVar[str] = "turns"
    """Name of the order of weighted data sets. A run that counted rows in another order cannot resume in this one."""

    @classmethod
    def of(cls, data_path: Sequence[str], sizes: Sequence[int], *, seed: int) -> Blend:
        """Return the blend of data sets of ``sizes`` for ``data_path`` (prefixes, or weight and prefix in turn)."""
        pairs = parse_data_path(data_path)
        weighted = len(pairs) < len(data_path)
        return cls(tuple(sizes), tuple(weight for weight, _ in pairs) if weighted else None, seed)

    @property
    def num_rows(self) -> int:
        """Rows of all data sets."""
        return sum(self.sizes)

    def rows(self, indices: IntArray) -> IntArray:
        """Return the global row of each index of the run; int64[n] to int64[n]."""
        if self.weights is None:
            return self._draw(indices, self.num_rows, pool=0)
        pools, draws = self._turns(indices)
        offsets = np.cumsum((0, *self.sizes))
        rows = np.empty(len(indices), dtype=np.int64)
        for pool in np.unique(pools).tolist():
            mine = pools == pool
            rows[mine] = offsets[pool] + self._draw(draws[mine], self.sizes[pool], pool=pool)
        return rows

    def step_rows(self, first: int, count: int) -> IntArray:
        """Return the global rows of a step that begins after ``first`` consumed rows, as int64[count]."""
        return self.rows(np.arange(first, first + count))

    def passes(self, num_rows: int) -> tuple[float, ...]:
        """Return for each data set how often the first ``num_rows`` rows of the run take each of its rows."""
        if self.weights is None:
            return (num_rows / self.num_rows,) * len(self.sizes)
        draws = self._draws_within(num_rows)
        return tuple((draws / np.array(self.sizes)).tolist())

    def locate(self, rows: IntArray) -> tuple[IntArray, IntArray]:
        """Return the data set of each global row, and the row within it; int64[n] to two int64[n]."""
        offsets = np.cumsum((0, *self.sizes))
        data_sets = np.searchsorted(offsets, rows, side="right") - 1
        return data_sets, rows - offsets[data_sets]

    def _draw(self, draws: IntArray, size: int, *, pool: int) -> IntArray:
        """Return the row within a pool for each of its draws, int64[n]. Each epoch has an order of its own."""
        epochs, positions = np.divmod(draws, size)
        return permute(positions, size, derive_key(self.seed, 2, pool, epochs))

    def _turns(self, indices: IntArray) -> tuple[IntArray, IntArray]:
        """Return the pool of each index, and the number of earlier turns of this pool; int64[n] each."""
        return self._descend(indices, lambda turns, middle, share: share(turns + 1) > share(turns))

    def _draws_within(self, num_rows: int) -> IntArray:
        """Return the number of rows from each pool among the first ``num_rows`` rows of the run, as int64[pools]."""
        pools = np.arange(len(self.sizes))
        return self._descend(np.full_like(pools, num_rows), lambda turns, middle, share: pools < middle)[1]

    def _descend(
        self, turns: IntArray, goes_left: Callable[[IntArray, IntArray, _Share], npt.NDArray[np.bool_]]
    ) -> tuple[IntArray, IntArray]:
        """Descend the tree; return for each element its leaf (a pool) and the leaf's turns, int64[n] each.

        ``turns`` is int64[n], the first turns of the root that are counted. ``goes_left`` decides at a node. It gets
        the turns at the node, the first pool of the right half, and a function for the number of turns that belong to
        the left half. It returns bool[n].
        """
        assert self.weights is not None
        parts = np.rint(np.array(self.weights) / sum(self.weights) * _PARTS).astype(np.int64)
        borders = np.concatenate(([0], np.cumsum(np.maximum(parts, 1))))
        low, high = np.zeros_like(turns), np.full_like(turns, len(self.sizes))
        while (high - low > 1).any():
            middle = (low + high) // 2  # at a leaf this is ``low``: the empty left half is never taken
            share = partial(_nearest, part=borders[middle] - borders[low], whole=borders[high] - borders[low])
            left = goes_left(turns, middle, share)
            turns = np.where(left, share(turns), turns - share(turns))
            low, high = np.where(left, low, middle), np.where(left, middle, high)
        return low, turns


def _nearest(turns: IntArray, part: IntArray, whole: IntArray) -> IntArray:
    """Return ``turns * part / whole``, int64[n], rounded to the nearest integer; halves are rounded up."""
    rounds, rest = np.divmod(turns, whole)
    return rounds * part + (rest * part + whole // 2) // whole


def mean_over(values: Sequence[float], blend: Blend) -> float:
    """Return the mean of a figure over the rows of a blend, given its mean over the rows of each data set."""
    weights = blend.sizes if blend.weights is None else blend.weights
    return sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)
