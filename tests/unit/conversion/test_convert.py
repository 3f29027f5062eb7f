from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_vl.config.presets import PRESETS
from megatron_vl.conversion.convert import (
    ExportOptions,
    ImportedModel,
    check_model,
    export_folder,
    import_folder,
)
from megatron_vl.conversion.hf_files import FileFormat
from megatron_vl.errors import ConversionError
from megatron_vl.planning.parameters import model_tensors

from .samples import GOLDEN, State, assert_same_bytes, random_state, read_with_libraries, small_model


@pytest.mark.parametrize("file_format", ["safetensors", "bin"])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 3_000_000])
def test_golden_round_trip(
    golden: ImportedModel,
    golden_tensors: dict[str, Tensor],
    tmp_path: Path,
    file_format: FileFormat,
    max_shard_bytes: int,
) -> None:
    sizes: list[int] = []
    options = ExportOptions(file_format=file_format, max_shard_bytes=max_shard_bytes)
    total = export_folder(golden, golden.model, tmp_path / "out", options=options, progress=sizes.append)
    assert total == sum(sizes) == golden.num_bytes == 8_699_904
    assert_same_bytes(read_with_libraries(tmp_path / "out"), golden_tensors)
    assert json.loads((tmp_path / "out/config.json").read_text()) == json.loads((GOLDEN / "config.json").read_text())
    again = import_folder(tmp_path / "out")
    assert again.model == golden.model
    assert_same_bytes(dict(again), dict(golden))
    assert len(list((tmp_path / "out").glob(f"*.{file_format}"))) == (3 if max_shard_bytes < 10**9 else 1)


def test_imported_tensors_are_ours(golden: ImportedModel, golden_tensors: dict[str, Tensor]) -> None:
    assert list(golden) == [spec.name for spec in model_tensors(golden.model)]
    for name in golden:
        assert tuple(golden[name].shape) == golden.spec(name).shape
        assert golden[name].dtype == golden.dtype(name) == torch.bfloat16
    c_attn = golden_tensors["transformer.h.2.attn.c_attn.weight"].view(3, 4, 64, 256)
    ours = golden["language_model.layers.2.self_attention.linear_qkv.weight"].view(4, 3, 64, 256)
    assert torch.equal(ours[1, 2], c_attn[2, 1])  # v of head 1
    bias = golden_tensors["transformer.h.3.attn.c_attn.bias"].view(3, 4, 64)
    ours = golden["language_model.layers.3.self_attention.linear_qkv.bias"].view(4, 3, 64)
    assert torch.equal(ours[2, 1], bias[1, 2])  # k of head 2
    fc1 = golden["language_model.layers.2.mlp.linear_fc1.weight"]
    assert torch.equal(fc1[:512], golden_tensors["transformer.h.2.mlp.w2.weight"])
    in_proj = "transformer.visual.transformer.resblocks.3.attn.in_proj.weight"
    assert torch.equal(golden["vision.layers.3.self_attention.linear_qkv.weight"], golden_tensors[in_proj])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_other_sizes_and_types(tmp_path: Path, dtype: torch.dtype) -> None:
    model = small_model()
    state = random_state(model, dtype=dtype)
    export_folder(state, model, tmp_path / "out", options=ExportOptions(file_format="bin", max_shard_bytes=40_000))
    imported = import_folder(tmp_path / "out")
    assert imported.model == model
    assert_same_bytes(dict(imported), state)


def test_mixed_types_stay_mixed(tmp_path: Path) -> None:
    model = small_model()
    state = random_state(model)
    state["vision.ln_pre.weight"] = state["vision.ln_pre.weight"].float()
    export_folder(state, model, tmp_path / "out")
    assert_same_bytes(dict(import_folder(tmp_path / "out")), state)


