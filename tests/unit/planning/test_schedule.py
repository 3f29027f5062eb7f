"""The order of Megatron-Core, and times that closed forms or counting on fingers give."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches, get_schedule_table

from megatron_vl.planning.schedule import (
    Pass,
    Pipeline,
    StageTimes,
    held_at_most,
    rank_order,
    simulate,
    simulate_repeating,
)


def equal(pipeline: Pipeline, forward: float, backward: float) -> float:
    """The time of a schedule whose ranks are equal, each pass of a rank's chunks together as long as given."""
    own = StageTimes(forward / pipeline.virtual, backward / pipeline.virtual)
    return simulate(pipeline, [own] * pipeline.num_stages).end


@pytest.mark.parametrize(("size", "count"), [(1, 5), (2, 4), (4, 4), (4, 16), (8, 64)])
def test_equal_stages_of_1f1b(size: int, count: int) -> None:
    assert equal(Pipeline(size, 1, count), 1.0, 2.0) == pytest.approx((count + size - 1) * 3.0)


@pytest.mark.parametrize(("size", "virtual", "count"), [(2, 2, 4), (4, 2, 16), (4, 4, 16), (8, 3, 64)])
def test_virtual_stages_divide_the_bubble(size: int, virtual: int, count: int) -> None:
    ideal = 3.0 * count
    bubble = equal(Pipeline(size, virtual, count), 1.0, 2.0) / ideal - 1
    assert bubble == pytest.approx((size - 1) / (virtual * count))


def test_unequal_stages_are_as_slow_as_the_slowest() -> None:
    """Where the slowest stage is the last: the sum of all stages and (m - 1) times the slowest."""
    factors = (1.0, 0.5, 1.25, 1.5)
    times = [StageTimes(factor, 2 * factor) for factor in factors]
    assert simulate(Pipeline(4, 1, 10), times).end == pytest.approx(3 * sum(factors) + 9 * 3 * 1.5)
    # Where it is the second, the warm-up of the stages after it costs it nothing.
    times = [times[0], times[3], times[1], times[2]]
    least, most = 10 * 4.5 + 3.0, 3 * sum(factors) + 9 * 4.5
    assert least <= simulate(Pipeline(4, 1, 10), times).end < most


def test_two_ranks_by_hand() -> None:
    """F1 F2 on rank 0, then as each backward pass comes back; messages of half a second keep the sender busy."""
    timeline = simulate(Pipeline(2, 1, 2), [StageTimes(1.0, 2.0, send=0.5), StageTimes(1.0, 2.0)])
    first, second = timeline.ranks
    assert [(one.what.is_backward, one.start, one.end) for one in second] == [
        (False, 1.5, 2.5), (True, 2.5, 5.0), (False, 5.0, 6.0), (True, 6.0, 8.5),
    ]  # fmt: skip
    assert [(one.what.is_backward, one.start, one.end) for one in first] == [
        (False, 0.0, 1.5), (False, 1.5, 3.0), (True, 5.0, 7.0), (True, 8.5, 10.5),
    ]  # fmt: skip


def test_micro_batches_of_different_length_by_hand() -> None:
    """Two ranks; the first micro-batch takes three times as long as the second, on the first stage only."""
    first = [StageTimes(3.0, 6.0), StageTimes(1.0, 2.0)]
    timeline = simulate(Pipeline(2, 1, 2), [first, StageTimes(1.0, 2.0)])
    assert [(one.start, one.end) for one in timeline.ranks[0]] == [(0.0, 3.0), (3.0, 4.0), (6.0, 12.0), (12.0, 14.0)]
    assert [(one.start, one.end) for one in timeline.ranks[1]] == [(3.0, 4.0), (4.0, 6.0), (6.0, 7.0), (7.0, 9.0)]


