"""Which backend a run uses."""

from __future__ import annotations

import importlib.util
from typing import Literal, Protocol

import torch
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor, nn

from megatron_vl.backends.attention_inputs import AttentionInputs


class Backend(Protocol):
    """How layers are built, and what their attention needs to know of a batch."""

    name: str

    def vision_layer(self) -> ModuleSpec: ...

    def language_layer(self) -> ModuleSpec: ...

    def final_norm(self) -> type[nn.Module]: ...

    def attention_inputs(self, cu_seqlens: Tensor, positions: Tensor, rotary_table: Tensor) -> AttentionInputs: ...

    def long_attention_inputs(
        self, cu_seqlens: Tensor, angles: Tensor, query_scale: Tensor | None
    ) -> AttentionInputs: ...


def select_backend(name: Literal["auto", "local", "transformer_engine"]) -> Backend:
    """The backend of that name; ``auto`` is Transformer Engine where CUDA and the package are present.

    Raises:
        ConfigError: Transformer Engine was named and cannot be imported.
    """
    if name == "auto":
        present = torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None
        name = "transformer_engine" if present else "local"
    if name == "transformer_engine":
        from megatron_vl.backends.te import TransformerEngineBackend

        return TransformerEngineBackend()
    from megatron_vl.backends.local import LocalBackend

    return LocalBackend()
