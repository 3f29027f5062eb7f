"""What ranks measure: pairs, clocks, and the backend that all of them can use."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_vl.doctor.facts import Clock
from megatron_vl.doctor.group import common_backend, compared, turns
from megatron_vl.launch import Launch
from tests.unit.doctor.made_up import LAPTOP, NODE


@pytest.mark.parametrize("size", [2, 3, 4, 5, 8])
def test_neighbors_of_a_ring_are_each_measured_once_and_no_rank_twice_at_a_time(size: int) -> None:
    found = list(turns(size))
    pairs = [frozenset(pair) for turn in found for pair in turn]
    ring = {frozenset((rank, (rank + 1) % size)) for rank in range(size)}
    assert len(pairs) == len(ring) and set(pairs) == ring
    for turn in found:
        ranks = [rank for pair in turn for rank in pair]
        assert len(ranks) == len(set(ranks))


def test_a_clock_is_compared_with_the_middle_of_the_round_trip() -> None:
    """Asked at 100.0 and answered after 0.5 s: the middle is 100.25."""
    assert compared(3, 100.0, 0.5, 101.0) == Clock(3, 0.75, 0.25)


def test_nccl_is_taken_if_each_rank_has_a_device_of_its_own() -> None:
    shared = replace(NODE, torch=replace(NODE.torch, devices=NODE.torch.devices[:1]))
    crowded = replace(shared, launch=Launch(1, 2, 1, shows_all_devices=True))
    assert common_backend([NODE, NODE]) == "nccl"
    assert common_backend([NODE, LAPTOP]) == "gloo"
    assert common_backend([shared, crowded]) == "gloo"
    assert common_backend([NODE, replace(NODE, torch=replace(NODE.torch, nccl=""))]) == "gloo"
