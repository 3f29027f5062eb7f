"""Ranks of one start agree on a name, whatever ranks of an earlier start have left in the store."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from megatron_vl.launch import Launch
from megatron_vl.parallel.process_group import agree_on_start

WORLD = 4
SOON = timedelta(seconds=60)


def start(store: dist.Store, *, missing: tuple[int, ...] = (), seed: int = 0) -> list[str | None]:
    """Names of the ranks that come, None for a rank that waits in vain."""
    delays = random.Random(seed).sample([0.0, 0.05, 0.1, 0.15], WORLD)

    def agree(rank: int) -> str | None:
        time.sleep(delays[rank])
        try:
            return agree_on_start(store, Launch(rank, WORLD, rank), timedelta(seconds=1) if missing else SOON)
        except dist.DistStoreError:
            return None

    with ThreadPoolExecutor(WORLD) as ranks:
        return list(ranks.map(agree, [rank for rank in range(WORLD) if rank not in missing]))


@pytest.mark.parametrize("missing", [(), (0,), (1,), (3,), (0, 2)], ids=str)
def test_ranks_that_are_started_again_agree_on_a_new_name(missing: tuple[int, ...]) -> None:
    store = dist.HashStore()
    earlier = set(start(store, missing=missing))
    names = [set(start(store, seed=seed)) for seed in range(1, 4)]
    assert [len(found) for found in names] == [1, 1, 1]
    assert len(set.union(*names) - earlier) == 3


def test_ranks_that_do_not_come_are_named() -> None:
    with pytest.raises(dist.DistStoreError, match=r"ranks \[1, 2\] have not come within 0 s"):
        agree_on_start(dist.HashStore(), Launch(0, 3, 0), timedelta(seconds=0.1))
