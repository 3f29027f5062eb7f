"""Which backend a run uses."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import Literal, Protocol

import torch
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor, nn

from megatron_vl.backends.attention_inputs import AttentionInputs, PackedLine
from megatron_vl.errors import ConfigError
from megatron_vl.log import log_rank_0


class Backend(Protocol):
    """How layers are built, and what their attention needs to know of a batch."""

    name: str

    def vision_layer(self) -> ModuleSpec: ...

    def language_layer(self) -> ModuleSpec: ...

    def final_norm(self) -> type[nn.Module]: ...

    def attention_inputs(self, line: PackedLine, rotary_table: Tensor, *, dtype: torch.dtype) -> AttentionInputs: ...

    def long_attention_inputs(
        self, line: PackedLine, angles: Tensor, query_scale: Tensor | None, *, dtype: torch.dtype
    ) -> AttentionInputs: ...


def select_backend(name: Literal["auto", "local", "transformer_engine"], *, bf16: bool = False) -> Backend:
    """The backend of that name; ``auto`` is Transformer Engine for bf16 on CUDA, where it can be used.

    Raises:
        ConfigError: Transformer Engine was named and cannot be used.
    """
    from megatron_vl.backends.local import LocalBackend
    from megatron_vl.backends.te import TransformerEngineBackend

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
