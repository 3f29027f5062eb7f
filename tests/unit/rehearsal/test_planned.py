"""What is compared with the plan, with numbers that were computed by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_vl.planning.layout import resolve_layout
from megatron_vl.planning.parameters import parameters_by_rank
from megatron_vl.planning.rows import make_row
from megatron_vl.rehearsal.places import Grid
from megatron_vl.rehearsal.planned import Comparer
from megatron_vl.rehearsal.records import Rehearsed
from megatron_vl.rehearsal.step import Step, count_images
from tests.helpers.tiny import tiny_config
from tests.unit.rehearsal.made_up import rank, sent

PP2 = {"pipeline_model_parallel_size": 2}


def step_of(images: tuple[int, ...], **sections: dict[str, Any]) -> Step:
    config = tiny_config(**sections)
    return Step(config, resolve_layout(config), images)


def test_images_of_micro_batches_have_the_planned_mean_and_one_has_none() -> None:
    config = tiny_config(parallel=PP2)  # two rows a micro-batch, and at least four of these
    assert count_images(config, make_row(config, images=1.25, samples=1), 50) == (2, 0, 2, 3)
    assert count_images(config, make_row(config, images=1.25, samples=1), 3) == (2, 0, 2)
    # A row of 32 tokens holds 5 images of 4 queries and 2 markers, and a text.
    assert count_images(config, make_row(config, images=5, samples=1), 4) == (10, 0, 10, 10)
    more = tiny_config(parallel={"pipeline_model_parallel_size": 4})
    assert len(count_images(more, make_row(more, images=1, samples=1), 50)) == 8


def test_shapes_of_messages() -> None:
    """56 pixels are 4 x 4 patches of 14; 2 rows of 32 tokens; widths 32 and 64; 4 queries."""
    step = step_of((3, 0), parallel={"pipeline_model_parallel_size": 4, "pipeline_layout": "V*2|V*2R|L*2|L*2"})
    assert [step.output_shape(stage, 0) for stage in range(3)] == [(16, 3, 32), (4, 3, 64), (64, 1, 64)]
    assert step.output_shape(1, 1) == (4, 1, 64)  # text alone has a blank image
    divided = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "pipeline_layout": "V*2|V*2RL*4", **PP2}
    assert step_of((3,), parallel=divided).output_shape(0, 0) == (8, 3, 32)


def test_shapes_come_in_the_order_of_passes() -> None:
    """Rank 0 of two: both forward passes go first, and the second rank returns each gradient after its pass."""
    step = step_of((3, 0), parallel={**PP2, "pipeline_layout": "V*4R|L*4"})
    assert step.shapes_to(1) == {0: [(4, 3, 64), (4, 1, 64)], 1: []}
    assert step.shapes_to(0) == {0: [], 1: [(4, 3, 64), (4, 1, 64)]}


def test_a_stage_after_frozen_ones_returns_a_zero() -> None:
    cut = {**PP2, "pipeline_layout": "V*2|V*2RL*4"}
    assert step_of((3,), parallel=cut, training={"freeze_vision": True}).gradient_shape(1, 0) == (1, 1, 1)
    assert step_of((3,), parallel=cut, training={"freeze_language_model": True}).gradient_shape(1, 0) == (16, 3, 32)


@pytest.fixture
def compared() -> tuple[Comparer, Rehearsed]:
    """The first rank of two, with the right parameters, and messages of 4 x 3 x 64 and 4 x 1 x 64 fp32 numbers."""
    step = step_of((3, 0), parallel={**PP2, "pipeline_layout": "V*4R|L*4"})
    planned = parameters_by_rank(step.config, step.layout)[0]
    messages = [
        replace(sent(1, shape), num_bytes=4 * shape[0] * shape[1] * shape[2]) for shape in ((4, 3, 64), (4, 1, 64))
    ]
    one = rank(0, *messages)
    held = replace(one.held, trained=planned.trained, frozen=planned.frozen)
    return Comparer(step, Grid(tensor=1, data=1, pipeline=2)), replace(one, held=held)


def test_a_rank_as_planned_agrees(compared: tuple[Comparer, Rehearsed]) -> None:
    comparer, one = compared
    found = {str(item) for item in comparer.compare(one)}
    assert "rank 0: bytes to pipeline rank 1: planned 4,096, found 4,096" in found
    assert all(item.agrees for item in comparer.compare(one))


def test_other_parameters_are_found_with_both_numbers(compared: tuple[Comparer, Rehearsed]) -> None:
    comparer, one = compared
    other = replace(one, held=replace(one.held, trained=one.held.trained + 1))
    differing = [str(item) for item in comparer.compare(other) if not item.agrees]
    right = one.held.trained
    assert differing == [f"rank 0: parameters that train: planned {right:,}, found {right + 1:,}"]


def test_another_message_is_found_with_both_numbers(compared: tuple[Comparer, Rehearsed]) -> None:
    comparer, one = compared
    differing = [str(item) for item in comparer.compare(replace(one, program=one.program[:1])) if not item.agrees]
    assert differing == ["rank 0: bytes to pipeline rank 1: planned 4,096, found 3,072"]
