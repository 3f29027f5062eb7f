"""Select the backend that builds the layers of a run."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import Literal

import torch

from megatron_vl.backends import fp8
from megatron_vl.backends.interface import Backend
from megatron_vl.backends.local.backend import LocalBackend
from megatron_vl.backends.te import TransformerEngineBackend
from megatron_vl.errors import ConfigError
from megatron_vl.log import log_rank_0


def select_backend(
    name: Literal["auto", "local", "transformer_engine"], *, bf16: bool = False, fp8_recipe: str | None = None
) -> Backend:
    """Return the backend of that name. ``auto`` is Transformer Engine for bf16 on CUDA if it can be used.

    Args:
        fp8_recipe: if the run computes in FP8. Then only Transformer Engine will do.

    Raises:
        ConfigError: if Transformer Engine was named, or is needed for FP8, and cannot be used; if the device has no
            products for the FP8 recipe.
    """
    if fp8_recipe is not None:
        backend = TransformerEngineBackend()
        fp8.check_device(fp8_recipe)
        return backend
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
