from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vl.planning.partition import balanced_partition


def all_partitions(costs: list[float], num_groups: int) -> list[list[float]]:
    """Group costs of every way to cut ``costs``."""
    result = []
    for cuts in combinations(range(1, len(costs)), num_groups - 1):
        edges = [0, *cuts, len(costs)]
        result.append([sum(costs[a:b]) for a, b in pairwise(edges)])
    return result


@settings(derandomize=True, max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=9), st.integers(1, 9))
def test_no_cut_is_better(costs: list[float], num_groups: int) -> None:
    num_groups = min(num_groups, len(costs))
    sizes = balanced_partition(costs, num_groups)
    assert len(sizes) == num_groups and min(sizes) >= 1 and sum(sizes) == len(costs)
    found, start = [], 0
    for size in sizes:
        found.append(sum(costs[start : start + size]))
        start += size
    best = min((max(groups), sum(x * x for x in groups)) for groups in all_partitions(costs, num_groups))
    assert (max(found), sum(x * x for x in found)) == best


@pytest.mark.parametrize("num_groups", [1, 2, 7])
def test_costs_without_weight_still_get_a_group(num_groups: int) -> None:
    assert sum(balanced_partition([0.0] * 7, num_groups)) == 7