def test_messages_of_virtual_stages_keep_nobody_busy() -> None:
    slow = simulate(Pipeline(2, 2, 2), [StageTimes(1.0, 1.0, send=0.25)] * 4)
    assert all(one.end - one.start == 1.0 for rank in slow.ranks for one in rank)
    assert slow.end > simulate(Pipeline(2, 2, 2), [StageTimes(1.0, 1.0)] * 4).end


def test_a_late_rank_delays_those_after_it() -> None:
    assert simulate(Pipeline(2, 1, 1), [StageTimes(1.0, 1.0)] * 2, [3.0, 0.0]).end == 7.0


@pytest.mark.parametrize(("size", "virtual", "count"), [(4, 1, 3), (4, 1, 16), (2, 2, 4), (4, 3, 8), (4, 2, 4)])
def test_the_order_is_that_of_megatron_core(size: int, virtual: int, count: int) -> None:
    for rank in range(size):
        group = SimpleNamespace(size=lambda: size, rank=lambda rank=rank: rank)
        told = SimpleNamespace(pp_group=group, virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None)
        total, _, warm_up, _ = get_pp_rank_microbatches(count, virtual, size, p2p_communicator=told)
        forwards = get_schedule_table(count, virtual, size) if virtual > 1 else [(one, 0) for one in range(count)]
        order = rank_order(Pipeline(size, virtual, count), rank)
        assert [(one.micro_batch, one.chunk) for one in order if not one.is_backward] == forwards
        backwards = [(one.micro_batch, virtual - 1 - one.chunk) for one in order if one.is_backward]
        assert backwards == forwards
        leading = next(number for number, one in enumerate(order) if one.is_backward)
        assert leading == min(warm_up + 1, total)


@pytest.mark.parametrize(("size", "virtual", "count"), [(2, 1, 100), (4, 1, 77), (4, 2, 64), (3, 3, 60)])
def test_the_rest_of_a_long_step_is_a_repetition(size: int, virtual: int, count: int) -> None:
    pipeline = Pipeline(size, virtual, count)
    times = [StageTimes(1 + 0.07 * stage, 2.1 - 0.05 * stage, 0.02) for stage in range(pipeline.num_stages)]
    whole, short = simulate(pipeline, times), simulate_repeating(pipeline, times)
    assert short.end == pytest.approx(whole.end, rel=1e-9) and short.shift > 0
    assert [short.end_of(rank) for rank in range(size)] == pytest.approx([whole.end_of(rank) for rank in range(size)])


@pytest.mark.parametrize(
    ("size", "virtual", "count"), [(4, 1, 16), (4, 1, 2), (1, 1, 3), (4, 2, 16), (4, 2, 4), (2, 4, 8)]
)
def test_what_is_held_is_counted_from_the_order(size: int, virtual: int, count: int) -> None:
    kept = [1.0 + chunk for chunk in range(virtual)]
    for rank in range(size):
        held, most = 0.0, 0.0
        for one in rank_order(Pipeline(size, virtual, count), rank):
            held += -kept[one.chunk] if one.is_backward else kept[one.chunk]
            most = max(most, held)
        assert held_at_most(Pipeline(size, virtual, count), rank, kept, [0.0] * virtual) == (most, 0.0)


def test_what_1f1b_holds() -> None:
    held = [held_at_most(Pipeline(4, 1, 16), rank, [1.0], [0.5]) for rank in range(4)]
    assert held == [(4.0, 0.5), (3.0, 0.5), (2.0, 0.5), (1.0, 0.5)]
    # Rank 0 of the interleaved schedule holds p (1 + (p - 1) / (p v)) micro-batches.
    assert held_at_most(Pipeline(4, 2, 16), 0, [0.5, 0.5], [0.0, 0.0])[0] == 4 * (1 + 3 / 8)


def test_the_first_pass_is_the_first_micro_batch() -> None:
    assert rank_order(Pipeline(2, 2, 2), 1)[0] == Pass(0, 0, is_backward=False)
