"""Layers from Transformer Engine: fused norm and linear, FlashAttention over packed rows.

The package is imported only when the backend is requested, so that nothing else needs it. The checkpoint keys are those
of the local backend. Transformer Engine keeps a norm inside the linear layer that follows it. The maps below restore
the norm's own name, so that a checkpoint written by one backend loads in the other.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from packaging.version import Version
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_vl.backends.attention_inputs import AttentionInputs, PackedLine
from megatron_vl.backends.versions import FLASH_ATTN, HOPPER, TRANSFORMER_ENGINE, dotted, installed_core
from megatron_vl.errors import ConfigError

_FUSED_NORM_KEYS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}


class TransformerEngineBackend:
    """Layer specs of Transformer Engine's modules.

    Raises:
        ConfigError: if the package cannot be used here.
    """

    name = "transformer_engine"

    def __init__(self) -> None:
        _check_package()
        _check_attention()

    def vision_layer(self) -> ModuleSpec:
        """Return a pre-norm block with attention without a mask. The layer's configuration sets the kind of norm."""
        return _layer(AttnMaskType.no_mask)

    def language_layer(self) -> ModuleSpec:
        """Return a pre-norm block with causal attention within each packed span."""
        return _layer(AttnMaskType.padding_causal)

    def final_norm(self) -> Any:
        """Return the class of the norm before the output layer."""
        from megatron.core.extensions.transformer_engine import TENorm

        return TENorm

    def attention_inputs(self, line: PackedLine, rotary_table: Tensor, *, dtype: torch.dtype) -> AttentionInputs:
        """Return the packed parameters of a sequence; arguments as in ``LocalBackend.attention_inputs``."""
        packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=line.cu_seqlens,
            cu_seqlens_kv=line.cu_seqlens,
            max_seqlen_q=line.longest,
            max_seqlen_kv=line.longest,
        )
        # The table of the longest span, not of the whole sequence: rotary angles then start anew in each span.
        return AttentionInputs(rotary=rotary_table[: line.longest], packed=packed)

    def long_attention_inputs(
        self, line: PackedLine, angles: Tensor, query_scale: Tensor | None, *, dtype: torch.dtype
    ) -> AttentionInputs:
        """Raise ConfigError: the fused kernels take one table of angles for all spans, and no factor for a query."""
        raise ConfigError(
            f"a span of {line.longest} tokens is longer than model.language.native_seq_length, and "
            "evaluation then uses dynamic NTK and logn attention, which the transformer_engine backend does not have; "
            "use --backend local, or turn them off with --no-use-dynamic-ntk --no-use-logn-attn"
        )


def recompute(run: Callable[[Tensor], Tensor], hidden: Tensor, tensor_group: ProcessGroup) -> Tensor:
    """Return ``run(hidden)``, which the backward pass computes again, with the same scales of FP8."""
    from megatron.core.extensions.transformer_engine import te_checkpoint

    output: Tensor = te_checkpoint(run, False, get_cuda_rng_tracker, tensor_group, hidden)
    return output


def _check_package() -> None:
    """Refuse a package that is absent, incomplete, or of another version, before Megatron-Core fails on it."""
    try:
        import transformer_engine.pytorch  # noqa: F401

        found = Version(version("transformer_engine")).release
    # The meta package without its libraries, a missing library, and libraries of another version, in this order.
    except (ImportError, RuntimeError, OSError, AssertionError) as error:
        hidden = sys.modules.get("transformer_engine", error) is None and not torch.cuda.is_available()
        reason = "needs a CUDA device, and none was found" if hidden else f"cannot be imported ({error})"
        raise _unusable(reason) from error
    core = installed_core()
    if found not in TRANSFORMER_ENGINE[core]:
        raise _unusable(f"has version {dotted(found)}, and Megatron-Core {core} takes those {TRANSFORMER_ENGINE[core]}")
    from megatron.core.extensions.transformer_engine import HAVE_TE

    if not HAVE_TE:
        raise _unusable("lacks a part that Megatron-Core imports")


def _check_attention() -> None:
    """Refuse GPUs on which attention over packed rows would silently use a full score matrix."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() >= HOPPER:
        return
    try:
        found = Version(version("flash_attn")).release
    except PackageNotFoundError:
        found = ()
    if found < FLASH_ATTN:
        raise ConfigError(
            "parallel.backend: on a GPU before Hopper Transformer Engine computes attention over packed rows with "
            f"flash-attn {dotted(FLASH_ATTN)} or newer, and found {dotted(found) or 'none'}: "
            "pip install flash-attn, or use --backend local, which has torch's FlashAttention"
        )


def _unusable(reason: str) -> ConfigError:
    return ConfigError(
        f"parallel.backend: transformer_engine {reason}. Use NVIDIA's PyTorch image (see Dockerfile), or "
        "--backend local."
    )


def _layer(mask: AttnMaskType) -> ModuleSpec:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    spec = copy.deepcopy(get_gpt_layer_with_transformer_engine_spec())
    spec.submodules.self_attention.params = {"attn_mask_type": mask}
    spec.submodules.sharded_state_dict_keys_map = dict(_FUSED_NORM_KEYS)
    return spec
