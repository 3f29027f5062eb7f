"""What the members of a process group believe."""

from __future__ import annotations

from megatron_vl.rehearsal.groups import group_faults
from megatron_vl.rehearsal.places import Grid, Place
from megatron_vl.rehearsal.records import Membership

GRID = Grid(tensor=2, data=1, pipeline=1)


def test_members_of_the_same_mind_have_no_fault() -> None:
    assert group_faults(GRID, [_member(0, {"0": (0, 1), "1": (0,)}), _member(1, {"0": (0, 1), "2": (1,)})]) == []


def test_groups_in_another_order_are_found() -> None:
    faults = group_faults(GRID, [_member(0, {"0": (0, 1), "1": (0,)}), _member(1, {"1": (0, 1), "0": (1,)})])
    assert any("rank 0 makes it of ranks 0, 1, and rank 1 of ranks 1" in fault for fault in faults)


def test_a_rank_that_is_missing_in_its_group_is_found() -> None:
    (fault,) = group_faults(GRID, [_member(0, {"0": (0, 1)}), _member(1, {})])
    assert fault == "process group 0 of ranks 0, 1: not of the same mind is ranks 1"


def test_a_rank_that_takes_another_place_is_found() -> None:
    (fault,) = group_faults(GRID, [Membership(0, Place(0, 0, 1), {})])
    assert fault.startswith("rank 0 believes to be pipeline rank 0, tensor rank 1")


def _member(rank: int, groups: dict[str, tuple[int, ...]]) -> Membership:
    return Membership(rank, GRID.place(rank), groups)
