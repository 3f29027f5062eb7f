"""Select the backend that builds the layers of a run."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import Literal

import torch

from megatron_vl.backends.interface import Backend
from megatron_vl.backends.local.backend import LocalBackend
from megatron_vl.backends.te import TransformerEngineBackend
from megatron_vl.errors import ConfigError
from megatron_vl.log import log_rank_0


def select_backend(name: Literal["auto", "local", "transformer_engine"], *, bf16: bool = False) -> Backend:
    """Return the backend of that name. ``auto`` is Transformer Engine for bf16 on CUDA if it can be used.

    Raises:
        ConfigError: if Transformer Engine was named and cannot be used.
    """
    if name == "transformer_engine":
        return TransformerEngineBackend()
    if name == "local" or not torch.cuda.is_available():
        return LocalBackend()
    if not bf16:
        log_rank_0("backend local: Transformer Engine would compute an fp32 run with TF32 products")
        return LocalBackend()
    if find_spec("transformer_engine") is None:
        log_rank_0("backend local: Transformer Engine is not installed")
        return LocalBackend()
    try:
        return TransformerEngineBackend()
    except ConfigError as error:
        log_rank_0(f"backend local: {error}", level=logging.WARNING)
        return LocalBackend()
