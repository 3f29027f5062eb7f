"""Which ranks share a host, by hand, where stages divide a host of 8 and where they do not."""

from __future__ import annotations

import pytest

from megatron_vl.planning.gpus import GPUS
from megatron_vl.planning.hosts import Hosts
from megatron_vl.planning.traffic import DataGroup, boundary_links

H100 = GPUS["h100"]


def hosts(tensor: int, data: int, pipeline: int) -> Hosts:
    return Hosts(tensor, data, pipeline, per_host=8)


@pytest.mark.parametrize(
    ("sizes", "leaving"),
    [
        ((1, 2, 4), ""),  # 8 ranks
        ((1, 4, 4), "13"),  # 0-3 4-7 | 8-11 12-15: the second of each host goes to the other
        ((2, 4, 4), "0123"),  # every stage is a host
        ((1, 3, 4), "123"),  # 0-2 3-5 6-7|8 9-11: 3-5 go to 6-8 (5 to 8), 6-8 to 9-11 (6 to 9), 9-11 to 0-2
        ((1, 6, 2), "01"),  # 0-5 6-7|8-11: 2 goes to 8
        ((2, 3, 2), "01"),  # 12 ranks: 0, 2, 4 go to 6, 8, 10, of which two are on the second host
        ((4, 1, 3), "12"),  # 0-3 4-7 | 8-11
        ((1, 12, 8), "01234567"),  # 96 ranks: 12 away is another host
        ((2, 6, 8), "01234567"),
        ((1, 6, 16), "0123456789abcdef"),  # 6 away: of 0-5, 2 to 5 leave; of 18-23 all do
        ((1, 4, 24), "13579bdfhjln"),
    ],
)
def test_stages_that_leave_their_host(sizes: tuple[int, int, int], leaving: str) -> None:
    found = hosts(*sizes)
    numbers = [stage for stage in range(found.pipeline) if found.leaves(stage)]
    assert numbers == [int(letter, 36) for letter in leaving]
    links = boundary_links(found, H100)
    assert [link is H100.network for link in links] == [stage in numbers for stage in range(found.pipeline)]


@pytest.mark.parametrize(
    ("sizes", "by_stage"),
    [
        ((1, 3, 4), [(3,), (3,), (2, 1), (3,)]),
        ((1, 6, 2), [(6,), (2, 4)]),
        ((2, 3, 2), [(3,), (1, 2)]),  # 0, 2, 4; 6 | 8, 10
        ((1, 12, 1), [(8, 4)]),
        ((2, 6, 8), [(4, 2), (2, 4)] * 4),  # 0 2 4 6 | 8 10; 12 14 | 16 18 20 22; and so on
        ((1, 12, 8), [(8, 4), (4, 8)] * 4),
        ((4, 8, 2), [(2,) * 4] * 2),
        ((8, 4, 2), [(1,) * 4] * 2),
    ],
)
def test_replicas_of_a_stage_on_each_host(sizes: tuple[int, int, int], by_stage: list[tuple[int, ...]]) -> None:
    found = hosts(*sizes)
    assert [found.replicas(stage) for stage in range(found.pipeline)] == by_stage


def test_ranks_of_a_job_that_does_not_fill_its_last_host() -> None:
    assert hosts(1, 12, 1).all_ranks() == (8, 4)
    assert hosts(2, 6, 8).all_ranks() == (8,) * 12


def test_stages_on_another_host_than_the_first() -> None:
    assert hosts(1, 2, 4).far_stages == 0
    assert hosts(1, 4, 4).far_stages == 2
    assert hosts(1, 3, 4).far_stages == 2  # ranks 2, 5 | 8, 11
    assert hosts(2, 6, 8).far_stages == 7


def test_tensor_groups_that_hosts_split() -> None:
    assert hosts(4, 3, 1).split_tensor_group is None
    assert hosts(3, 4, 1).split_tensor_group == range(6, 9)
    assert hosts(16, 2, 1).split_tensor_group == range(16)


def test_a_rack_is_one_host() -> None:
    rack = GPUS["gb200"]
    found = Hosts(1, 64, 1, rack.within(64).nvlink_domain)
    assert found.all_ranks() == (64,)
    assert Hosts(1, 256, 1, rack.within(256).nvlink_domain).all_ranks() == (64,) * 4


def test_the_host_with_fewest_ranks_needs_most_of_its_network_cards() -> None:
    """Of 12 GB in twelve parts, a host with four ranks receives eight parts over four cards: 2 GB each."""
    exchange = DataGroup((8, 4)).exchange(H100, 12e9, 1)
    assert exchange.network == pytest.approx(2e9) and exchange.nvlink == pytest.approx(12e9 * 7 / 8)
    assert exchange.seconds == pytest.approx(2e9 / 36.5e9 + 210e-6)
    one = DataGroup((2, 1)).exchange(H100, 12e9, 1)
    assert one.network == pytest.approx(8e9) and one.nvlink == pytest.approx(6e9)
    alone = DataGroup((3,)).exchange(H100, 12e9, 1)
    assert alone.network == 0 and alone.seconds == pytest.approx(8e9 / 360e9 + 40e-6)
