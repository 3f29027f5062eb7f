"""Gathering weights while the next forward pass runs: what is saved, validated and exported is what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vl.checkpoint.tensors import open_checkpoint
from megatron_vl.config.schema import RunConfig
from megatron_vl.parallel.rng import seed_all
from megatron_vl.training.parallel_model import build_parallel_model
from megatron_vl.training.step import train_step
from tests.helpers.ranks import RankPools, Start
from tests.helpers.tiny import micro_batches, tiny_config
from tests.parallel.saving import train_steps

STEPS = 3
PP2_VP2 = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}


def _config(parallel: dict[str, Any], *, gather: bool, **training: Any) -> RunConfig:
    overlap = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": gather}
    return tiny_config(parallel=parallel | overlap, training=training)


@pytest.mark.parametrize(
    ("world_size", "parallel", "training"),
    [(2, {}, {}), (2, {}, {"freeze_vision": True}), (4, PP2_VP2, {"bf16": True})],
    ids=["dp2", "dp2-stage3", "pp2-vp2-dp2-bf16"],
)
def test_what_is_saved_is_what_was_trained(
    ranks: RankPools, tmp_path: Path, world_size: int, parallel: dict[str, Any], training: dict[str, Any]
) -> None:
    """Also after a validation and a checkpoint at every step, which change nothing."""
    pool, losses, saved = ranks(world_size), [], []
    for name, gather, interrupted in (("plain", False, False), ("gather", True, False), ("interrupted", True, True)):
        config = _config(parallel, gather=gather, **training)
        losses.append(pool.run(train_steps, config, STEPS, tmp_path / name, None, interrupted)[0])
        saved.append(dict(open_checkpoint(tmp_path / name)))
    for other, tensors in zip(losses[1:], saved[1:], strict=True):
        assert other == losses[0]
        assert tensors.keys() == saved[0].keys()
        assert [name for name, value in tensors.items() if not torch.equal(value, saved[0][name])] == []


def weights_seen(start: Start, config: RunConfig) -> list[str]:
    """Names of the weights that a reader of the model finds to differ between two ranks after a step."""
    with start.topology(config.parallel) as topology:
        seed_all(config.training.seed)
        model = build_parallel_model(config, topology)
        batches = micro_batches(config.model, 2)[topology.dp_rank :: topology.dp_size]
        train_step(model, batches, config=config, topology=topology, step=0)
        differing = []
        for name, weight in ((n, p.detach()) for chunk in model.chunks for n, p in chunk.named_parameters()):
            theirs = weight.clone()
            torch.distributed.broadcast(theirs, src=0, group=topology.dp_group)
            differing += [] if torch.equal(weight, theirs) else [name]
        return differing


def test_a_reader_of_the_model_finds_the_same_weights_on_every_rank(ranks: RankPools) -> None:
    assert ranks(2).run(weights_seen, _config({}, gather=True)) == [[], []]
