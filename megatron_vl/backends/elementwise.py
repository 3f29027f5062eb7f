"""Chains of elementwise steps on a CPU, with fewer passes over memory than autograd makes of them.

The forward passes take the steps of the published model, bit for bit. The backward passes are its derivatives by hand.
They write each gradient once and at its place, where autograd writes, joins and adds parts. They keep what the kernels
on CUDA keep, which is what the planner counts. ``kernels.py`` selects them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class RMSNorm(torch.autograd.Function):
    """RMSNorm over the last dimension, [..., h] -> [..., h], in Qwen's order.

    It normalizes in fp32, casts back, then multiplies by the weight.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = hidden.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(hidden, weight, scale)
        return (wide * scale).type_as(hidden).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        hidden, weight, scale = ctx.saved_tensors
        normalized = hidden.float() * scale
        of_weight = of_hidden = None
        if ctx.needs_input_grad[1]:
            of_weight = (gradient * normalized.type_as(hidden)).flatten(0, -2).sum(0)
        if ctx.needs_input_grad[0]:
            weighted = (gradient * weight).float()
            along = (weighted * normalized).mean(-1, keepdim=True)
            of_hidden = weighted.sub_(normalized.mul_(along)).mul_(scale).type_as(hidden)
        return of_hidden, of_weight, None


class Rotation(torch.autograd.Function):
    """The rotary embedding of [t, b, heads, d] by angles [t, 1, 1, d]; the halves of d are the two coordinates."""

    @staticmethod
    def forward(ctx: Any, line: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        ctx.save_for_backward(cosines, sines)
        return _rotated(line, cosines, sines, backward=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _rotated(gradients[0], *ctx.saved_tensors, backward=True), None, None


def _rotated(line: Tensor, cosines: Tensor, sines: Tensor, *, backward: bool) -> Tensor:
    """Rotate by the angles, or for the backward pass apply the transposed map."""
    result = line * cosines
    (first, second), (first_sine, second_sine) = line.chunk(2, -1), sines.chunk(2, -1)
    into_first, into_second = result.chunk(2, -1)
    if backward:
        into_first.add_(second * second_sine)
        into_second.sub_(first * first_sine)
    else:
        into_first.sub_(second * first_sine)
        into_second.add_(first * second_sine)
    return result


class SwiGLU(torch.autograd.Function):
    """``silu(gate) * up`` of [..., 2 f], whose halves are gate and up; returns [..., f]."""

    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        ctx.save_for_backward(both)
        gate, up = both.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gradient,) = gradients
        (both,) = ctx.saved_tensors
        gate, up = both.chunk(2, -1)
        result = torch.empty_like(both)
        of_gate, of_up = result.chunk(2, -1)
        torch.mul(gradient, F.silu(gate), out=of_up)
        torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=of_gate)
        return result
