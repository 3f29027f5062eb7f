"""Order of rows: each once an epoch, in the ratio asked for, a pure function; and an even deal."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vl.data.balance import deal, row_costs
from megatron_vl.data.blend import Blend, mean_over, permute


@settings(derandomize=True, max_examples=100, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**40))
def test_permutation_is_one(size: int, key: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(size), size, key)), np.arange(size))


def test_permutation_mixes() -> None:
    size = 50_000
    order = permute(np.arange(size), size, 1)
    for other in (np.arange(size), permute(np.arange(size), size, 2), np.roll(order, 1)):
        assert abs(np.corrcoef(order, other)[0, 1]) < 0.02


def test_an_epoch_holds_every_row_once_in_an_order_of_its_own() -> None:
    blend = Blend(sizes=(30, 7), weights=None, seed=5)
    epochs = blend.rows(np.arange(3 * 37)).reshape(3, 37)
    for epoch in epochs:
        assert sorted(epoch) == list(range(37))
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert not np.array_equal(epochs[0], Blend((30, 7), None, 6).rows(np.arange(37)))


@settings(derandomize=True, max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 50), st.floats(0.01, 1)), min_size=1, max_size=4))
def test_weights_are_kept_and_epochs_within_a_data_set_are_whole(sets: list[tuple[int, float]]) -> None:
    sizes, weights = tuple(size for size, _ in sets), tuple(weight for _, weight in sets)
    blend = Blend(sizes, weights, seed=1)
    whole_blocks = 3 * int(blend._block_counts.sum())
    data_sets, rows = blend.locate(blend.rows(np.arange(whole_blocks)))
    shares = np.bincount(data_sets, minlength=len(sizes)) / len(rows)
    assert np.allclose(shares, np.array(weights) / sum(weights), rtol=0.01)
    for data_set, size in enumerate(sizes):
        drawn = np.bincount(rows[data_sets == data_set], minlength=size)
        assert drawn.max() - drawn.min() <= 1


def test_any_index_by_itself() -> None:
    blend = Blend((1000, 10), (0.9, 0.1), seed=3)
    indices = np.arange(5000)
    everything = blend.rows(indices)
    assert np.array_equal(
        np.concatenate([blend.rows(indices[i : i + 1]) for i in range(0, 5000, 97)]), everything[::97]
    )
    assert np.array_equal(blend.step_rows(700, 32), everything[700:732])


def test_locate_undoes_the_numbering() -> None:
    blend = Blend((3, 5, 2), None, seed=0)
    data_sets, rows = blend.locate(np.arange(10))
    assert data_sets.tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 2, 2]
    assert rows.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 0, 1]
    assert mean_over([1.0, 2.0, 3.0], blend) == pytest.approx((3 + 10 + 6) / 10)
    assert mean_over([1.0, 2.0], Blend((3, 5), (3.0, 1.0), 0)) == pytest.approx(1.25)


SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))


@settings(derandomize=True, max_examples=100, deadline=None)
@given(SHAPES, st.integers(0, 1000))
def test_every_row_is_dealt_once(shape: tuple[int, int, int], seed: int) -> None:
    ranks, micro, rows = shape
    costs = np.random.default_rng(seed).integers(1, 9, ranks * micro * rows).astype(np.float64)
    dealt = deal(costs, num_ranks=ranks, num_micro_batches=micro)
    assert dealt.shape == shape
    assert sorted(dealt.ravel()) == list(range(len(costs)))


def test_the_deal_is_even() -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 8, 512)
    costs = row_costs(np.full(512, 2048), images, image_cost=300.0)
    assert costs[0] == 2048 + 300 * images[0]
    loads = costs[deal(costs, num_ranks=8, num_micro_batches=16)].sum(axis=(1, 2))
    plain = costs.reshape(8, 64).sum(axis=1)
    assert loads.mean() / loads.max() > 0.995
    assert plain.mean() / plain.max() < loads.mean() / loads.max()
