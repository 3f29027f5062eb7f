"""Models of the published layout with random weights, written by torch and safetensors alone.

Names and shapes are stated here once more, from the published code and not from the project's conversion table, so that
the two can contradict each other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

Shape = tuple[int, ...]
Kind = Literal["safetensors", "bin"]
IMAGE_START = 470
"""Of a vocabulary that keeps 256 byte-pair tokens."""


def published_config(
    *, vision: tuple[int, int, int], language: tuple[int, int, int], visual: dict[str, Any], **others: Any
) -> dict[str, Any]:
    """Content of ``config.json``; ``vision`` and ``language`` are layers, width and heads."""
    layers, width, heads = language
    return {
        "model_type": "qwen",
        "no_bias": True,
        "rotary_emb_base": 10000,
        "rotary_pct": 1.0,
        "tie_word_embeddings": False,
        "use_dynamic_ntk": True,
        "use_logn_attn": True,
        "vocab_size": 521,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "kv_channels": width // heads,
        "intermediate_size": 5 * width // 2,
        "seq_length": 2048,
        "layer_norm_epsilon": 1e-6,
        **others,
        "visual": {
            "layers": vision[0],
            "width": vision[1],
            "heads": vision[2],
            "image_start_id": IMAGE_START,
            "mlp_ratio": 2.0,
            "output_dim": width,
            "patch_size": 14,
            **visual,
        },
    }


def published_shapes(config: Mapping[str, Any]) -> dict[str, Shape]:
    """Name and shape of every tensor of a model."""
    hidden, half, rows = config["hidden_size"], config["intermediate_size"] // 2, config["vocab_size"]
    shapes: dict[str, Shape] = {
        "transformer.wte.weight": (rows, hidden),
        "transformer.ln_f.weight": (hidden,),
        "lm_head.weight": (rows, hidden),
    }
    for number in range(config["num_hidden_layers"]):
        layer = f"transformer.h.{number}"
        shapes |= {
            f"{layer}.ln_1.weight": (hidden,),
            f"{layer}.attn.c_attn.weight": (3 * hidden, hidden),
            f"{layer}.attn.c_attn.bias": (3 * hidden,),
            f"{layer}.attn.c_proj.weight": (hidden, hidden),
            f"{layer}.ln_2.weight": (hidden,),
            f"{layer}.mlp.w1.weight": (half, hidden),
            f"{layer}.mlp.w2.weight": (half, hidden),
            f"{layer}.mlp.c_proj.weight": (hidden, half),
        }
    return shapes | _visual_shapes(config["visual"])


def _visual_shapes(visual: Mapping[str, Any]) -> dict[str, Shape]:
    width, hidden, patch = visual["width"], visual["output_dim"], visual["patch_size"]
    wide, queries = int(width * visual["mlp_ratio"]), visual.get("n_queries", 256)
    shapes: dict[str, Shape] = {
        "conv1.weight": (width, 3, patch, patch),
        "positional_embedding": (visual.get("position_grid", 16) ** 2, width),
        **_norm("ln_pre", width),
    }
    for number in range(visual["layers"]):
        block = f"transformer.resblocks.{number}"
        shapes |= _norm(f"{block}.ln_1", width) | _norm(f"{block}.ln_2", width)
        shapes |= _linear(f"{block}.attn.in_proj", 3 * width, width) | _linear(f"{block}.attn.out_proj", width, width)
        shapes |= _linear(f"{block}.mlp.c_fc", wide, width) | _linear(f"{block}.mlp.c_proj", width, wide)
    shapes |= {
        "attn_pool.query": (queries, hidden),
        "attn_pool.pos_embed": (queries, hidden),
        "attn_pool.kv_proj.weight": (hidden, width),
        "attn_pool.attn.in_proj_weight": (3 * hidden, hidden),
        "attn_pool.attn.in_proj_bias": (3 * hidden,),
        **_linear("attn_pool.attn.out_proj", hidden, hidden),
        **_norm("attn_pool.ln_q", hidden),
        **_norm("attn_pool.ln_kv", hidden),
        **_norm("ln_post", hidden),
        "proj": (hidden, hidden),
    }
    return {f"transformer.visual.{name}": shape for name, shape in shapes.items()}


def _norm(name: str, width: int) -> dict[str, Shape]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _linear(name: str, rows: int, columns: int) -> dict[str, Shape]:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def random_tensors(config: Mapping[str, Any], dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """Contents that keep every layer's output of the order of one, and that no initialization would give."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in published_shapes(config).items():
        value = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            value = 0.1 * value + ("ln_" in name and name.endswith("weight"))
        elif not name.endswith(("wte.weight", "query", "pos_embed", "positional_embedding")):
            value /= math.sqrt(math.prod(shape[1:]))
        tensors[name] = value.to(dtype)
    return tensors


def write_folder(
    folder: Path, config: Mapping[str, Any], tensors: dict[str, Tensor], *, kind: Kind, shards: int
) -> None:
    """Write a folder whose tensors are dealt to the shards in turn, so that those of a layer lie apart."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    stem, index = {"safetensors": ("model", "model.safetensors"), "bin": ("pytorch_model", "pytorch_model.bin")}[kind]
    names = list(tensors)
    files = [f"{stem}-{n + 1:05}-of-{shards:05}.{kind}" if shards > 1 else f"{stem}.{kind}" for n in range(shards)]
    for number, file in enumerate(files):
        content = {name: tensors[name] for name in names[number::shards]}
        save_file(content, folder / file) if kind == "safetensors" else torch.save(content, folder / file)
    if shards > 1:
        weight_map = {name: files[number % shards] for number, name in enumerate(names)}
        size = sum(tensor.nbytes for tensor in tensors.values())
        text = json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map})
        (folder / f"{index}.index.json").write_text(text)
