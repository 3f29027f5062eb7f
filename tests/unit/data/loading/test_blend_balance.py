"""Order of rows: each once an epoch, in the ratio asked for, a pure function; and an even deal."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vl.config.presets import PRESETS
from megatron_vl.config.schema import RunConfig, TrainingConfig
from megatron_vl.data.loading.balance import deal, row_costs, split
from megatron_vl.data.loading.blend import Blend, mean_over, permute
from megatron_vl.planning.flops import FrozenParts, Work, image_cost, step_flops


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


SETS = st.lists(st.tuples(st.integers(1, 60), st.floats(0.01, 1)), min_size=1, max_size=6)


def counts_by_row(blend: Blend, first: int) -> list[np.ndarray]:
    """How often each row of each set is among the first rows of the run."""
    counts = np.bincount(blend.rows(np.arange(first)), minlength=blend.num_rows)
    return np.split(counts, np.cumsum(blend.sizes)[:-1])


@settings(derandomize=True, max_examples=40, deadline=None)
@given(SETS, st.integers(0, 99), st.lists(st.integers(0, 2000), min_size=1, max_size=4))
def test_at_any_step_every_row_was_taken_as_often_as_its_epochs_say(
    sets: list[tuple[int, float]], seed: int, stops: list[int]
) -> None:
    sizes, weights = tuple(size for size, _ in sets), tuple(weight for _, weight in sets)
    blend = Blend(sizes, weights, seed)
    for stop in stops:
        for counts, epochs in zip(counts_by_row(blend, stop), blend.passes(stop), strict=True):
            assert counts.sum() / len(counts) == pytest.approx(epochs)
            assert set(counts.tolist()) <= {math.floor(epochs), math.ceil(epochs)}
        drawn = np.array(sizes) * blend.passes(stop)
        assert np.abs(drawn - stop * np.array(weights) / sum(weights)).max() < 2, "at any step in the ratio"


def test_a_small_set_goes_through_whole_epochs() -> None:
    few, many = (26, 500)
    blend = Blend((few, many), (0.01, 0.99), seed=0)  # once: a row taken once, another 13 times
    counts = counts_by_row(blend, round(5.7 * few / 0.01))[0]
    assert counts.sum() == 148 and set(counts.tolist()) == {5, 6}
    blend = Blend((many, few), (0.8, 0.2), seed=0)  # once: 10 rows never seen
    counts = counts_by_row(blend, 626)[0]
    assert counts.sum() == 501 and sorted(counts.tolist()) == [1] * 499 + [2]


def test_a_set_of_the_smallest_weight_has_its_turns() -> None:
    blend = Blend((5, 7, 3), (1e-7, 1.0, 1.0), seed=0)
    assert np.array(blend.sizes) * blend.passes(2 * 10**9) == pytest.approx([100, 10**9, 10**9], rel=0.02)
    assert Blend((5, 7), (1e-300, 1.0), seed=0).passes(1 << 33)[0] == 8 / 5, "no set is left out"


def test_late_rows_of_a_long_run_are_those_of_the_same_schedule() -> None:
    sizes, weights, late = (10**9, 4 * 10**8, 31), (0.7, 0.299, 0.001), 1_400_000_000
    blend = Blend(sizes, weights, seed=4)
    for index in range(late, late + 300):
        before, after = np.array(sizes) * blend.passes(index), np.array(sizes) * blend.passes(index + 1)
        data_sets, _ = blend.locate(blend.rows(np.array([index])))
        assert np.rint(after - before).tolist() == [float(number == data_sets[0]) for number in range(3)]


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


@settings(derandomize=True, max_examples=100, deadline=None)
@given(st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4)), st.integers(0, 1000))
def test_every_row_is_dealt_once(shape: tuple[int, int, int], seed: int) -> None:
    ranks, micro, rows = shape
    costs = np.random.default_rng(seed).integers(1, 9, ranks * micro * rows)
    dealt = deal(costs, num_ranks=ranks)
    assert dealt.shape == (ranks, micro * rows)
    assert sorted(dealt.ravel()) == list(range(len(costs)))
    assert np.array_equal(dealt, deal(costs.copy(), num_ranks=ranks))
    for mine in dealt:
        parts = split(costs, mine, num_micro_batches=micro)
        assert parts.shape == (micro, rows)
        assert sorted(parts.ravel()) == sorted(mine)
        assert (np.diff(costs[parts].sum(axis=1)) <= 0).all(), "the most expensive micro-batch comes first"
        assert (np.diff(parts, axis=1) > 0).all(), "rows of a micro-batch keep the order of the batch"


@settings(derandomize=True, max_examples=100, deadline=None)
@given(st.integers(2, 9), st.integers(1, 9), st.integers(0, 1000))
def test_no_trade_of_the_fullest_and_the_emptiest_rank_helps(ranks: int, rows: int, seed: int) -> None:
    costs = np.random.default_rng(seed).integers(1, 100, ranks * rows)
    of_rank = costs[deal(costs, num_ranks=ranks)]
    loads = of_rank.sum(axis=1)
    order = np.argsort(loads, kind="stable")
    full, empty = of_rank[order[-1]], of_rank[order[0]]
    apart = full.sum() - empty.sum()
    after = np.abs(apart - 2 * (full[:, None] - empty[None, :]))
    assert (after >= apart).all() or apart <= loads.max() / 2000


def packed_rows(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Lengths and images of rows as packing makes them: full, most with as many images as fit, some of text alone."""
    rng = np.random.default_rng(seed)
    return np.full(count, 2048), rng.choice([0, 3, 4, 5, 6, 7], count, p=[0.12, 0.01, 0.01, 0.05, 0.26, 0.55])


