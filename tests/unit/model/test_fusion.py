from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_vl.errors import DataError
from megatron_vl.model.fusion import fuse

QUERIES, WIDTH, LENGTH = 2, 3, 10


def _inputs(images: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    embedded = torch.randn(LENGTH, WIDTH, generator=generator, requires_grad=True)
    return embedded, torch.randn(QUERIES, images, WIDTH, generator=generator, requires_grad=True)


def test_features_fill_the_slots_span_by_span() -> None:
    embedded, features = _inputs(2)
    slots = torch.tensor([1, 2, 4, 5, 8, 9])
    line = fuse(embedded, features, slots=slots, span_images=torch.tensor([1, 0, 1]))
    filling = {1: (0, 1), 2: (1, 1), 4: (0, 0), 5: (1, 0), 8: (0, 1), 9: (1, 1)}  # slot: (query, image)
    for position in range(LENGTH):
        expected = features[filling[position]] if position in filling else embedded[position]
        assert torch.equal(line[position], expected)
    line.sum().backward()
    assert torch.equal(embedded.grad[slots], torch.zeros(6, WIDTH)), "what is overwritten has no gradient"
    assert torch.equal(features.grad[0, :, 0], torch.tensor([1.0, 2.0])), "an image in two spans gets both gradients"


def test_a_batch_without_slots_gives_every_feature_a_zero_gradient() -> None:
    embedded, features = _inputs(1)
    nothing = torch.empty(0, dtype=torch.int64)
    line = fuse(embedded, features, slots=nothing, span_images=nothing)
    assert torch.equal(line, embedded)
    line.sum().backward()
    assert torch.equal(features.grad, torch.zeros_like(features))


@pytest.mark.parametrize(("slots", "spans"), [([1, 2, 3], [0]), ([1, 2], [0, 1]), ([1], [])])
def test_slots_that_do_not_match_the_features_are_refused(slots: list[int], spans: list[int]) -> None:
    embedded, features = _inputs(2)
    with pytest.raises(DataError, match=rf"{len(slots)} image slots, but {len(spans)} image spans x 2 queries"):
        fuse(embedded, features, slots=torch.tensor(slots), span_images=torch.tensor(spans, dtype=torch.int64))


def test_features_take_the_type_of_the_line() -> None:
    embedded, features = _inputs(1)
    line = fuse(embedded.bfloat16(), features, slots=torch.tensor([0, 1]), span_images=torch.tensor([0]))
    assert line.dtype == torch.bfloat16
