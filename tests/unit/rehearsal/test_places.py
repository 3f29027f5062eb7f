"""The order of ranks, and those whose programs differ."""

from __future__ import annotations

from megatron_vl.rehearsal.places import Grid, Place


def test_ranks_are_in_the_order_tensor_data_pipeline() -> None:
    grid = Grid(tensor=2, data=3, pipeline=4)
    assert grid.world_size == 24
    assert grid.rank(Place(data=0, pipeline=0, tensor=1)) == 1
    assert grid.rank(Place(data=1, pipeline=0, tensor=0)) == 2
    assert grid.rank(Place(data=0, pipeline=1, tensor=0)) == 6
    assert [grid.rank(grid.place(rank)) for rank in range(24)] == list(range(24))


def test_two_replicas_and_the_ends_of_tensor_groups_differ() -> None:
    grid = Grid(tensor=4, data=64, pipeline=2)
    assert [grid.rank(place) for place in grid.distinct(all_tensor_ranks=False)] == [0, 3, 256, 259, 252, 508]
    assert len(grid.distinct(all_tensor_ranks=True)) == 16
    assert Grid(1, 1, 1).distinct(all_tensor_ranks=False) == [Place(0, 0, 0)]
