"""Qwen-VL from its formulas, in plain torch, on tensors under their published names; nothing of the project is in it.

It computes in the type of the tensors and rounds where the published code does: RMSNorm and rotary positions work in
fp32 and cast back, everything else stays in the type it has. Gradients flow to tensors that require them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Tensors = Mapping[str, Tensor]

_EPSILON = 1e-6
"""Of every norm of the visual side."""
_RESAMPLER_HEAD = 128
"""Features for which the published resampler has a head, unless the configuration says how many heads there are."""


def reference_forward(
    tensors: Tensors, hf_config: Mapping[str, Any], input_ids: Tensor, pixels: Tensor | None, *, training: bool
) -> Tensor:
    """Logits of rows that attend to all that precedes a token.

    Args:
        tensors: the published tensors, all of one type.
        hf_config: content of ``config.json``.
        input_ids: int64[b, s].
        pixels: float32[n, 3, H, W], normalized, in the order of the image spans, row by row.
        training: without dynamic NTK and logn.

    Returns:
        float[b, s, vocabulary].
    """
    hidden = tensors["transformer.wte.weight"][input_ids]
    if pixels is not None:
        start = hf_config["visual"]["image_start_id"]
        features = reference_features(tensors, hf_config, pixels)
        firsts = torch.nonzero(input_ids == start)
        assert len(firsts) == len(features)
        hidden = hidden.clone()
        for image, (row, first) in zip(features, firsts.tolist(), strict=True):
            assert input_ids[row, first + len(image) + 1] == start + 1
            hidden[row, first + 1 : first + 1 + len(image)] = image
    for number in range(hf_config["num_hidden_layers"]):
        layer = _under(tensors, f"transformer.h.{number}.")
        normed = _rms_norm(hidden, layer["ln_1.weight"], hf_config)
        hidden = hidden + _causal_attention(layer, hf_config, normed, training=training)
        normed = _rms_norm(hidden, layer["ln_2.weight"], hf_config)
        gated = F.linear(normed, layer["mlp.w1.weight"]) * F.silu(F.linear(normed, layer["mlp.w2.weight"]))
        hidden = hidden + F.linear(gated, layer["mlp.c_proj.weight"])
    normed = _rms_norm(hidden, tensors["transformer.ln_f.weight"], hf_config)
    return F.linear(normed, tensors["lm_head.weight"])


def reference_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over supervised tokens of the batch; ``labels`` int64[b, s] are not shifted, -100 is unsupervised."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)


def reference_features(tensors: Tensors, hf_config: Mapping[str, Any], pixels: Tensor) -> Tensor:
    """Image features float[n, queries, h] of normalized pixels float32[n, 3, H, W]."""
    visual, sizes = _under(tensors, "transformer.visual."), hf_config["visual"]
    kernel = visual["conv1.weight"]
    hidden = F.conv2d(pixels.to(kernel.dtype), kernel, stride=kernel.shape[-1]).flatten(2).transpose(1, 2)
    hidden = _layer_norm(hidden + _resized(visual["positional_embedding"], hidden.shape[1]), visual, "ln_pre")
    for number in range(sizes["layers"]):
        block = _under(visual, f"transformer.resblocks.{number}.")
        hidden = hidden + _vision_attention(block, sizes["heads"], _layer_norm(hidden, block, "ln_1"))
        widened = F.gelu(_linear(_layer_norm(hidden, block, "ln_2"), block, "mlp.c_fc"))
        hidden = hidden + _linear(widened, block, "mlp.c_proj")
    features = _resample(_under(visual, "attn_pool."), sizes, hidden)
    return _layer_norm(features, visual, "ln_post") @ visual["proj"]


def _resample(pool: Tensors, sizes: Mapping[str, Any], patches: Tensor) -> Tensor:
    """[n, patches, width] -> [n, queries, h]."""
    keys = _layer_norm(F.linear(patches, pool["kv_proj.weight"]), pool, "ln_kv")
    query = _layer_norm(pool["query"], pool, "ln_q") + pool["pos_embed"]
    query = query.expand(len(patches), -1, -1)
    positions = _resized(pool["pos_embed"], patches.shape[1])
    heads = sizes.get("resampler_heads", max(1, query.shape[-1] // _RESAMPLER_HEAD))
    parts = zip(
        (query, keys + positions, keys),
        pool["attn.in_proj_weight"].chunk(3),
        pool["attn.in_proj_bias"].chunk(3),
        strict=True,
    )
    q, k, v = (F.linear(x, weight, bias).unflatten(-1, (heads, -1)) for x, weight, bias in parts)
    scores = torch.einsum("nqad,nkad->naqk", q / q.shape[-1] ** 0.5, k)
    context = torch.einsum("naqk,nkad->nqad", scores.softmax(-1), v).flatten(2)
    return _linear(context, pool, "attn.out_proj")


def _vision_attention(block: Tensors, heads: int, hidden: Tensor) -> Tensor:
    """Everybody at everybody; a head's q, k and v lie together."""
    q, k, v = _linear(hidden, block, "attn.in_proj").unflatten(-1, (heads, -1)).chunk(3, dim=-1)
    scores = torch.einsum("nqad,nkad->naqk", q / q.shape[-1] ** 0.5, k)
    context = torch.einsum("naqk,nkad->nqad", scores.softmax(-1), v).flatten(2)
    return _linear(context, block, "attn.out_proj")


