"""Against numbers computed independently from the published sizes (2 operations per multiply-add)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_vl.config.presets import PRESETS
from megatron_vl.config.schema import ModelConfig, TrainingConfig
from megatron_vl.planning.flops import (
    FrozenParts,
    Work,
    step_flops,
    training_flops,
    unit_flops,
)

QWEN_VL = PRESETS["qwen_vl_7b"]
ALL_FROZEN = FrozenParts(vision=True, resampler=True, language_model=True)
"""So that only the forward pass is left."""
TERA = 1e12


def row(num_images: int) -> Work:
    """2,048 tokens in four spans, all supervised."""
    return Work(num_images, 2048, 4 * 512**2, 2048)


def at(image_size: int) -> ModelConfig:
    return replace(QWEN_VL, image_size=image_size)


@pytest.mark.parametrize(("image_size", "vision", "resampler"), [(448, 4.106, 0.1127), (224, 0.964, 0.0475)])
def test_forward_of_an_image(image_size: int, vision: float, resampler: float) -> None:
    flops = training_flops(at(image_size), ALL_FROZEN, Work(1, 0, 0, 0))
    assert (48 * flops.vision_layer + flops.patch_embed) / TERA == pytest.approx(vision, abs=5e-4)
    assert flops.resampler / TERA == pytest.approx(resampler, abs=5e-5)
    assert flops.language_layer == flops.head == 0


def test_forward_of_a_row_of_text() -> None:
    linear = training_flops(QWEN_VL, ALL_FROZEN, Work(0, 2048, 0, 0))
    assert 32 * linear.language_layer / TERA == pytest.approx(26.53, abs=5e-3)
    assert 32 * training_flops(QWEN_VL, ALL_FROZEN, Work(0, 0, 2048**2, 0)).language_layer / TERA == pytest.approx(
        1.10, abs=5e-3
    )
    assert training_flops(QWEN_VL, ALL_FROZEN, Work(0, 0, 0, 2048)).head / TERA == pytest.approx(2.55, abs=5e-3)


@pytest.mark.parametrize(
    ("image_size", "frozen", "totals"),
    [
        (224, FrozenParts(language_model=True), {0: 59.0, 1: 62.0, 2: 65.0, 4: 71.1, 6: 77.2, 7: 80.2}),
        (448, FrozenParts(language_model=True), {0: 59.0, 1: 71.6, 2: 84.3, 4: 109.6, 6: 134.9, 7: 147.6}),
        (448, FrozenParts(), {0: 88.0, 1: 100.7, 2: 113.4, 4: 138.7, 6: 164.0, 7: 176.6}),
        (448, FrozenParts(vision=True), {0: 88.0, 1: 92.5, 2: 96.9, 4: 105.8, 6: 114.6, 7: 119.1}),
    ],
)
def test_training_totals_of_the_recipe_stages(image_size: int, frozen: FrozenParts, totals: dict[int, float]) -> None:
    for num_images, total in totals.items():
        assert step_flops(at(image_size), frozen, row(num_images)) / TERA == pytest.approx(total, abs=0.06)


def test_backward_of_each_kind_of_part() -> None:
    forward = training_flops(QWEN_VL, ALL_FROZEN, row(3))
    trained = training_flops(QWEN_VL, FrozenParts(), row(3))
    assert trained.vision_layer == 3 * forward.vision_layer
    assert trained.patch_embed == 2 * forward.patch_embed
    assert trained.resampler == 3 * forward.resampler
    assert trained.head == 3 * forward.head
    frozen_tower = training_flops(QWEN_VL, FrozenParts(vision=True), row(3))
    assert frozen_tower.vision_layer == forward.vision_layer
    kv_proj = 3 * 2 * 1024 * 1664 * 4096
    assert frozen_tower.resampler == 3 * forward.resampler - kv_proj
    passing = training_flops(QWEN_VL, FrozenParts(language_model=True), replace(row(3), sum_squared_spans=0))
    assert passing.language_layer == 2 * training_flops(QWEN_VL, ALL_FROZEN, Work(0, 2048, 0, 0)).language_layer
    assert passing.head == 2 * forward.head


def test_frozen_language_model_after_frozen_adapter_has_no_backward() -> None:
    frozen = training_flops(QWEN_VL, FrozenParts(vision=True, resampler=True), row(2))
    forward = training_flops(QWEN_VL, ALL_FROZEN, row(2))
    assert frozen.resampler == forward.resampler and frozen.language_layer == 3 * forward.language_layer


def test_work_adds_up() -> None:
    total = Work(1, 100, 5000, 7) + Work(2, 50, 2500, 3)
    assert total == Work(3, 150, 7500, 10)
    model, frozen = PRESETS["tiny"], FrozenParts(language_model=True)
    parts = step_flops(model, frozen, Work(1, 100, 5000, 7)) + step_flops(model, frozen, Work(2, 50, 2500, 3))
    assert step_flops(model, frozen, total) == parts


def test_units_follow_the_line() -> None:
    units = unit_flops(PRESETS["tiny"], FrozenParts(), Work(2, 256, 256**2, 100))
    assert len(units) == 3 + 1 + 3 + 1
    assert units[0] > units[1] == units[2] and units[4] == units[5] == units[6]


def test_frozen_parts_of_a_run() -> None:
    assert FrozenParts.of(TrainingConfig(freeze_language_model=True)) == FrozenParts(language_model=True)
    assert FrozenParts.of(TrainingConfig(freeze_vision=True, freeze_resampler=True)) == FrozenParts(True, True)


def test_the_released_script_s_frozen_projection_has_no_weight_gradient() -> None:
    paper = training_flops(QWEN_VL, FrozenParts(vision=True), row(3))
    legacy = training_flops(QWEN_VL, FrozenParts(vision=True, resampler_output=True), row(3))
    assert paper.resampler - legacy.resampler == 3 * 2 * 256 * 4096**2
    assert replace(legacy, resampler=paper.resampler) == paper
    assert FrozenParts.of(TrainingConfig(freeze_vision=True, legacy_finetune_freezing=True)).resampler_output
