"""Norms of the local backend, which work under sequence parallelism."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_vl.backends import kernels


class LayerNorm(nn.Module):
    """LayerNorm whose parameters are marked for Megatron-Core's gradient reduction under sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = _norm_parameter(torch.ones(hidden_size, dtype=config.params_dtype), config)
        self.bias = _norm_parameter(torch.zeros(hidden_size, dtype=config.params_dtype), config)

    def forward(self, hidden: Tensor) -> Tensor:
        return F.layer_norm(hidden, (hidden.shape[-1],), self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """RMSNorm, computed by ``kernels.py``."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = _norm_parameter(torch.ones(hidden_size, dtype=config.params_dtype), config)

    def forward(self, hidden: Tensor) -> Tensor:
        return kernels.rms_norm(hidden, self.weight, self.eps)


def _norm_parameter(value: Tensor, config: TransformerConfig) -> nn.Parameter:
    parameter = nn.Parameter(value)
    setattr(parameter, "sequence_parallel", config.sequence_parallel)
    return parameter
