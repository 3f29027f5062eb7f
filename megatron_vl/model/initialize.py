"""Initialize fresh weights, the same for every layout.

Each whole parameter is drawn from a generator seeded by (seed, its global name), and each rank keeps its slice. So one
process and any tensor x pipeline layout start from the same model. The tests of ``tests/parallel`` and users who
compare two layouts rely on that.

Distributions (``visual.py`` and ``modeling_qwen.py`` of the published model; s = init_method_std):

    norms                                   1, biases 0
    word embedding, output layer            N(0, s), rows that pad the vocabulary 0
    linear layers of both towers            N(0, s); into the residual stream N(0, s / sqrt(2 layers))
    patch embedding                         N(0, 1 / sqrt(3 p p))
    positional embedding                    N(0, 1 / sqrt(width))
    resampler query, kv_proj, out_proj      N(0, 0.02), cut at +-2 as its ``trunc_normal_`` does
    resampler in_proj                       uniform, Xavier
    resampler proj                          N(0, 1 / sqrt(width))
    resampler pos_embed, where it trains    its sin-cos table
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from torch import Tensor, nn

from megatron_vl.config.schema import ModelConfig
from megatron_vl.model.resampler import sincos_positions
from megatron_vl.planning.parameters import POSITION_TABLE


def initialize(chunk: nn.Module, model: ModelConfig, *, seed: int, tp_group: dist.ProcessGroup) -> None:
    """Initialize the parameters of one chunk in place; ``tp_group``: the ranks that split its layers."""
    rank, size = tp_group.rank(), tp_group.size()
    with torch.no_grad():
        for name, parameter in chunk.named_parameters():
            whole = draw(name, _whole_shape(parameter, size), model=model, seed=seed)
            parameter.copy_(_slice(name, whole, parameter, rank=rank, size=size))


def mark_tensor_parallel(chunk: nn.Module) -> None:
    """Mark the sharded weights of Megatron-Core's linear layers, as their own initialization would do.

    Without the marks the gradient norm would count only one rank's shard.
    """
    dimension = {VocabParallelEmbedding: 0, ColumnParallelLinear: 0, RowParallelLinear: 1}
    for module in chunk.modules():
        if type(module) in dimension and not hasattr(module.weight, "tensor_model_parallel"):
            setattr(module.weight, "tensor_model_parallel", True)
            setattr(module.weight, "partition_dim", dimension[type(module)])
            setattr(module.weight, "partition_stride", 1)


def _sharded_dimension(parameter: Tensor) -> int | None:
    return int(getattr(parameter, "partition_dim")) if getattr(parameter, "tensor_model_parallel", False) else None


def _whole_shape(parameter: Tensor, size: int) -> list[int]:
    shape = list(parameter.shape)
    dimension = _sharded_dimension(parameter)
    if dimension is not None:
        shape[dimension] *= size
    return shape


def _slice(name: str, whole: Tensor, parameter: Tensor, *, rank: int, size: int) -> Tensor:
    dimension = _sharded_dimension(parameter)
    if dimension is None or size == 1:
        return whole
    if name.startswith("language_model.") and ".linear_fc1." in name:  # each rank holds its part of gate and of up
        gate, up = whole.chunk(2)
        return torch.cat([gate.chunk(size)[rank], up.chunk(size)[rank]])
    return whole.chunk(size, dimension)[rank]


def draw(name: str, shape: Sequence[int], *, model: ModelConfig, seed: int) -> Tensor:
    """Draw a whole parameter as float32, a function of the seed and the parameter's global name."""
    shape = list(shape)
    # The generator reads only the lower 32 bits of its seed, so both must be in them.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}.{name}".encode()))
    if name == POSITION_TABLE:
        return sincos_positions(round(shape[0] ** 0.5), shape[1])
    if _is_norm(name):
        return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
    if name.endswith("bias"):
        return torch.zeros(shape)
    if name.endswith(("word_embeddings.weight", "output_layer.weight")):
        rows = torch.zeros(shape)
        real = rows[: model.language.vocab_size]
        real.copy_(_normal(list(real.shape), model.init_method_std, generator))
        return rows
    if name == "resampler.attn.in_proj_weight":
        bound = math.sqrt(6.0 / (shape[0] + shape[1]))
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)
    if name.startswith("resampler.") and name != "resampler.proj":
        return nn.init.trunc_normal_(torch.empty(shape), std=0.02, generator=generator)
    return _normal(shape, _deviation(name, shape, model), generator)


def _deviation(name: str, shape: list[int], model: ModelConfig) -> float:
    if name in ("resampler.proj", "vision.positional_embedding"):
        return shape[-1] ** -0.5
    if name == "vision.patch_embed.weight":
        return math.prod(shape[1:]) ** -0.5
    if ".linear_proj." in name or ".linear_fc2." in name:
        layers = model.vision.num_layers if name.startswith("vision.") else model.language.num_layers
        return model.init_method_std / math.sqrt(2.0 * layers)
    return model.init_method_std


def _is_norm(name: str) -> bool:
    return "layernorm" in name or "layer_norm" in name or ".ln_" in name


def _normal(shape: list[int], deviation: float, generator: torch.Generator) -> Tensor:
    return torch.empty(shape).normal_(0.0, deviation, generator=generator)