def test_vocabulary_padding_stays_behind(tmp_path: Path) -> None:
    model = small_model()
    state = random_state(model)
    padded = State(state)
    for name in ("language_model.embedding.word_embeddings.weight", "language_model.output_layer.weight"):
        padded[name] = torch.cat([state[name], torch.full((256, 32), 7.0, dtype=torch.bfloat16)])
    export_folder(padded, model, tmp_path / "out", options=ExportOptions(file_format="bin"))
    assert_same_bytes(dict(import_folder(tmp_path / "out")), state)
    size = sum(tensor.numel() * 2 for tensor in state.values())
    written = (tmp_path / "out/pytorch_model-00001-of-00001.bin").stat().st_size
    assert written < size + 40_000  # views are not written whole


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True; Qwen-VL has False"),
        ({"visual": None}, "no section 'visual'"),
        ({"quantization_config": {"bits": 4}}, "describes quantized weights"),
        ("fewer ranks", "its tokenizer is not the model's"),
    ],
)
def test_a_reference_of_another_model_is_refused(
    golden: ImportedModel, tmp_path: Path, changes: Any, message: str
) -> None:
    config = json.loads((GOLDEN / "config.json").read_text())
    if changes == "fewer ranks":
        changes = {"visual": config["visual"] | {"image_start_id": config["visual"]["image_start_id"] - 1}}
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ConversionError, match=message):
        export_folder(golden, golden.model, tmp_path / "hf", options=ExportOptions(reference=tmp_path))
    assert not (tmp_path / "hf").exists()


def test_an_export_goes_where_a_link_leads(
    golden: ImportedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("disk", "here"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    export_folder(golden, golden.model, tmp_path / "link")
    monkeypatch.chdir(tmp_path / "here")
    export_folder(golden, golden.model, Path("."))
    for name in ("disk", "here", "link"):
        assert len(import_folder(tmp_path / name)) == len(golden)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "here", "link"]
    with pytest.raises(ConversionError, match="is a mount point"), monkeypatch.context() as patch:
        patch.setattr(Path, "is_mount", lambda self: self.name == "mounted")
        export_folder(golden, golden.model, tmp_path / "mounted")


def test_reference_and_tokenizer_files_come_along(golden: ImportedModel, tmp_path: Path) -> None:
    reference = tmp_path / "imported"
    reference.mkdir()
    auto_map = {"AutoConfig": "configuration_qwen.QWenConfig"}
    config = json.loads((GOLDEN / "config.json").read_text()) | {"auto_map": auto_map}
    (reference / "config.json").write_text(json.dumps(config))
    (reference / "modeling_qwen.py").write_text("# code of the hub\n")
    (reference / "pytorch_model.bin").write_bytes(b"weights that must not be copied")
    (reference / "qwen.tiktoken").write_text("IQ== 0\n")
    options = ExportOptions(reference=reference, release="chat")
    export_folder(golden, golden.model, tmp_path / "out", options=options)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
        "modeling_qwen.py",
        "qwen.tiktoken",
    ]
    assert json.loads((tmp_path / "out/config.json").read_text()) == config
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["chat_format"] == "chatml"


def test_tiny_preset_keeps_its_name(tmp_path: Path) -> None:
    tiny = PRESETS["tiny"]
    export_folder(random_state(tiny), tiny, tmp_path / "out")
    assert import_folder(tmp_path / "out").model == tiny


def _drop(state: State) -> None:
    del state["resampler.proj"]


def _add(state: State) -> None:
    state["vision.ln_post.weight"] = torch.ones(3)


def _reshape(state: State) -> None:
    state["resampler.query"] = state["resampler.query"].T


def _shorten_vocabulary(state: State) -> None:
    state["language_model.output_layer.weight"] = state["language_model.output_layer.weight"][:500]


def _diverge(state: State) -> None:
    state["language_model.final_layernorm.weight"][3] = float("nan")


def _quantise(state: State) -> None:
    state["resampler.proj"] = state["resampler.proj"].to(torch.int8)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_drop, "lacks resampler.proj"),
        (_add, "has the unexpected vision.ln_post.weight"),
        (_reshape, r"resampler.query has the shape \[32, 4\]; expected \[4, 32\]"),
        (_shorten_vocabulary, r"output_layer.weight has the shape \[500, 32\]"),
        (_diverge, "final_layernorm.weight has 1 values that are not finite"),
        (_quantise, "resampler.proj is torch.int8"),
    ],
)
def test_unsound_model_is_not_exported(tmp_path: Path, damage: Callable[[State], None], message: str) -> None:
    model = small_model()
    state = random_state(model)
    check_model(state, model)
    damage(state)
    with pytest.raises(ConversionError, match=message):
        check_model(state, model)
    with pytest.raises(ConversionError, match=message):
        export_folder(state, model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_left_alone(golden: ImportedModel, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    with pytest.raises(ConversionError, match="exists and is not empty"):
        export_folder(golden, golden.model, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["precious"]
