"""Times that closed forms or counting on fingers give."""

from __future__ import annotations

import pytest

from megatron_vl.planning.schedule import Pipeline
from megatron_vl.planning.simulation import StageTimes, Timeline, simulate, simulate_repeating


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


def spans(timeline: Timeline, rank: int) -> list[tuple[float, float]]:
    """When the passes of a rank run."""
    return [(one.start, one.end) for one in timeline.ranks[rank]]


def test_two_ranks_by_hand() -> None:
    """F1 F2 on rank 0, then as each backward pass comes back; no rank computes during a message of half a second.

    The second activation and the first gradient are exchanged by one call, so both start at 4.5.
    """
    timeline = simulate(Pipeline(2, 1, 2), [StageTimes(1.0, 2.0, send=0.5), StageTimes(1.0, 2.0)])
    assert [one.what.is_backward for one in timeline.ranks[0]] == [False, False, True, True]
    assert spans(timeline, 0) == [(0.0, 1.0), (1.5, 2.5), (5.0, 7.0), (8.5, 10.5)]
    assert spans(timeline, 1) == [(1.5, 2.5), (2.5, 4.5), (5.0, 6.0), (6.0, 8.0)]
    assert timeline.ends == (10.5, 8.5)


def test_micro_batches_of_different_length_by_hand() -> None:
    """Two ranks; the first micro-batch takes three times as long as the second, on the first stage only."""
    first = [StageTimes(3.0, 6.0), StageTimes(1.0, 2.0)]
    timeline = simulate(Pipeline(2, 1, 2), [first, StageTimes(1.0, 2.0)])
    assert spans(timeline, 0) == [(0.0, 3.0), (3.0, 4.0), (6.0, 12.0), (12.0, 14.0)]
    assert spans(timeline, 1) == [(3.0, 4.0), (4.0, 6.0), (6.0, 7.0), (7.0, 9.0)]


def test_virtual_stages_by_hand() -> None:
    """Two ranks, two virtual stages, four micro-batches: after each of these lines the two ranks meet.

    A line has what rank 0 computes, what rank 1 computes, and the longer of both; at the right the sum so far.
    Forward and backward seconds are 1 and 2 in stage 0 (chunk a of rank 0), 1 and 1 in stage 1 (chunk a of rank 1), 2
    and 1 in stage 2 (chunk b of rank 0), 1 and 3 in stage 3 (chunk b of rank 1).

        F1a |           1    1
        F2a | F1a       1    2
        F1b | F2a       2    4
        F2b | F1b       2    6
            | B1b       3    9    rank 0 waits for a gradient that it needs only after F3a
        F3a | F2b       1   10
        B1b | B2b       3   13
        F4a | F3a       1   14
        B2b | B1a       1   15
        F3b | F4a       2   17
        B1a | B2a       2   19
        F4b | F3b       2   21    rank 1 waits for F4b before B3b, although B3b needs only F3b
        B2a | B3b       3   24
        B3b | F4b B4b   4   28
        B4b | B3a       1   29
        B3a | B4a       2   31
        B4a |           2   33
    """
    stages = [StageTimes(1.0, 2.0), StageTimes(1.0, 1.0), StageTimes(2.0, 1.0), StageTimes(1.0, 3.0)]
    timeline = simulate(Pipeline(2, 2, 4), stages)
    assert spans(timeline, 0) == [
        (0, 1), (1, 2), (2, 4), (4, 6), (9, 10), (10, 11), (13, 14), (14, 15),
        (15, 17), (17, 19), (19, 21), (21, 23), (24, 25), (28, 29), (29, 31), (31, 33),
    ]  # fmt: skip
    assert spans(timeline, 1) == [
        (1, 2), (2, 3), (4, 5), (6, 9), (9, 10), (10, 13), (13, 14), (14, 15),
        (15, 16), (17, 18), (19, 20), (21, 24), (24, 25), (25, 28), (28, 29), (29, 30),
    ]  # fmt: skip
    assert timeline.ends == (33, 31)


def test_messages_of_virtual_stages_by_hand() -> None:
    """The same schedule with passes of a second and messages of a quarter: most of them travel during a pass.

    Without messages the end is at 18. The first three and the last three exchanges are waited for at once.
    """
    timeline = simulate(Pipeline(2, 2, 4), [StageTimes(1.0, 1.0, send=0.25)] * 4)
    assert all(one.end - one.start == 1.0 for rank in timeline.ranks for one in rank)
    assert [start for start, _ in spans(timeline, 0)] == [
        0, 1.25, 2.5, 3.75, 5.75, 6.75, 7.75, 8.75, 9.75, 10.75, 11.75, 12.75, 14, 16, 17.25, 18.5,
    ]  # fmt: skip
    assert [start for start, _ in spans(timeline, 1)] == [
        1.25, 2.5, 3.75, 4.75, 5.75, 6.75, 7.75, 8.75, 9.75, 10.75, 11.75, 12.75, 13.75, 14.75, 16, 17.25,
    ]  # fmt: skip
    assert timeline.ends == (19.5, 18.5)


def test_a_late_rank_delays_those_after_it() -> None:
    assert simulate(Pipeline(2, 1, 1), [StageTimes(1.0, 1.0)] * 2, [3.0, 0.0]).end == 7.0


@pytest.mark.parametrize(("size", "virtual", "count"), [(2, 1, 100), (4, 1, 77), (4, 2, 64), (3, 3, 60)])
def test_the_rest_of_a_long_step_is_a_repetition(size: int, virtual: int, count: int) -> None:
    pipeline = Pipeline(size, virtual, count)
    times = [StageTimes(1 + 0.07 * stage, 2.1 - 0.05 * stage, 0.02) for stage in range(pipeline.num_stages)]
    whole, short = simulate(pipeline, times), simulate_repeating(pipeline, times)
    assert short.end == pytest.approx(whole.end, rel=1e-9) and short.shift > 0
    assert [short.end_of(rank) for rank in range(size)] == pytest.approx([whole.end_of(rank) for rank in range(size)])
