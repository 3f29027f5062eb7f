"""The recipes in examples/: what they resolve to, and what the paper says of the three stages."""

from __future__ import annotations

import pytest

from megatron_vl.config.load import load_config
from megatron_vl.config.presets import PRESETS
from megatron_vl.config.schema import RunConfig
from megatron_vl.config.validate import validate
from tests.golden.regenerate import GOLDEN, ROOT, recipes, resolved


def qwen_vl(name: str) -> RunConfig:
    return load_config(ROOT / "examples" / "qwen_vl" / f"{name}.yaml")


@pytest.mark.parametrize("name", recipes())
def test_resolved_recipe_is_the_golden_one(name: str) -> None:
    assert resolved(recipes()[name]) == (GOLDEN / name).read_text(encoding="utf-8"), (
        "if the change is meant: python tests/golden/regenerate.py"
    )


def test_golden_files_have_a_recipe_each() -> None:
    assert {path.name for path in GOLDEN.glob("*.yaml")} == set(recipes())


@pytest.mark.parametrize("name", recipes())
def test_recipe_is_valid_where_its_header_runs_it(name: str) -> None:
    large = name.startswith("qwen_vl")
    validate(load_config(recipes()[name]), world_size=8 if large else 2, cuda=large)


@pytest.mark.parametrize("name", recipes())
def test_little_work_is_lost_when_a_recipe_dies(name: str) -> None:
    """It saves while it trains, and keeps a checkpoint to go back to when the newest one is damaged."""
    config = load_config(recipes()[name])
    assert config.checkpoint.save_interval and config.checkpoint.save_interval <= config.training.train_iters / 2
    assert config.checkpoint.keep_last and config.checkpoint.keep_last >= 2


@pytest.mark.parametrize(
    ("name", "iterations", "samples", "rates", "warmup", "decay", "image", "frozen"),
    [
        ("stage1_pretrain", 50_000, 30_720, (2e-4, 1e-6), 500, 0.95, 224, (False, False, True)),
        ("stage2_multitask", 19_000, 4_096, (5e-5, 1e-5), 400, 0.95, 448, (False, False, False)),
        ("stage3_sft", 8_000, 128, (1e-5, 1e-6), 3_000, 1.0, 448, (True, False, False)),
    ],
)
def test_table_8_of_the_paper(
    name: str,
    iterations: int,
    samples: int,
    rates: tuple[float, float],
    warmup: int,
    decay: float,
    image: int,
    frozen: tuple[bool, bool, bool],
) -> None:
    config = qwen_vl(name)
    training, optimizer = config.training, config.optimizer
    assert (training.train_iters, training.global_batch_samples) == (iterations, samples)
    assert (optimizer.lr, optimizer.min_lr) == rates
    assert (optimizer.lr_warmup_iters, optimizer.vision_layer_decay) == (warmup, decay)
    assert (optimizer.adam_beta1, optimizer.adam_beta2, optimizer.adam_eps) == (0.9, 0.98, 1e-6)
    assert (optimizer.weight_decay, optimizer.clip_grad, optimizer.lr_decay_style) == (0.05, 1.0, "cosine")
    assert (training.freeze_vision, training.freeze_resampler, training.freeze_language_model) == frozen
    assert (config.model.image_size, config.data.seq_length, training.bf16) == (image, 2048, True)


def test_only_stage_1_attends_by_segment() -> None:
    spans = [qwen_vl(name).data.attention_span for name in ("stage1_pretrain", "stage2_multitask", "stage3_sft")]
    assert spans == ["segment", "row", "row"]


@pytest.mark.parametrize("name", PRESETS)
def test_preset_names_itself_and_is_valid(name: str) -> None:
    config = load_config(None, ["--preset", name])
    assert config.model == PRESETS[name] and config.model.preset == name
    validate(config, world_size=1, cuda=False)
