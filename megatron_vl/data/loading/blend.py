"""Which rows a step trains on: a pure function of (seed, index), with nothing to save but how many rows were
consumed.

Index i counts the rows of the run, over all steps and ranks. Prefixes given alone form one pool: an epoch is
a shuffle of all their rows. Prefixes given with weights are pools of their own: each takes its turns evenly
spread over the run, and its n-th turn takes the n-th row of its own epochs. So after e epochs of a pool, each
of its rows was taken floor(e) or ceil(e) times, at every step.

Whose turn an index is, and the how many-eth, is computed by descending a binary tree over the pools. Of the first
i turns of a node, its left half has the nearest whole number to i times its share; the rest is the right half's.
That is exact integer arithmetic for any i, without anything that grows with the run.

A shuffle is a keyed permutation of [0, n), computed for any position by itself (a Feistel network over the
next power of four, walked until it falls into range), so that row number 10^9 costs as much as the first,
nothing is stored, and every data-parallel rank gets the same answer at any size and any number of restarts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from megatron_vl.config.validate import parse_data_path

IntArray = npt.NDArray[np.int64]
_Share = Callable[[IntArray], IntArray]
_ROUNDS = 6
_PARTS = 1 << 30
"""Weights are shares of so many parts, at least one each: two numbers of parts multiply within 64 bits."""


def permute(positions: IntArray, size: int, key: IntArray | int) -> IntArray:
    """Images of ``positions`` in [0, size) under the permutation that ``key`` (one, or one per position)
    selects."""
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
    """A 64-bit hash (the finaliser of splitmix64); arithmetic wraps."""
    values = (values + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def derive_key(*parts: IntArray | int) -> IntArray:
    """One 63-bit key from several numbers or arrays of numbers: seed, purpose, epoch."""
    key = np.zeros(1, dtype=np.uint64)
    for part in parts:
        key = _mix(key ^ _mix(np.atleast_1d(np.asarray(part)).astype(np.uint64)))
    return (key >> np.uint64(1)).astype(np.int64)


@dataclass(frozen=True)
class Blend:
    """The order of rows over several data sets, which are numbered through: row r of data set d is offset[d]
    + r."""

    sizes: tuple[int, ...]
    """Rows of each data set."""
    weights: tuple[float, ...] | None
    """Relative weights, or None: all rows once per epoch."""
    seed: int

    ORDER: ClassVar[str] = "turns"
    """Names the order of weighted data sets: a position that was counted in another one does not go on in this."""

    @classmethod
    def of(cls, data_path: Sequence[str], sizes: Sequence[int], *, seed: int) -> Blend:
        """The blend that ``data_path`` (prefixes, or weight and prefix in turn) asks of data sets of these sizes."""
        pairs = parse_data_path(data_path)
        weighted = len(pairs) < len(data_path)
        return cls(tuple(sizes), tuple(weight for weight, _ in pairs) if weighted else None, seed)

    @property
    def num_rows(self) -> int:
        """Rows of all data sets."""
        return sum(self.sizes)

    def rows(self, indices: IntArray) -> IntArray:
        """Global row of each index of the run."""
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
        """Global rows of a step that begins after ``first`` consumed rows and takes ``count``."""
        return self.rows(np.arange(first, first + count))

    def passes(self, num_rows: int) -> tuple[float, ...]:
        """How often the first ``num_rows`` rows of the run take each row, by data set."""
        if self.weights is None:
            return (num_rows / self.num_rows,) * len(self.sizes)
        draws = self._draws_within(num_rows)
        return tuple((draws / np.array(self.sizes)).tolist())

    def locate(self, rows: IntArray) -> tuple[IntArray, IntArray]:
        """Data set and row within it of global rows."""
        offsets = np.cumsum((0, *self.sizes))
        data_sets = np.searchsorted(offsets, rows, side="right") - 1
        return data_sets, rows - offsets[data_sets]

    def _draw(self, draws: IntArray, size: int, *, pool: int) -> IntArray:
        """Row within a pool of its n-th draw: epoch after epoch, each in an order of its own."""
        epochs, positions = np.divmod(draws, size)
        return permute(positions, size, derive_key(self.seed, 2, pool, epochs))

    def _turns(self, indices: IntArray) -> tuple[IntArray, IntArray]:
        """Which pool has its turn at each index, and how many turns it had before."""
        return self._descend(indices, lambda turns, middle, share: share(turns + 1) > share(turns))

    def _draws_within(self, num_rows: int) -> IntArray:
        """How many of the first rows of the run come from each pool."""
        pools = np.arange(len(self.sizes))
        return self._descend(np.full_like(pools, num_rows), lambda turns, middle, share: pools < middle)[1]

    def _descend(
        self, turns: IntArray, goes_left: Callable[[IntArray, IntArray, _Share], npt.NDArray[np.bool_]]
    ) -> tuple[IntArray, IntArray]:
        """Go down the tree; per element the leaf (a pool) that is reached, and its turns within the first ``turns``.

        ``goes_left`` decides at a node, from the node's turns, the first pool of its right half, and how many of some
        first turns are the left half's.
        """
        assert self.weights is not None
        parts = np.rint(np.array(self.weights) / sum(self.weights) * _PARTS).astype(np.int64)
        borders = np.concatenate(([0], np.cumsum(np.maximum(parts, 1))))
        low, high = np.zeros_like(turns), np.full_like(turns, len(self.sizes))
        while (high - low > 1).any():
            middle = (low + high) // 2  # at a leaf ``low``, so that the empty left half is never taken
            share = partial(_nearest, part=borders[middle] - borders[low], whole=borders[high] - borders[low])
            left = goes_left(turns, middle, share)
            turns = np.where(left, share(turns), turns - share(turns))
            low, high = np.where(left, low, middle), np.where(left, middle, high)
        return low, turns


def _nearest(turns: IntArray, part: IntArray, whole: IntArray) -> IntArray:
    """The nearest whole number to ``turns * part / whole``; a half is rounded up."""
    rounds, rest = np.divmod(turns, whole)
    return rounds * part + (rest * part + whole // 2) // whole


def mean_over(values: Sequence[float], blend: Blend) -> float:
    """Mean of a figure per row over the rows of a blend, from its mean in each data set."""
    weights = blend.sizes if blend.weights is None else blend.weights
    return sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)