@pytest.mark.parametrize("freeze_vision", [False, True])
@pytest.mark.parametrize("ranks", [8, 64, 256])
def test_the_deal_is_even(ranks: int, freeze_vision: bool) -> None:
    config = RunConfig(training=TrainingConfig(freeze_vision=freeze_vision))
    even, as_they_come = [], []
    for seed in range(10):
        lengths, images = packed_rows(ranks * 16, seed)
        work = flops_of_rows(config, lengths, images)
        costs = row_costs(lengths, images, image_cost=image_cost(config.model, FrozenParts.of(config.training)))
        dealt = deal(costs, num_ranks=ranks)
        loads, images_of_rank = work[dealt].sum(axis=1), images[dealt].sum(axis=1)
        assert images_of_rank.max() < images_of_rank.mean() + 1, "no deal of whole images could be better"
        plain = work.reshape(ranks, 16).sum(axis=1)
        even.append(loads.mean() / loads.max())
        as_they_come.append(plain.mean() / plain.max())
    assert np.mean(even) > 0.995
    assert np.mean(as_they_come) < 0.985


def test_micro_batches_of_several_rows_are_even() -> None:
    lengths, images = packed_rows(16, seed=0)
    costs = row_costs(lengths, images, image_cost=5000.0)
    loads = costs[split(costs, np.arange(16), num_micro_batches=4)].sum(axis=1)
    plain = costs.reshape(4, 4).sum(axis=1)
    assert loads.mean() / loads.max() > 0.95
    assert plain.mean() / plain.max() < 0.85


def flops_of_rows(config: RunConfig, lengths: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Work of padded rows by the counter, where every token outside images has a label."""
    labels = lengths - images * (config.model.resampler.num_queries + 2)
    frozen, seq_length = FrozenParts.of(config.training), config.data.seq_length
    works = [Work(k, seq_length, seq_length**2, m) for k, m in zip(images.tolist(), labels.tolist(), strict=True)]
    return np.array([step_flops(config.model, frozen, work) for work in works])


@pytest.mark.parametrize(
    ("frozen", "labels"), [({}, 3130.8), ({"freeze_vision": True}, 928.4), ({"freeze_language_model": True}, 4825.2)]
)
def test_an_image_costs_the_labels_that_are_computed_by_hand(frozen: dict[str, bool], labels: float) -> None:
    """In TFLOP, an image of 448 x 448 costs 4.106 + 0.1127 forward, of which 0.0020 is the patch embedding.

    Trained, that is 3 x 4.2187 - 0.0020 = 12.6541. With the tower frozen it is 4.106 + 3 x 0.1127 - 0.0140 = 4.4301,
    where 0.0140 is the gradient that the key-value projection needs not pass on. A label costs 2 x 4,096 x 151,936
    forward, three times that trained, and twice that with the language model frozen. 258 labels give way to an image.
    """
    training = TrainingConfig(**frozen)
    found = image_cost(PRESETS["qwen_vl_7b"], FrozenParts.of(training))
    assert found == pytest.approx(labels, abs=0.05)  # the last digit that is given


@pytest.mark.parametrize("preset", ["tiny", "qwen_vl_7b"])
@pytest.mark.parametrize("frozen", [{}, {"freeze_vision": True}, {"freeze_language_model": True}])
def test_rows_cost_what_the_counter_says(preset: str, frozen: dict[str, bool]) -> None:
    config = RunConfig(model=PRESETS[preset], training=TrainingConfig(**frozen))
    slots = config.model.resampler.num_queries + 2
    lengths, images = np.array([0, 7 * slots, 1000, 2048, 2048, 2000]), np.array([0, 7, 3, 0, 6, 1])
    flops = flops_of_rows(config, lengths, images)
    label = step_flops(config.model, FrozenParts.of(config.training), Work(0, 0, 0, 1))
    costs = row_costs(lengths, images, image_cost=image_cost(config.model, FrozenParts.of(config.training)))
    assert costs.dtype == np.int64
    assert np.allclose(costs, (flops - flops[0]) / label, atol=0.5001)
