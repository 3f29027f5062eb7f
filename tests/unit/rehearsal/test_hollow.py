"""Floating-point tensors without contents, integers with."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from megatron_vl.rehearsal.hollow import Hollow


def test_a_layer_larger_than_any_memory_trains() -> None:
    with Hollow():
        layer = nn.Linear(2**20, 2**20, dtype=torch.bfloat16)  # 2 TB
        loss = layer(torch.ones(4, 2**20, dtype=torch.bfloat16)).sum()
        loss.backward()
    assert layer.weight.is_meta and layer.weight.grad is not None
    assert layer.weight.grad.shape == (2**20, 2**20) and loss.shape == ()


def test_integers_keep_their_contents() -> None:
    with Hollow():
        shape = torch.tensor(torch.empty(3, 1, 5).size(), dtype=torch.int64)
        counts = torch.arange(4).cumsum(0)
        mask = counts > 1
    assert shape.tolist() == [3, 1, 5] and counts.tolist() == [0, 1, 3, 6]
    assert mask.tolist() == [False, False, True, True]


def test_what_meets_a_tensor_without_contents_loses_its_own() -> None:
    with Hollow():
        table, tokens = torch.zeros(10, 4), torch.tensor([1, 7])
        found = F.embedding(tokens, table)
        joined = torch.cat([found, found])
        room = torch.tensor([5.0, 6.0])  # made from numbers, so it has contents
        room[0] = found.sum()
    assert found.is_meta and found.shape == (2, 4) and joined.shape == (4, 4)
    assert room.tolist() == [5.0, 6.0]


def test_a_number_that_is_not_there_is_one() -> None:
    with Hollow(), torch.no_grad():
        assert float(torch.zeros(3).mean()) == 1.0
        assert math.isfinite(torch.linalg.vector_norm(torch.zeros(3)).item())
        assert torch.tensor([torch.zeros(3).norm(), torch.zeros(2).norm()]).tolist() == [1.0, 1.0]


def test_pixels_become_numbers_without_contents() -> None:
    with Hollow():
        pixels = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
        assert not pixels.is_meta and pixels.float().is_meta and not pixels.long().is_meta
