"""Exchanges between ranks, at TP 2 x DP 2 and over pipeline stages."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from megatron_vl.config.schema import ParallelConfig
from megatron_vl.data.batch import MicroBatch
from megatron_vl.parallel.collectives import (
    broadcast_batches,
    from_last_stage,
    max_over_world,
    receive,
    send,
    sum_over_data_parallel,
)
from tests.helpers.ranks import RankPools, Start
from tests.helpers.tiny import MODEL, micro_batches


def _same(found: MicroBatch, expected: MicroBatch) -> bool:
    pairs = [(getattr(found, item.name), getattr(expected, item.name)) for item in fields(MicroBatch)]
    return all(
        one.dtype == other.dtype and torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
        for one, other in pairs
    )


def _batches(dp_rank: int) -> list[MicroBatch]:
    """Three micro-batches, one of text alone and one of a stage that does not hold the patch embedding."""
    first, second, text = micro_batches(MODEL, 3, seed=10 * dp_rank)
    return [first, replace(second, pixels=None), text]


def _share(start: Start, parallel: ParallelConfig) -> list[bool]:
    with start.topology(parallel) as topology:
        reads = topology.tp_rank == 0
        found = broadcast_batches(_batches(topology.dp_rank) if reads else None, topology=topology)
        assert found is not None
        same = [_same(*pair) for pair in zip(found, _batches(topology.dp_rank), strict=True)]
        other = [_same(*pair) for pair in zip(found, _batches(1 - topology.dp_rank), strict=True)]
        empty = broadcast_batches([] if reads else None, topology=topology)
        end = broadcast_batches(None, topology=topology)
        return [all(same), not any(other), empty == [], end is None]


@pytest.mark.parametrize("tensor", [1, 2])
def test_ranks_of_a_tensor_parallel_group_get_what_its_first_one_read(ranks: RankPools, tensor: int) -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=tensor)
    if tensor == 1:  # everybody reads
        assert ranks(2).run(_share, parallel) == [[True] * 4] * 2
    else:
        assert ranks(4).run(_share, parallel) == [[True] * 4] * 4


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
