"""Rules of FP8: each refuses what it is there for, with the arithmetic, and accepts the nearest thing that works."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest

from megatron_vl.config.load import apply_overrides, load_config
from megatron_vl.config.schema import RunConfig
from megatron_vl.config.validate import validate
from megatron_vl.errors import ConfigError

RECIPES = Path(__file__).resolve().parents[3] / "examples" / "qwen_vl"
TP, SP = "parallel.tensor_model_parallel_size", "parallel.sequence_parallel"
FORMAT, RECIPE, PARTS = "training.fp8_format", "training.fp8_recipe", "training.fp8_parts"
EDGES, FIRST, LAST = (
    "training.first_last_layers_bf16", "training.num_layers_at_start_in_bf16", "training.num_layers_at_end_in_bf16",
)  # fmt: skip
HYBRID = {FORMAT: "hybrid", "training.bf16": True}
BOTH = HYBRID | {PARTS: "both"}
TALL = BOTH | {"model.image_size": 112}
"""8 x 8 patches."""


def tiny(changes: dict[str, Any]) -> RunConfig:
    """Widths 128, vision ffn 512, language ffn 352; 4 heads; images of 6 x 6 patches; rows of 2,048 tokens."""
    return apply_overrides(load_config(None, ["--preset", "tiny"]), changes)


REFUSED: list[tuple[dict[str, Any], list[str]]] = [
    ({RECIPE: "mxfp8"}, ["training.fp8_recipe mxfp8 has no effect without training.fp8_format", "--fp8-format hybrid"]),
    ({PARTS: "both"}, ["training.fp8_parts both has no effect"]),
    ({EDGES: True}, ["training.first_last_layers_bf16 True has no effect without training.fp8_format"]),
    (HYBRID | {FIRST: 2}, ["num_layers_at_start_in_bf16 2 has no effect", "add --first-last-layers-bf16"]),
    (HYBRID | {LAST: 0}, ["num_layers_at_end_in_bf16 0 has no effect", "add --first-last-layers-bf16"]),
    ({FORMAT: "e4m3"}, ["training.fp8_format is e4m3, but training.bf16 is false", "add --bf16"]),
    (HYBRID | {"parallel.backend": "local"}, ["backend is local", "--backend transformer_engine"]),
    (HYBRID | {EDGES: True, RECIPE: "delayed"}, [EDGES, "delayed", "--fp8-recipe tensorwise"]),
    (HYBRID | {EDGES: True, FIRST: 2}, ["2 + num_layers_at_end_in_bf16 1 = 3", "none of the 3 layers of model.l"]),
    (HYBRID | {EDGES: True, FIRST: 0, LAST: 0}, ["= 0 keeps no layer in bf16"]),
    (
        TALL | {RECIPE: "delayed", "training.freeze_vision": True},
        ["delayed", "freeze_vision", "without a graph", "--fp8-parts language"],
    ),
    (TALL | {RECIPE: "delayed", "parallel.vision_parallel": "data"}, ["delayed", "vision_parallel data", "passes"]),
    (BOTH, ["model.vision", "6 x 6 = 36 patches = 2 x 16 + 4", "--fp8-parts language"]),
    (TALL | {TP: 8, "model.vision.num_attention_heads": 8, "model.language.num_attention_heads": 8,
             "model.language.ffn_hidden_size": 200},
     ["multiples of 16, but model.language.ffn_hidden_size 200 / parallel.tensor_model_parallel_size 8 = 25 = 1 x 16 + "
      "9"]),
    (TALL | {"model.vision.ffn_hidden_size": 500}, ["model.vision.ffn_hidden_size 500 = 31 x 16 + 4"]),
    (
        HYBRID | {RECIPE: "mxfp8", TP: 2},
        ["multiples of 32", "352 / parallel.tensor_model_parallel_size 2 = 176 = 5 x 32 + 16"],
    ),
    (HYBRID | {"data.seq_length": 2040}, ["micro_batch_size 1 x data.seq_length 2040 = 2040 tokens = 127 x 16 + 8"]),
    (
        HYBRID | {TP: 2, SP: True, "data.seq_length": 2064},
        ["of each rank", "2064 tokens; / parallel.tensor_model_parallel_size 2 = 1032 = 64 x 16 + 8"],
    ),
    (HYBRID | {RECIPE: "mxfp8", "data.seq_length": 2064}, ["multiples of 32", "2064 tokens = 64 x 32 + 16"]),
    (
        HYBRID | {RECIPE: "blockwise", TP: 2, SP: True, "data.seq_length": 2112},
        ["multiples of 128", "2112 tokens; / parallel.tensor_model_parallel_size 2 = 1056 = 8 x 128 + 32"],
    ),
    (
        TALL | {TP: 4, SP: True, "model.image_size": 168, "model.language.ffn_hidden_size": 384},
        ["model.vision has images of 12 x 12 = 144 patches; / parallel.tensor_model_parallel_size 4 = 36 = 2 x 16 + 4"],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "parts"), REFUSED)
def test_refused(changes: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(tiny(changes), world_size=changes.get(TP, 1), cuda=True)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_without_cuda_it_is_refused() -> None:
    with pytest.raises(ConfigError, match="training.fp8_format is hybrid, which needs Transformer Engine on CUDA"):
        validate(tiny(HYBRID), world_size=1, cuda=False)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        HYBRID,
        HYBRID | {FORMAT: "e4m3", RECIPE: "delayed", "training.freeze_vision": True},
        HYBRID | {RECIPE: "delayed", "parallel.vision_parallel": "data"},
        HYBRID | {EDGES: True, FIRST: 0, LAST: 2},
        HYBRID | {"data.seq_length": 1032, "training.micro_batch_size": 2, "training.global_batch_size": 4},
        HYBRID | {TP: 2, SP: True, "data.seq_length": 2080},
        HYBRID | {RECIPE: "blockwise", TP: 2, "data.seq_length": 2064},
        HYBRID | {RECIPE: "blockwise", TP: 2, SP: True, "data.seq_length": 2304},
        HYBRID | {RECIPE: "mxfp8"},
        TALL,
        TALL | {"training.freeze_vision": True},
        TALL | {RECIPE: "delayed"},
        # The tower is whole on every rank: neither its patches nor its widths are divided.
        TALL | {TP: 2, SP: True, RECIPE: "mxfp8", "parallel.vision_parallel": "data",
                "model.language.ffn_hidden_size": 384},
    ],
)  # fmt: skip
def test_accepted(changes: dict[str, Any]) -> None:
    validate(tiny(changes), world_size=changes.get(TP, 1), cuda=True)


WIDTH = r"model.vision.hidden_size 1664 / parallel.tensor_model_parallel_size 8 = 208 = 6 x 32 \+ 16"
PATCHES = "model.vision has images of 16 x 16 = 256 patches; / parallel.tensor_model_parallel_size "
TOO_FINE = {
    ("stage1_pretrain", "mxfp8", 8): WIDTH,
    ("stage2_multitask", "mxfp8", 8): WIDTH,
    ("stage1_pretrain", "blockwise", 4): PATCHES + r"4 = 64 = 0 x 128 \+ 64",
    ("stage1_pretrain", "blockwise", 8): PATCHES + r"8 = 32 = 0 x 128 \+ 32",
}
"""Of the recipes with both towers in FP8, the layouts that are refused."""


@pytest.mark.parametrize("recipe", ["stage1_pretrain", "stage2_multitask"])
@pytest.mark.parametrize("scaling", ["tensorwise", "blockwise", "mxfp8"])
@pytest.mark.parametrize("tensor", [1, 2, 4, 8])
def test_the_published_sizes_divide(recipe: str, scaling: str, tensor: int) -> None:
    flags = ["--fp8-format", "hybrid", "--fp8-recipe", scaling, "--fp8-parts", "both"]
    flags += ["--tensor-model-parallel-size", str(tensor)]
    flags += ["--sequence-parallel" if tensor > 1 else "--no-sequence-parallel"]
    config = load_config(RECIPES / f"{recipe}.yaml", flags)
    expected = TOO_FINE.get((recipe, scaling, tensor))
    with pytest.raises(ConfigError, match=expected) if expected else contextlib.nullcontext():
        validate(config, world_size=tensor, cuda=True)
