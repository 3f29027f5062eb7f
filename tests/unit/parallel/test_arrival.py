"""Micro-batches reach every rank of a tensor-parallel group as one buffer of its device, when their turn comes."""

from __future__ import annotations

import contextlib
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_vl.config.schema import ParallelConfig
from megatron_vl.data.loading.batch import MicroBatch
from megatron_vl.parallel import arrival
from megatron_vl.parallel.arrival import Arrivals, pack, unpack
from megatron_vl.parallel.collectives import share_outlines, tensors_of, with_tensors
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
    """Two chunks take the micro-batches of a step, the second one behind the first."""
    with start.topology(parallel) as topology:
        reads = topology.tp_rank == 0
        outlines = share_outlines(_batches(topology.dp_rank) if reads else None, topology=topology)
        assert outlines is not None
        arrivals = Arrivals(outlines, topology, takers=2)
        one, two = iter(arrivals), iter(arrivals)
        found = [next(one), next(one), next(two), next(one), next(two), next(two)]
        mine, other = _batches(topology.dp_rank), _batches(1 - topology.dp_rank)
        order = [0, 1, 0, 2, 1, 2]
        same = [_same(batch, mine[number]) for batch, number in zip(found, order, strict=True)]
        wrong = [_same(batch, other[number]) for batch, number in zip(found, order, strict=True)]
        empty = share_outlines([] if reads else None, topology=topology)
        end = share_outlines(None, topology=topology)
        return [all(same), not any(wrong), not arrivals._here and not arrivals._ahead, empty == [], end is None]


@pytest.mark.parametrize("tensor", [1, 2])
def test_ranks_of_a_tensor_parallel_group_get_what_its_first_one_read(ranks: RankPools, tensor: int) -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=tensor)
    world = 2 * tensor  # with tensor 1 everybody reads
    assert ranks(world).run(_share, parallel) == [[True] * 5] * world


@pytest.mark.parametrize("number", range(3))
def test_a_buffer_gives_back_what_was_packed(number: int) -> None:
    """Empty tensors, missing pixels and strided tensors too."""
    batch = _batches(0)[number]
    strided = replace(batch, tokens=torch.stack([batch.tokens, batch.tokens], dim=1)[:, 0])
    outline = with_tensors(batch, {name: value.to("meta") for name, value in tensors_of(batch).items()})
    buffer = pack(strided, pinned=False)
    found = unpack(buffer, outline)
    assert buffer.dtype == torch.uint8 and _same(found, batch)
    assert all(value.data_ptr() % 16 == buffer.data_ptr() % 16 for value in tensors_of(found).values())


@pytest.mark.parametrize("tp_rank", [0, 1])
def test_only_tensors_of_the_device_are_broadcast(monkeypatch: pytest.MonkeyPatch, tp_rank: int) -> None:
    """NCCL can send nothing else. The device is stood in for by meta, the streams by records of their calls."""
    calls: list[Any] = []
    stream: Any = SimpleNamespace(wait_stream=lambda _: calls.append("wait"))
    monkeypatch.setattr(arrival, "_copies", mock.Mock())
    monkeypatch.setattr(torch.cuda, "stream", lambda _: calls.append("copy") or contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: calls.append("record"))
    monkeypatch.setattr(dist, "broadcast", lambda tensor, **_: calls.append(f"broadcast {tensor.device}"))
    topology: Any = SimpleNamespace(tp_size=2, tp_rank=tp_rank, tp_source=0, tp_group=None, device=torch.device("meta"))
    for batch in Arrivals(_batches(0), topology):
        calls.append("compute")
        assert {value.device.type for value in tensors_of(batch).values()} == {"meta"}
    if tp_rank == 1:
        assert calls == ["broadcast meta", "compute"] * 3
    else:  # the next copy starts before the micro-batch is computed
        turn = ["wait", "record", "copy", "broadcast meta", "compute"]
        assert calls == ["copy", *turn, *turn, *[call for call in turn if call != "copy"]]
