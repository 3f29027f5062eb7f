"""Small operations of a layer: one kernel each on CUDA, and elsewhere the steps of the published model, bit for bit.

Only this module selects between the two, by the device of the tensors. On a CPU, ``elementwise.py`` takes
these steps, with derivatives by hand. On CUDA the passes over memory are the cost of a
chain of elementwise steps. So such a chain is one kernel of torch if torch has one, and is compiled otherwise. Compiled
and fused kernels compute in fp32 and round once, while separate steps in bf16 round after each step. In fp32 both give
the same up to the last bits.

No kernel here reads a value from the device, so the CPU can run ahead of it.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import shutil
import sysconfig
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_vl.backends import elementwise

_BY_SPEED = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
"""The fastest on Hopper first. torch takes the first that supports the call, if asked to keep this order."""


@functools.cache
def can_compile() -> bool:
    """Return whether torch can compile for CUDA here. That needs Triton, a C compiler, and Python's headers."""
    compiler = any(shutil.which(name) for name in ("cc", "gcc", "clang"))
    headers = Path(sysconfig.get_path("include"), "Python.h").is_file()
    return find_spec("triton") is not None and compiler and headers


@functools.cache
def _compiled(steps: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(steps, dynamic=True)


def _one_kernel(steps: Callable[..., Tensor], first: Tensor, *others: Tensor) -> Tensor:
    """Compute ``steps``, compiled if that is possible and faster."""
    chosen = _compiled(steps) if first.is_cuda and can_compile() else steps
    return chosen(first, *others)


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute RMSNorm over the last dimension: [..., h] -> [..., h]."""
    if hidden.is_cuda:
        return fused_rms_norm(hidden, weight, eps)
    return elementwise.RMSNorm.apply(hidden, weight, eps)


def fused_rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute RMSNorm by torch's kernel, which saves a number for each row and not a copy of the rows."""
    return F.rms_norm(hidden, (hidden.shape[-1],), weight, eps)


def bias_gelu(hidden: Tensor, bias: Tensor) -> Tensor:
    """Compute the exact GELU (by the error function) of ``hidden + bias``."""
    return _one_kernel(_bias_gelu, hidden, bias)


def _bias_gelu(hidden: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(hidden + bias)


def rotate(line: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotate [t, b, heads, d] by angles [t, 1, 1, d] (rotary embedding); the halves of d are the two coordinates."""
    if line.is_cuda:
        return _one_kernel(_rotate, line, cosines, sines)
    return elementwise.Rotation.apply(line, cosines, sines)


def _rotate(line: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    first, second = line.chunk(2, dim=-1)
    return line * cosines + torch.cat((-second, first), dim=-1) * sines


def add_weight_gradient(rows: Tensor, gradients: Tensor, total: Tensor) -> None:
    """Add the gradient of a linear layer's weight to the fp32 sum over micro-batches, inside the product if possible.

    Args:
        rows: [t, k], the layer's input.
        gradients: [t, n], of its output.
        total: float32[n, k].
    """
    if rows.dtype == total.dtype:
        total.addmm_(gradients.t(), rows)
    elif _adds_in_fp32(rows.device, rows.dtype):
        torch.addmm(total, gradients.t(), rows, out_dtype=total.dtype, out=total)
    else:
        total.add_(gradients.t() @ rows)


@functools.cache
def _adds_in_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether torch can add a half-precision product to fp32 in place; a trial shows it, no version does."""
    ones, total = torch.ones(16, 16, dtype=dtype, device=device), torch.ones(16, 16, device=device)
    try:
        torch.addmm(total, ones, ones, out_dtype=total.dtype, out=total)
    except (RuntimeError, TypeError):
        return False
    return bool((total == 17.0).all())


def has_varlen(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether :func:`varlen_attention` can compute here: it is FlashAttention, on CUDA and in half precision."""
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)


def varlen_attention(lines: Sequence[Tensor], cu_seqlens: Tensor, longest: int, scale: float | None) -> Tensor:
    """Compute causal attention within the spans of a packed sequence, without padding; return [t, heads, d].

    Args:
        lines: query, key and value, [t, heads, d].
        cu_seqlens: int32[spans + 1].
    """
    from torch.nn.attention.varlen import varlen_attn

    # Before torch 2.11 it says is_causal, and takes no scale.
    says = inspect.signature(varlen_attn).parameters
    causal: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in says else {"is_causal": True}
    query, key, value = lines
    if scale is not None:
        query = query * (scale * query.shape[-1] ** 0.5)
    context = varlen_attn(query, key, value, cu_seqlens, cu_seqlens, longest, longest, **causal)
    assert isinstance(context, Tensor)  # with an auxiliary output there would be two
    return context


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
    """Compute torch's attention of [b, heads, s, d] by the fastest kernel that supports ``options``."""
    # With a mask, as in generation, lengths grow by one token, and cuDNN plans anew for each.
    with _fastest(query.device) if mask is None else contextlib.nullcontext():
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, **options)


def _fastest(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Prefer the fastest kernel. By default torch takes FlashAttention 2, at half the speed of cuDNN on Hopper."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return contextlib.nullcontext()
    return sdpa_kernel(list(_BY_SPEED), set_priority=True)
