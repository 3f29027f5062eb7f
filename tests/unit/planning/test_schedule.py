"""The order of Megatron-Core, and what ranks hold, by closed forms and by counting."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches, get_schedule_table

from megatron_vl.planning.schedule import Pass, Pipeline, held_at_most, rank_order


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
