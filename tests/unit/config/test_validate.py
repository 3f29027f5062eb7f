"""Each check refuses what it is there for, with keys and arithmetic, and accepts the nearest thing that works."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_vl.config.data_files import check_data_files, parse_data_path
from megatron_vl.config.fields import iterate_fields
from megatron_vl.config.load import apply_overrides, load_config
from megatron_vl.config.schema import RunConfig
from megatron_vl.config.validate import MAY_BE_ZERO, check_device, validate
from megatron_vl.errors import ConfigError

TP = "parallel.tensor_model_parallel_size"
PP = "parallel.pipeline_model_parallel_size"
VP = "parallel.virtual_pipeline_model_parallel_size"


def tiny(changes: dict[str, Any]) -> RunConfig:
    return apply_overrides(load_config(None, ["--preset", "tiny"]), changes)


REFUSED: list[tuple[dict[str, Any], int, list[str]]] = [
    ({"model.image_size": 85}, 1, ["image_size 85", "patch_size 14", "85 = 6 x 14 + 1"]),
    ({"model.resampler.num_queries": 15}, 1, ["num_queries 15", "9 and 16"]),
    ({"model.vision.num_attention_heads": 3}, 1, ["model.vision.num_attention_heads 3", "128 = 42 x 3 + 2"]),
    ({"model.resampler.num_attention_heads": 3}, 1, ["model.resampler.num_attention_heads 3", "128"]),
    ({"model.language.num_attention_heads": 3}, 1, ["model.language.num_attention_heads 3", "128"]),
    ({"model.language.num_attention_heads": 128}, 1, ["128 / 128 = 1", "even"]),
    ({"model.language.vocab_size": 2264}, 1, ["vocab_size 2264", "2265", "2048 + 217"]),
    ({TP: 3}, 3, ["num_attention_heads 4", "4 = 1 x 3 + 1"]),
    ({TP: 2, "model.language.ffn_hidden_size": 353}, 2, ["ffn_hidden_size 353", "353 = 176 x 2 + 1"]),
    ({"parallel.sequence_parallel": True}, 1, ["sequence_parallel", "tensor_model_parallel_size is 1"]),
    (
        {TP: 4, "parallel.sequence_parallel": True, "model.image_size": 42},
        4,
        ["9 patches", "3 x 3", "9 = 2 x 4 + 1"],
    ),
    ({TP: 2, "parallel.sequence_parallel": True, "data.seq_length": 2047}, 2, ["seq_length 2047", "1023 x 2 + 1"]),
    ({TP: 2}, 3, ["3 ranks", "2 x", "1 = 2 ranks", "not a multiple of 2"]),
    ({"training.global_batch_size": 9}, 2, ["9 rows", "micro_batch_size 1", "data-parallel size 2", "8 or 10"]),
    ({VP: 2}, 1, [VP, "pipeline_model_parallel_size is 1"]),
    ({VP: 1, PP: 2}, 2, [VP, "plain schedule"]),
    ({VP: 2, PP: 2, "training.global_batch_size": 3}, 2, ["multiples of", f"{PP} 2", "= 3"]),
    ({"parallel.overlap_param_gather": True}, 1, ["overlap_param_gather", "overlap_grad_reduce"]),
    (
        {
            "parallel.overlap_param_gather": True,
            "parallel.overlap_grad_reduce": True,
            "parallel.use_distributed_optimizer": False,
        },
        1,
        ["overlap_param_gather", "use_distributed_optimizer"],
    ),
    ({"parallel.backend": "transformer_engine"}, 1, ["transformer_engine", "CUDA"]),
    ({"data.seq_length": 18}, 1, ["seq_length 18", "16 + 2 markers + 1 token of text = 19"]),
    (
        {"training.freeze_vision": True, "training.freeze_resampler": True, "training.freeze_language_model": True},
        1,
        ["freeze_vision", "freeze_resampler", "freeze_language_model", "nothing is left"],
    ),
    (
        {"training.legacy_finetune_freezing": True},
        1,
        ["released fine-tuning script", "training.freeze_vision is false", "Set freeze_vision alone"],
    ),
    (
        {"training.legacy_finetune_freezing": True, "training.freeze_vision": True, "training.freeze_resampler": True},
        1,
        ["But training.freeze_resampler is true.", "position table"],
    ),
    (
        {"training.legacy_finetune_freezing": True, "training.freeze_language_model": True},
        1,
        ["training.freeze_vision is false and training.freeze_language_model is true"],
    ),
    ({"optimizer.lr_warmup_iters": 1001}, 1, ["lr_warmup_iters 1001", "train_iters 1000"]),
    (
        {"optimizer.lr_warmup_iters": 101, "optimizer.lr_decay_iters": 100},
        1,
        ["lr_warmup_iters 101", "lr_decay_iters 100"],
    ),
    ({"optimizer.min_lr": 1.0}, 1, ["min_lr 1", "lr 0.0001"]),
    ({"optimizer.adam_beta2": 1.0}, 1, ["adam_beta2", "below 1"]),
    ({"optimizer.vision_layer_decay": 1.5}, 1, ["vision_layer_decay", "1.5"]),
    (
        {"checkpoint.load": "a", "checkpoint.pretrained_checkpoint": "b"},
        1,
        ["checkpoint.load a", "checkpoint.pretrained_checkpoint b", "auto_resume"],
    ),
    (
        {"parallel.vision_micro_batch_size": 4},
        1,
        ["vision_micro_batch_size 4 has no effect", "add --vision-parallel data"],
    ),
    ({"parallel.vision_recompute": False}, 1, ["vision_recompute False has no effect"]),
    (
        {"parallel.vision_recompute_granularity": "layers"},
        1,
        ["granularity layers has no effect where the vision part"],
    ),
    (
        {
            "parallel.vision_parallel": "data",
            "parallel.vision_recompute": False,
            "parallel.vision_recompute_granularity": "layers",
        },
        1,
        ["granularity layers has no effect without parallel.vision_recompute"],
    ),
    ({"checkpoint.auto_resume": True}, 1, ["checkpoint.auto_resume", "checkpoint.save"]),
    ({"checkpoint.finetune": True}, 1, ["checkpoint.finetune", "checkpoint.load"]),
    ({"checkpoint.no_load_optim": True}, 1, ["checkpoint.no_load_optim", "checkpoint.load"]),
    ({"checkpoint.no_load_rng": True}, 1, ["checkpoint.no_load_rng", "checkpoint.load"]),
    ({"training.eval_interval": 5}, 1, ["eval_interval is 5", "valid_data_path"]),
]


@pytest.mark.parametrize(("changes", "world_size", "parts"), REFUSED)
def test_refused(changes: dict[str, Any], world_size: int, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(tiny(changes), world_size=world_size, cuda=False)
    assert all(part in str(caught.value) for part in parts), caught.value


@pytest.mark.parametrize(
    ("changes", "world_size"),
    [
        ({}, 1),
        ({}, 8),
        ({TP: 4, "parallel.sequence_parallel": True}, 8),
        ({TP: 2, PP: 2, VP: 2, "training.global_batch_size": 4}, 8),
        ({"training.global_batch_samples": 13, "training.global_batch_size": 3}, 2),
        ({"checkpoint.auto_resume": True, "checkpoint.save": "a", "checkpoint.pretrained_checkpoint": "b"}, 1),
        ({"checkpoint.load": "a", "checkpoint.finetune": True}, 1),
        ({"parallel.overlap_param_gather": True, "parallel.overlap_grad_reduce": True}, 2),
        ({"training.freeze_vision": True, "training.freeze_language_model": True}, 1),
        ({"optimizer.lr_warmup_iters": 1000, "optimizer.weight_decay": 0.0, "data.num_workers": 0}, 1),
        ({"data.seq_length": 19, "model.language.vocab_size": 2265}, 1),
    ],
)
def test_accepted(changes: dict[str, Any], world_size: int) -> None:
    validate(tiny(changes), world_size=world_size, cuda=False)


def test_numbers_below_their_range() -> None:
    numbers = [spec for spec in iterate_fields() if spec.shape.base in (int, float)]
    assert {spec.dotted for spec in numbers} >= MAY_BE_ZERO
    for spec in numbers:
        bad = spec.shape.base(-1 if spec.dotted in MAY_BE_ZERO else 0)
        with pytest.raises(ConfigError, match=f"{spec.dotted} is {bad}; expected a number"):
            validate(tiny({spec.dotted: bad}), world_size=1, cuda=False)


def test_parse_data_path() -> None:
    assert parse_data_path(()) == []
    assert parse_data_path(("a", "b")) == [(1.0, "a"), (1.0, "b")]
    assert parse_data_path(("0.7", "a", "3", "b")) == [(0.7, "a"), (3.0, "b")]


@pytest.mark.parametrize(
    ("items", "part"),
    [
        (("0.7", "a", "b"), "3 items"),
        (("2023",), "./2023"),
        (("a", "b", "2024"), "./2024"),
        (("0.7", "a", "b", "c"), "Item 3, 'b', is not a weight"),
        (("a", "0.7"), "Item 1, 'a', is not a weight"),
        (("0.7", "5"), "./5"),
        (("0", "a"), "above 0"),
        (("inf", "a"), "finite"),
        (("nan", "a"), "finite"),
    ],
)
def test_wrong_data_path(items: tuple[str, ...], part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_data_path(items, key="data.valid_data_path")
    assert part in str(caught.value) and "data.valid_data_path" in str(caught.value)


def test_a_data_set_without_its_manifest_is_unfinished(tmp_path: Path) -> None:
    (tmp_path / "a.tokens.bin").touch()
    with pytest.raises(ConfigError, match=r"^data\.data_path: .*a\.tokens\.bin is there, but .*a\.json, .* unfinished"):
        check_data_files(tiny({"data.data_path": (str(tmp_path / "a"),)}))


def test_a_data_set_that_is_called_by_a_number_is_never_a_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("2023", "2024", "mine"):
        Path(f"{name}.json").touch()
    for data_path in (("2023", "mine"), ("2023", "2024"), ("2023",)):
        with pytest.raises(ConfigError, match=r"data_path: 2023 is taken for a weight, but .* write \./2023"):
            check_data_files(tiny({"data.data_path": data_path}))
    check_data_files(tiny({"data.data_path": ("./2023", "./2024")}))
    check_data_files(tiny({"data.data_path": ("+2023", "mine", "7", "./2024")}))


def test_data_files(tmp_path: Path) -> None:
    (tmp_path / "a.json").touch()
    present, absent = str(tmp_path / "a"), str(tmp_path / "b")
    check_data_files(tiny({"data.data_path": (present,)}))
    for changes, hinted in (
        ({"data.data_path": ("0.5", present, "0.5", absent)}, False),
        ({"data.data_path": (present,), "data.valid_data_path": (absent,)}, False),
        ({"data.data_path": ()}, True),
        ({"data.data_path": ("runs/quickstart/data/none",)}, True),
    ):
        with pytest.raises(ConfigError) as caught:
            check_data_files(tiny(changes))
        assert ("examples/quickstart.sh" in str(caught.value) and "examples/tiny/" in str(caught.value)) == hinted
        assert hinted or f"{absent}.json" in str(caught.value)


def test_large_models_need_cuda() -> None:
    check_device(9_655_886_592, cuda=True)
    check_device(1_000_000_000, cuda=False)
    with pytest.raises(ConfigError, match="1,000,000,001 parameters.*CUDA"):
        check_device(1_000_000_001, cuda=False)
