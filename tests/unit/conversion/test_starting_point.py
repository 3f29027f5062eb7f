"""What stage 1 starts from: OpenCLIP's tower, rearranged; Qwen's language model as it is; a fresh resampler."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from megatron_vl.conversion.convert import check_model, export_folder, import_folder
from megatron_vl.conversion.starting_point import StartingModel, StartOptions, starting_model
from megatron_vl.errors import ConversionError
from tests.unit.conversion.samples import random_state, read_with_libraries, small_model

MODEL = small_model()  # vision 2 x 24 with 3 heads, table of 6 x 6; language 3 x 32
WIDTH, FFN, CELLS = MODEL.vision.hidden_size, MODEL.vision.ffn_hidden_size, MODEL.vision.position_grid**2
OPTIONS = StartOptions(vision_heads=3, num_queries=4, num_bpe_tokens=256, image_size=MODEL.image_size, seed=7)


def openclip() -> dict[str, Tensor]:
    """A vision tower and the beginnings of a text tower under OpenCLIP's names, in fp32."""
    generator = torch.Generator().manual_seed(1)
    shapes: dict[str, tuple[int, ...]] = {
        "visual.class_embedding": (WIDTH,),
        "visual.positional_embedding": (CELLS + 1, WIDTH),
        "visual.proj": (WIDTH, 16),
        "visual.conv1.weight": (WIDTH, 3, 14, 14),
        "positional_embedding": (77, 16),
        "text_projection": (16, 16),
        "logit_scale": (),
        "token_embedding.weight": (100, 16),
        "ln_final.weight": (16,),
        "transformer.resblocks.0.mlp.c_fc.weight": (64, 16),
    }
    for norm in ("ln_pre", "ln_post"):
        shapes |= {f"visual.{norm}.weight": (WIDTH,), f"visual.{norm}.bias": (WIDTH,)}
    for layer in range(MODEL.vision.num_layers):
        block = f"visual.transformer.resblocks.{layer}"
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"{block}.{norm}.weight": (WIDTH,), f"{block}.{norm}.bias": (WIDTH,)}
        for name, rows, columns in (
            ("attn.in_proj_", 3 * WIDTH, WIDTH),
            ("attn.out_proj.", WIDTH, WIDTH),
            ("mlp.c_fc.", FFN, WIDTH),
            ("mlp.c_proj.", WIDTH, FFN),
        ):
            shapes |= {f"{block}.{name}weight": (rows, columns), f"{block}.{name}bias": (rows,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture
def vision_file(tmp_path: Path) -> Path:
    torch.save(openclip(), tmp_path / "open_clip_pytorch_model.bin")
    return tmp_path / "open_clip_pytorch_model.bin"


@pytest.fixture
def language_folder(tmp_path: Path) -> Path:
    """Qwen: what Qwen-VL's folder holds, without ``visual``."""
    export_folder(random_state(MODEL), MODEL, tmp_path / "qwen_vl")
    tensors = read_with_libraries(tmp_path / "qwen_vl")
    config = json.loads((tmp_path / "qwen_vl/config.json").read_text())
    del config["visual"]
    (tmp_path / "qwen").mkdir()
    (tmp_path / "qwen/config.json").write_text(json.dumps(config))
    save_file({n: t for n, t in tensors.items() if ".visual." not in n}, tmp_path / "qwen/model.safetensors")
    return tmp_path / "qwen"


@pytest.fixture
def start(vision_file: Path, language_folder: Path) -> StartingModel:
    return starting_model(vision_file, language_folder, OPTIONS)


def test_the_parts_make_a_sound_model(start: StartingModel) -> None:
    heads = replace(MODEL.resampler, num_attention_heads=1)  # one for every 128 features, but at least one
    assert start.model == replace(MODEL, init_method_std=0.02, resampler=heads)
    check_model(start, start.model)
    assert {start[name].dtype for name in start} == {start.dtype(name) for name in start} == {torch.bfloat16}
    assert start.num_bytes == sum(tensor.nbytes for tensor in start.values())


def test_the_language_model_is_qwens(start: StartingModel, language_folder: Path) -> None:
    imported = import_folder(language_folder.parent / "qwen_vl")
    names = [name for name in start if name.startswith("language_model.")]
    assert names and all(torch.equal(start[name], imported[name]) for name in names)


def test_the_vision_tower_is_openclips(start: StartingModel) -> None:
    theirs = openclip()
    positions = theirs["visual.positional_embedding"][1:].bfloat16()
    assert torch.equal(start["vision.positional_embedding"], positions)
    fc1 = theirs["visual.transformer.resblocks.1.mlp.c_fc.weight"].bfloat16()
    assert torch.equal(start["vision.layers.1.mlp.linear_fc1.weight"], fc1)


def test_heads_are_what_openclips_attention_makes_of_them(start: StartingModel) -> None:
    """OpenCLIP's blocks attend with ``nn.MultiheadAttention``; ours split q, k and v of each head from one product."""
    prefix = "visual.transformer.resblocks.0.attn."
    reference = nn.MultiheadAttention(WIDTH, 3)
    names = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
    reference.load_state_dict({name: openclip()[prefix + name].bfloat16().float() for name in names})
    patches = torch.randn(5, 1, WIDTH, generator=torch.Generator().manual_seed(2))
    ours = {name: start[f"vision.layers.0.self_attention.{name}"].float() for name in QKV_AND_PROJECTION}
    heads = F.linear(patches[:, 0], ours["linear_qkv.weight"], ours["linear_qkv.bias"]).view(5, 3, 3, WIDTH // 3)
    query, key, value = (heads[:, :, part].transpose(0, 1) for part in range(3))
    context = F.scaled_dot_product_attention(query, key, value).transpose(0, 1).reshape(5, WIDTH)
    found = F.linear(context, ours["linear_proj.weight"], ours["linear_proj.bias"])
    expected = reference(patches, patches, patches)[0][:, 0]
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()  # a few steps of fp32, 6e-8 each


QKV_AND_PROJECTION = ("linear_qkv.weight", "linear_qkv.bias", "linear_proj.weight", "linear_proj.bias")


def test_the_resampler_is_fresh(start: StartingModel, vision_file: Path, language_folder: Path) -> None:
    query = start["resampler.query"].float()
    # Five standard errors of the deviation of so many normal numbers.
    assert query.std().item() == pytest.approx(0.02, rel=5 / (2 * query.numel()) ** 0.5)
    assert torch.equal(start["resampler.attn.in_proj_bias"], torch.zeros(96, dtype=torch.bfloat16))
    assert torch.equal(start["resampler.ln_kv.weight"], torch.ones(32, dtype=torch.bfloat16))
    positions = start["resampler.pos_embed"].float()
    assert positions[0].tolist() == [*[0.0] * 8, *[1.0] * 8] * 2  # sin 0 and cos 0, for the column and for the row
    assert positions[1][0].item() == pytest.approx(0.84147, abs=2**-9)  # sin 1 in bf16: column 1 comes first
    other = starting_model(vision_file, language_folder, StartOptions(3, 4, 256, MODEL.image_size, seed=8))
    assert not torch.equal(other["resampler.query"], start["resampler.query"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"visual.conv1.weight": None}, "no vision transformer of OpenCLIP .*conv1.weight"),
        ({"visual.attnpool.q": torch.ones(2)}, "unexpected visual.attnpool.q"),
        ({"visual.ln_pre.bias": None}, "lacks visual.ln_pre.bias"),
        ({"visual.ln_pre.bias": torch.ones(25)}, r"ln_pre.bias has the shape \[25\]; expected \[24\]"),
        ({"visual.positional_embedding": torch.ones(36, WIDTH)}, "has 35 cells; expected a square and one"),
    ],
)
def test_other_vision_files_are_refused(
    vision_file: Path, language_folder: Path, change: dict[str, Tensor | None], message: str
) -> None:
    tensors = {name: tensor for name, tensor in (openclip() | change).items() if tensor is not None}
    torch.save(tensors, vision_file)
    with pytest.raises(ConversionError, match=message):
        starting_model(vision_file, language_folder, OPTIONS)


def test_values_that_are_not_finite(vision_file: Path, language_folder: Path) -> None:
    torch.save(openclip() | {"visual.ln_pre.bias": torch.full((WIDTH,), float("nan"))}, vision_file)
    with pytest.raises(ConversionError, match=r"open_clip_pytorch_model.bin: visual.ln_pre.bias has 24 values"):
        starting_model(vision_file, language_folder, OPTIONS)["vision.ln_pre.bias"]


def test_wrong_number_of_heads(vision_file: Path, language_folder: Path) -> None:
    with pytest.raises(ConversionError, match="heads of 'visual' do not divide its width"):
        starting_model(vision_file, language_folder, StartOptions(5, 4, 256, MODEL.image_size, seed=7))


def test_qwen_vl_is_not_qwen(vision_file: Path, language_folder: Path) -> None:
    with pytest.raises(ConversionError, match=r"has the unexpected transformer\.visual"):
        starting_model(vision_file, language_folder.parent / "qwen_vl", OPTIONS)