def _causal_attention(layer: Tensors, hf_config: Mapping[str, Any], hidden: Tensor, *, training: bool) -> Tensor:
    """All heads' q, then all k, then all v; half-split rotary positions."""
    heads, length, native = hf_config["num_attention_heads"], hidden.shape[1], hf_config["seq_length"]
    thirds = _linear(hidden, layer, "attn.c_attn").chunk(3, dim=-1)
    q, k, v = (third.unflatten(-1, (heads, -1)) for third in thirds)
    size, base = q.shape[-1], hf_config["rotary_emb_base"]
    if hf_config["use_dynamic_ntk"] and not training:
        alpha = max(2 ** math.ceil(math.log(length / native, 2) + 1) - 1, 1)
        base = base * alpha ** (size / (size - 2))
    frequencies = 1.0 / base ** (torch.arange(0, size, 2).float() / size)
    angles = torch.outer(torch.arange(length).float(), frequencies).repeat(1, 2)[:, None]
    q, k = ((x.float() * angles.cos() + _half_turned(x.float()) * angles.sin()).to(hidden.dtype) for x in (q, k))
    if hf_config["use_logn_attn"] and not training:
        scale = [math.log(i, native) if i > native else 1.0 for i in range(1, length + 1)]
        q = q * torch.tensor(scale)[:, None, None].to(q.dtype)
    scores = torch.einsum("bqad,bkad->baqk", q, k) / size**0.5
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future, torch.finfo(scores.dtype).min).softmax(-1)
    return F.linear(torch.einsum("baqk,bkad->bqad", weights, v).flatten(2), layer["attn.c_proj.weight"])


def _half_turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def _rms_norm(x: Tensor, weight: Tensor, hf_config: Mapping[str, Any]) -> Tensor:
    wide = x.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + hf_config["layer_norm_epsilon"])
    return (wide * scale).to(x.dtype) * weight


def _layer_norm(x: Tensor, tensors: Tensors, name: str) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"], _EPSILON)


def _linear(x: Tensor, tensors: Tensors, name: str) -> Tensor:
    return F.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])


def _resized(table: Tensor, patches: int) -> Tensor:
    """A square table of positions for another square number of patches."""
    source, target = math.isqrt(len(table)), math.isqrt(patches)
    if source == target:
        return table
    image = table.float().view(source, source, -1).permute(2, 0, 1)[None]
    resized = F.interpolate(image, size=(target, target), mode="bicubic", align_corners=False)
    return resized[0].permute(1, 2, 0).flatten(0, 1).to(table.dtype)


def _under(tensors: Tensors, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
