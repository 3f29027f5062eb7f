"""Exchanges between ranks over pipeline stages and replicas."""

from __future__ import annotations

from typing import Any

import torch

from megatron_vl.config.schema import ParallelConfig
from megatron_vl.parallel.collectives import (
    from_last_stage,
    max_over_world,
    receive,
    send,
    sum_over_data_parallel,
)
from tests.helpers.ranks import RankPools, Start


def _exchange(start: Start, parallel: ParallelConfig) -> dict[str, Any]:
    with start.topology(parallel) as topology:
        rank = torch.tensor([float(topology.rank)])
        passed = None
        shaped = torch.arange(24.0).view(2, 3, 4).transpose(0, 2)
        if topology.pp_rank == 0:
            send(shaped, 1, topology=topology)
        else:
            passed = torch.equal(receive(0, dtype=torch.float32, topology=topology), shaped)
        return {
            "last": from_last_stage(rank.clone(), topology=topology).item(),
            "sum": sum_over_data_parallel(rank.clone(), topology=topology).item(),
            "max": max_over_world(float(topology.rank), device=topology.device),
            "passed": passed,
        }


def test_exchanges_over_stages_and_replicas(ranks: RankPools) -> None:
    """PP 2 x DP 2: ranks 0 and 1 are the first stage, 2 and 3 the second."""
    found = ranks(4).run(_exchange, ParallelConfig(pipeline_model_parallel_size=2))
    assert [answer["last"] for answer in found] == [2.0, 3.0, 2.0, 3.0]
    assert [answer["sum"] for answer in found] == [1.0, 1.0, 5.0, 5.0]
    assert [answer["max"] for answer in found] == [3.0] * 4
    assert [answer["passed"] for answer in found] == [None, None, True, True]
