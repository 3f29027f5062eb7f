"""What ``vision_parallel data`` does beside being right: how many images at a time, what is kept, who encodes."""

from __future__ import annotations

import weakref
from collections import deque
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from megatron_vl.config.schema import RunConfig
from megatron_vl.model.qwen_vl import QwenVL
from megatron_vl.parallel.rng import seed_all
from megatron_vl.training.image_encoder import take
from megatron_vl.training.parallel_model import build_parallel_model
from megatron_vl.training.step import forward_backward
from tests.helpers.ranks import RankPools, Start
from tests.helpers.tiny import micro_batches, tiny_config
from tests.parallel.gradients import own_images

IMAGES = 12
"""In eight micro-batches, of 1, 3, 0 and 2 images in turn."""


def _encoded_on_rank(start: Start, config: RunConfig, forward_only: bool) -> list[int]:
    """The number of images in each call of the vision part, in one step."""
    with start.topology(config.parallel) as topology:
        seed_all(1)
        model = build_parallel_model(config, topology)
        batches = own_images(micro_batches(config.model, 8)[topology.dp_rank :: topology.dp_size], config, topology)
        with mock.patch.object(QwenVL, "see", autospec=True, side_effect=QwenVL.see) as see:
            forward_backward(
                model.wrapped, batches, topology=topology, forward_only=forward_only, encoder=model.encoder
            )
        return [len(call.args[2]) for call in see.call_args_list if call.args[2] is not None]


def _config(**parallel: Any) -> RunConfig:
    return tiny_config(parallel={"vision_parallel": "data"} | parallel)


@pytest.mark.parametrize(("size", "expected"), [(4, [4, 2]), (6, [6]), (100, [6])])
def test_so_many_images_are_encoded_at_a_time(ranks: RankPools, size: int, expected: list[int]) -> None:
    config = _config(tensor_model_parallel_size=2, vision_micro_batch_size=size, vision_recompute=False)
    assert ranks(2).run(_encoded_on_rank, config, False) == [expected, expected]


@pytest.mark.parametrize("forward_only", [False, True])
def test_images_are_encoded_twice_to_keep_nothing_and_once_in_a_validation(
    ranks: RankPools, forward_only: bool
) -> None:
    config = _config(pipeline_model_parallel_size=2, vision_micro_batch_size=4)
    expected = [4, 2] if forward_only else [4, 2, 4, 2]
    assert ranks(2).run(_encoded_on_rank, config, forward_only) == [expected, expected]


def test_four_ranks_share_the_images_of_a_step(ranks: RankPools) -> None:
    """Of 12 images in micro-batches of 0 to 3, and of those of two data-parallel ranks, each encodes an equal share."""
    whole = {"vision_recompute": False, "vision_micro_batch_size": 100}
    config = _config(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, **whole)
    assert ranks(4).run(_encoded_on_rank, config, False) == [[IMAGES // 4]] * 4
    config = _config(tensor_model_parallel_size=2, **whole)  # data-parallel size 2: of 1, 0, 1, 0 and 3, 2, 3, 2 images
    assert ranks(4).run(_encoded_on_rank, config, False) == [[1], [1], [5], [5]]


@pytest.mark.parametrize("granularity", [None, "selective", "full"])
def test_the_tower_runs_forward_twice_whatever_layers_recompute(ranks: RankPools, granularity: str | None) -> None:
    config = tiny_config(parallel={"vision_parallel": "data"}, training={"recompute_granularity": granularity})
    assert ranks(1).run(_passes_of_a_layer, config) == [2]
    kept = tiny_config(
        parallel={"vision_parallel": "data", "vision_recompute": False}, training={"recompute_granularity": granularity}
    )
    assert ranks(1).run(_passes_of_a_layer, kept) == [2 if granularity == "full" else 1]
    layers = tiny_config(
        parallel={"vision_parallel": "data", "vision_recompute_granularity": "layers"},
        training={"recompute_granularity": granularity},
    )
    assert ranks(1).run(_passes_of_a_layer, layers) == [2]


def _passes_of_a_layer(start: Start, config: RunConfig) -> int:
    """How often the first layer of the tower runs forward in a step with one part of images."""
    with start.topology(config.parallel) as topology:
        model = build_parallel_model(config, topology)
        assert model.encoder is not None and model.encoder.chunk.vision is not None
        passes: list[int] = []
        model.encoder.chunk.vision.layers["0"].register_forward_pre_hook(lambda *_: passes.append(1))
        batches = own_images(micro_batches(config.model, 2), config, topology)
        forward_backward(model.wrapped, batches, topology=topology, forward_only=False, encoder=model.encoder)
        return len(passes)


def test_a_block_is_dropped_when_its_last_entry_has_been_taken() -> None:
    """Features of a rank's share are released during the schedule, and gradients while they are sent back."""
    blocks = deque([torch.arange(3.0), torch.arange(3.0, 5.0), torch.arange(5.0, 9.0)])
    first, second = (weakref.ref(block.untyped_storage()) for block in list(blocks)[:2])
    assert torch.cat(take(blocks, 2)).tolist() == [0, 1] and first() is not None
    assert take(blocks, 0) == []
    assert torch.cat(take(blocks, 4)).tolist() == [2, 3, 4, 5]
    assert first() is None and second() is None
    assert torch.cat(take(blocks, 3)).tolist() == [6, 7, 8] and not blocks


def _kept_on_rank(start: Start, config: RunConfig) -> int:
    """The bytes that encoding the images of a step keeps for the backward pass."""
    with start.topology(config.parallel) as topology:
        encoder = build_parallel_model(config, topology).encoder
        assert encoder is not None
        kept: list[int] = []

        def keep(tensor: Tensor) -> Tensor:
            kept.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            encoder.encode(own_images(micro_batches(config.model, 8), config, topology), forward_only=False)
        return sum(kept)


def test_nothing_is_kept_where_images_are_encoded_again(ranks: RankPools) -> None:
    """Layers that are computed again keep their inputs; a step of 12 images keeps what the resampler needs besides."""
    ways: list[dict[str, Any]] = [{}, {"vision_recompute_granularity": "layers"}, {"vision_recompute": False}]
    again, layers, kept = (ranks(1).run(_kept_on_rank, _config(**way))[0] for way in ways)
    assert again == 0 and kept > 0
    frozen = tiny_config(parallel={"vision_parallel": "data"}, training={"freeze_vision": True})
    resampler = ranks(1).run(_kept_on_rank, frozen)[0]
    assert 0 < resampler < kept / 4, "a resampler behind a frozen tower keeps its own part"
    assert resampler < layers < kept / 2
