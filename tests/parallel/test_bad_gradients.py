"""A gradient that is not finite on one rank changes no weight on any."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_vl.config.schema import RunConfig
from megatron_vl.parallel.rng import seed_all
from megatron_vl.training.parallel_model import build_parallel_model
from megatron_vl.training.step import train_step
from tests.helpers.ranks import RankPools, Start
from tests.helpers.tiny import micro_batches, tiny_config
from tests.parallel.gradients import own_images


def step_with_poison(start: Start, config: RunConfig, poisoned: bool) -> tuple[bool, list[str]]:
    """One step in which rank 0 sees a token loss of NaN; whether it was skipped, and which parameters changed."""
    with start.topology(config.parallel) as topology:
        seed_all(1)
        model = build_parallel_model(config, topology)
        before = {n: p.detach().clone() for chunk in model.chunks for n, p in chunk.named_parameters()}
        if poisoned and topology.rank == 0:
            first = next(parameter for chunk in model.chunks for parameter in chunk.parameters())
            first.register_hook(lambda gradient: torch.full_like(gradient, float("nan")))
        batches = own_images(micro_batches(config.model, 4)[topology.dp_rank :: topology.dp_size], config, topology)
        result = train_step(model, batches, config=config, topology=topology, step=0)
        after = {n: p for chunk in model.chunks for n, p in chunk.named_parameters()}
        return result.skipped, [name for name, value in after.items() if not torch.equal(value, before[name])]


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [
        (1, {}),
        (2, {"use_distributed_optimizer": True}),
        (2, {"use_distributed_optimizer": False}),
        (2, {"tensor_model_parallel_size": 2}),
        (2, {"pipeline_model_parallel_size": 2}),
        (2, {"tensor_model_parallel_size": 2, "vision_parallel": "data"}),
        (2, {"pipeline_model_parallel_size": 2, "vision_parallel": "data", "use_distributed_optimizer": True}),
    ],
)
def test_a_gradient_that_is_not_finite_is_skipped_everywhere(
    ranks: RankPools, world_size: int, parallel: dict[str, Any], bf16: bool
) -> None:
    config = tiny_config(parallel=parallel, training={"bf16": bf16})
    assert ranks(world_size).run(step_with_poison, config, True) == [(True, [])] * world_size
    assert all(not skipped and changed for skipped, changed in ranks(world_size).run(step_with_poison, config, False))
