"""The schedule's values, and which parameter learns at which multiple of it and with how much weight decay."""

from __future__ import annotations

import math
from typing import Any

import pytest

from megatron_vl.config.schema import OptimizerConfig, RunConfig
from megatron_vl.training.optimizer import layer_multiplier, learning_rate, set_groups
from megatron_vl.training.parallel_model import build_parallel_model
from tests.helpers.ranks import RankPools, Start
from tests.helpers.tiny import MODEL, tiny_config


def _rates(steps: list[int], **fields: Any) -> list[float]:
    config = OptimizerConfig(lr=1.0, min_lr=0.2, **fields)
    return [learning_rate(step, config, train_iters=110) for step in steps]


def test_warm_up_is_linear_and_starts_above_zero() -> None:
    assert _rates([0, 1, 4, 9, 10], lr_warmup_iters=10) == pytest.approx([0.1, 0.2, 0.5, 1.0, 1.0])
    assert _rates([0]) == [1.0], "without warm-up the first update has the peak"


@pytest.mark.parametrize(
    ("style", "middle", "quarter", "end"),
    [
        ("cosine", 0.6, 0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi / 4)), 0.2),
        ("linear", 0.6, 0.8, 0.2),
        ("constant", 1.0, 1.0, 1.0),
    ],
)
def test_decay_runs_from_the_end_of_the_warm_up_to_the_minimum(
    style: Any, middle: float, quarter: float, end: float
) -> None:
    steps = [60, 35, 110, 5000]
    assert _rates(steps, lr_decay_style=style, lr_warmup_iters=10) == pytest.approx([middle, quarter, end, end])


def test_decay_may_be_longer_or_shorter_than_the_run() -> None:
    assert _rates([50], lr_decay_style="linear", lr_decay_iters=50) == pytest.approx([0.2])
    assert _rates([110], lr_decay_style="linear", lr_decay_iters=220) == pytest.approx([0.6])
    assert _rates([9, 10], lr_decay_iters=10, lr_warmup_iters=10) == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize(
    ("name", "power"),
    [
        ("vision.layers.47.mlp.linear_fc1.weight", 1),
        ("vision.layers.40.input_layernorm.bias", 8),
        ("vision.layers.0.self_attention.linear_qkv.weight", 48),
        ("vision.patch_embed.weight", 49),
        ("vision.positional_embedding", 49),
        ("vision.ln_pre.bias", 49),
        ("resampler.proj", 0),
        ("resampler.ln_post.weight", 0),
        ("language_model.layers.0.mlp.linear_fc1.weight", 0),
        ("language_model.embedding.word_embeddings.weight", 0),
    ],
)
def test_layers_further_from_the_head_learn_more_slowly(name: str, power: int) -> None:
    assert layer_multiplier(name, num_layers=48, decay=0.95) == 0.95**power


def _settings_on_rank(start: Start, config: RunConfig, step: int) -> dict[str, tuple[float, float]]:
    """Learning rate and weight decay of every parameter, as the built optimizer would apply them at ``step``.

    Under no name: the smallest and the largest rate that are reported.
    """
    with start.topology(config.parallel) as topology:
        model = build_parallel_model(config, topology)
        rates = set_groups(model.optimizer, config, step)
        names = {id(parameter): name for chunk in model.chunks for name, parameter in chunk.named_parameters()}
        found = {
            names[id(parameter)]: (group["lr"], group["weight_decay"])
            for group in model.optimizer.param_groups
            for parameter in group["params"]
        }
        return found | {"": (rates.smallest, rates.largest)}


@pytest.mark.parametrize("decay", [0.5, 1.0])
def test_the_built_optimizer_applies_them(ranks: RankPools, decay: float) -> None:
    fields = {"lr": 1.0, "min_lr": 0.1, "lr_decay_style": "linear", "weight_decay": 0.05, "vision_layer_decay": decay}
    found = ranks(1).run(_settings_on_rank, tiny_config(optimizer=fields, training={"train_iters": 10}), 5)[0]
    assert found.pop("") == pytest.approx((0.55 * decay**5, 0.55))
    assert len(found) == 4 + 4 * 12 + 13 + 1 + 4 * 7 + 2, "every parameter is in one group"
    for name, (rate, weight_decay) in found.items():
        multiple = layer_multiplier(name, num_layers=MODEL.vision.num_layers, decay=decay)
        assert rate == pytest.approx(0.55 * multiple), name
        is_vector = name.endswith("bias") or "norm" in name or ".ln_" in name
        assert weight_decay == (0.0 if is_vector else 0.05), name
    assert (found["vision.positional_embedding"][0] < 0.1) == (decay == 0.5)


def test_a_position_table_that_trains_decays_and_learns_like_the_resampler(ranks: RankPools) -> None:
    config = tiny_config(
        training={"freeze_vision": True, "legacy_finetune_freezing": True},
        optimizer={"lr": 1.0, "weight_decay": 0.1, "vision_layer_decay": 0.5},
    )
    found = ranks(1).run(_settings_on_rank, config, 0)[0]
    assert found["resampler.pos_embed"] == found["resampler.query"] == (1.0, 0.1)
    assert not {"resampler.proj", "resampler.ln_post.weight", "resampler.ln_post.bias"} & found.keys()


def test_frozen_parameters_are_in_no_group(ranks: RankPools) -> None:
    config = tiny_config(training={"freeze_vision": True, "freeze_resampler": True})
    names = ranks(1).run(_settings_on_rank, config, 0)[0].keys() - {""}
    assert names and all(name.startswith("language_model.") for name in names)
