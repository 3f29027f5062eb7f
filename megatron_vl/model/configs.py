"""Convert our configuration to Megatron-Core's: one ``TransformerConfig`` for each tower, and one for the schedule.

The layers of a tower are built from a configuration with a pipeline of one stage. We number layers globally ourselves;
with more stages Megatron-Core would add the offsets of a uniform split. Only the schedule's configuration describes the
pipeline; the wrapped model carries that one as ``.config``.

For the same reason it must name FP8 too. Megatron-Core asks the wrapped model's configuration whether weights are to be
quantized anew in a step (``backends/fp8.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vl.backends import kernels
from megatron_vl.config.schema import RunConfig, TrainingConfig


@dataclass(frozen=True)
class CoreConfigs:
    """Megatron-Core's configurations of a run."""

    vision: TransformerConfig
    language: TransformerConfig
    head: TransformerConfig
    """The language model's, without sequence parallelism, since the head reads positions of the gathered sequence, and
    without FP8."""
    schedule: TransformerConfig


@dataclass(frozen=True)
class Target:
    """The device and the implementation for which the layers are built."""

    device: str
    """``cuda``, ``cpu``, or ``meta`` if tensors shall use no memory."""
    transformer_engine: bool


def core_configs(config: RunConfig, target: Target) -> CoreConfigs:
    """Return Megatron-Core's configurations of a run."""
    language, training = _language(config, target), config.training
    fp8 = _fp8(training)
    in_layers = fp8 | _layers_in_bf16(training) if fp8 else {}
    return CoreConfigs(
        vision=TransformerConfig(**_vision(config, target) | (in_layers if training.fp8_parts == "both" else {})),
        language=TransformerConfig(**language | in_layers),
        head=TransformerConfig(**language | {"sequence_parallel": False}),
        schedule=TransformerConfig(**language | fp8 | _pipeline(config)),
    )


def _fp8(training: TrainingConfig) -> dict[str, Any]:
    """Return what Megatron-Core is told of FP8; its names of the recipes are ours."""
    if training.fp8_format is None:
        return {}
    return {"fp8": training.fp8_format, "fp8_recipe": training.fp8_recipe}


def _layers_in_bf16(training: TrainingConfig) -> dict[str, Any]:
    return {
        "first_last_layers_bf16": training.first_last_layers_bf16,
        "num_layers_at_start_in_bf16": training.num_layers_at_start_in_bf16,
        "num_layers_at_end_in_bf16": training.num_layers_at_end_in_bf16,
    }


def _common(config: RunConfig, target: Target) -> dict[str, Any]:
    parallel, training = config.parallel, config.training
    tensor_parallel = parallel.tensor_model_parallel_size
    return {
        "tensor_model_parallel_size": tensor_parallel,
        "sequence_parallel": parallel.sequence_parallel and tensor_parallel > 1,
        "bf16": training.bf16,
        "params_dtype": torch.bfloat16 if training.bf16 else torch.float32,
        # Otherwise Megatron-Core and Transformer Engine use the CUDA device, whatever torch's default is.
        "use_cpu_initialization": target.device != "cuda",
        "perform_initialization": False,  # model/initialize.py does it, the same for every layout
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": target.device == "cuda",
        "apply_rope_fusion": target.transformer_engine,
        "deterministic_mode": training.deterministic_mode,
        "recompute_granularity": "selective" if training.recompute_granularity == "selective" else None,
        "calculate_per_token_loss": True,
    }


def _vision(config: RunConfig, target: Target) -> dict[str, Any]:
    vision = config.model.vision
    return _common(config, target) | {
        "num_layers": vision.num_layers,
        "hidden_size": vision.hidden_size,
        "ffn_hidden_size": vision.ffn_hidden_size,
        "num_attention_heads": vision.num_attention_heads,
        "normalization": "LayerNorm",
        "layernorm_epsilon": vision.layernorm_epsilon,
        "activation_func": F.gelu,
        "bias_activation_fusion": True,  # exact, see backends/core.py
        "add_bias_linear": True,
        "add_qkv_bias": True,
    }


def _language(config: RunConfig, target: Target) -> dict[str, Any]:
    language = config.model.language
    return _common(config, target) | {
        "num_layers": language.num_layers,
        "hidden_size": language.hidden_size,
        "ffn_hidden_size": language.ffn_hidden_size,
        "num_attention_heads": language.num_attention_heads,
        "normalization": "RMSNorm",
        "layernorm_epsilon": language.norm_epsilon,
        "activation_func": F.silu,
        "bias_activation_fusion": target.device != "cuda" or kernels.can_compile(),  # SwiGLU, see backends/core.py
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "add_qkv_bias": True,
    }


def _pipeline(config: RunConfig) -> dict[str, Any]:
    parallel = config.parallel
    stages, virtual = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    interleaved = virtual is not None and virtual > 1
    return {
        # Megatron-Core checks that stages divide layers; the layout, not this number, places them.
        "num_layers": stages * (virtual or 1),
        "pipeline_model_parallel_size": stages,
        "virtual_pipeline_model_parallel_size": virtual if interleaved else None,
        "pipeline_dtype": torch.bfloat16 if config.training.bf16 else torch.float32,
        "variable_seq_lengths": True,
        "moe_token_dispatcher_type": "alltoall",  # required by variable lengths, although there are no experts
        "deallocate_pipeline_outputs": True,
        # With two stages, previous and next are the same peer, and batched messages of the interleaved schedule would
        # be matched in the wrong order.
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
        "batch_p2p_sync": False,
    }
