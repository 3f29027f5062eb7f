"""A rehearsal asks for what real ranks of gloo ask for, and finds what does not fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_vl.config.schema import RunConfig
from megatron_vl.planning.layout import resolve_layout
from megatron_vl.planning.rows import make_row
from megatron_vl.rehearsal.places import Place
from megatron_vl.rehearsal.run import Outcome, Rehearsal
from megatron_vl.rehearsal.step import Step
from tests.helpers.ranks import RankPools, Start
from tests.helpers.tiny import tiny_config
from tests.unit.rehearsal.spied import program_and_rehearsal

TENSOR, PIPELINE, VIRTUAL = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
)
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tp2-sp-pp2": ({TENSOR: 2, PIPELINE: 2, "sequence_parallel": True}, {}),
    "pp2-dp2-sharded": (
        {PIPELINE: 2, "use_distributed_optimizer": True, "overlap_grad_reduce": True},
        {"freeze_language_model": True},
    ),
    "pp2-vp2-dp2": ({PIPELINE: 2, VIRTUAL: 2}, {"freeze_vision": True}),
    "vision-tp2-pp2": ({TENSOR: 2, PIPELINE: 2, "vision_parallel": "data", "vision_micro_batch_size": 2}, {}),
}


def rehearsal_of(parallel: dict[str, Any], training: dict[str, Any], world_size: int) -> Rehearsal:
    """A rehearsal of the small model, with 3, 0, 3 and 3 images in its micro-batches."""
    config: RunConfig = tiny_config(parallel=parallel, training={"global_batch_size": 64, **training})
    return Rehearsal.of(config, resolve_layout(config), make_row(config, images=1.5, samples=2), world_size)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_rehearsal_asks_for_what_real_ranks_ask_for(ranks: RankPools, name: str) -> None:
    rehearsal = rehearsal_of(*LAYOUTS[name], world_size=4)
    for real, rehearsed, place in ranks(4).run(program_and_rehearsal, dict(rehearsal.steps), rehearsal.grid):
        assert len(real) > 50, place
        differing = [pair for pair in zip(real, rehearsed, strict=False) if pair[0] != pair[1]]
        assert not differing and len(real) == len(rehearsed), f"{place}: {differing[:1]}"


OTHER_LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "one": (1, {}, {}),
    "tp4-sp-dp2": (
        8,
        {TENSOR: 4, "sequence_parallel": True, "use_distributed_optimizer": True},
        {"freeze_vision": True},
    ),
    "pp8": (8, {PIPELINE: 8}, {"freeze_vision": True}),
    "pp4-dp2-overlap": (
        8,
        {
            PIPELINE: 4,
            "use_distributed_optimizer": True,
            "overlap_grad_reduce": True,
            "overlap_param_gather": True,
        },
        {"freeze_language_model": True},
    ),
    "pp4-vp2-dp2": (8, {PIPELINE: 4, VIRTUAL: 2, "use_distributed_optimizer": True}, {}),
    "vision-tp2-pp2-vp2-dp2": (
        8,
        {
            TENSOR: 2,
            PIPELINE: 2,
            VIRTUAL: 2,
            "sequence_parallel": True,
            "use_distributed_optimizer": True,
            "vision_parallel": "data",
        },
        {"freeze_vision": True},
    ),
}


def rehearse_here(_: Start, rehearsal: Rehearsal, others: dict[Place, Step]) -> Outcome:
    """A rehearsal in this process; ``others``: what some ranks do instead."""
    from megatron_vl.rehearsal.rank import memberships, rehearse_rank, said_by_all

    objects, grid = said_by_all(rehearsal.config), rehearsal.grid
    reports = [
        rehearse_rank(others.get(place, rehearsal.steps[place.data]), grid, place, objects)
        for place in rehearsal.places
    ]
    return rehearsal.judge(memberships(rehearsal.config, grid, range(grid.world_size)), reports)


@pytest.mark.parametrize("name", OTHER_LAYOUTS)
def test_layouts_that_train_have_no_fault(ranks: RankPools, name: str) -> None:
    world_size, parallel, training = OTHER_LAYOUTS[name]
    (outcome,) = ranks(1).run(rehearse_here, rehearsal_of(parallel, training, world_size), {})
    assert outcome.faults == ()
    assert outcome.lines[-1] == "every message and every collective finds its other side, and no rank waits for ever"


def test_a_rank_that_cuts_the_model_elsewhere_is_found(ranks: RankPools) -> None:
    """The second stage is started with another recipe: its layer 0 is the first stage's too."""
    rehearsal = rehearsal_of({PIPELINE: 2, "pipeline_layout": "V*4RL|L*3"}, {}, world_size=2)
    config = rehearsal.config
    other = replace(config, parallel=replace(config.parallel, pipeline_layout="V*4R|L*4"))
    step = replace(rehearsal.steps[0], config=other, layout=resolve_layout(other))
    (outcome,) = ranks(1).run(rehearse_here, rehearsal, {Place(0, 1, 0): step})
    faults = "\n".join(outcome.faults)
    assert "rank 0 asks for send of 64x1x64 float32, and rank 1 for receive of 4x3x64 float32" in faults
    assert "rank 1: parameters that train: planned" in faults


def test_a_rank_that_has_a_micro_batch_less_is_found(ranks: RankPools) -> None:
    rehearsal = rehearsal_of({PIPELINE: 2}, {}, world_size=2)
    fewer = replace(rehearsal.steps[0], images=rehearsal.steps[0].images[:-1])
    (outcome,) = ranks(1).run(rehearse_here, rehearsal, {Place(0, 1, 0): fewer})
    assert any("rank 0 comes to send" in fault and "rank 1 never does" in fault for fault in outcome.faults)
