"""What runs on CUDA against what runs on a CPU: the functions of both, on a CPU."""

from __future__ import annotations

import contextlib
import inspect
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from megatron_vl.backends import core, kernels


def _exact_rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm in Qwen's steps."""
    wide = hidden.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale).type_as(hidden) * weight


def _rows(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = (3 * torch.randn(64, 1, 48, generator=generator)).to(dtype).requires_grad_()
    weight = (1 + 0.2 * torch.randn(48, generator=generator)).to(dtype).requires_grad_()
    return hidden, weight, torch.randn(64, 1, 48, generator=generator).to(dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1.2e-2)])
def test_the_fused_norm_is_the_exact_one_but_for_one_rounding(dtype: torch.dtype, tolerance: float) -> None:
    hidden, weight, gradient = _rows(dtype)
    both = []
    for norm in (_exact_rms_norm, kernels.fused_rms_norm):
        output = norm(hidden, weight, 1e-6)
        assert output.dtype == dtype
        both.append((output, *torch.autograd.grad(output, (hidden, weight), gradient)))
    for found, expected in zip(both[1], both[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def test_the_fused_norm_is_not_further_from_the_truth() -> None:
    hidden, weight, _ = _rows(torch.bfloat16)
    wide = hidden.double()
    truth = wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.double()
    errors = [
        float((norm(hidden, weight, 1e-6).double() - truth).abs().mean())
        for norm in (_exact_rms_norm, kernels.fused_rms_norm)
    ]
    assert errors[1] <= errors[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cpu_computes_the_exact_norm(dtype: torch.dtype) -> None:
    hidden, weight, gradient = _rows(dtype)
    found, expected = kernels.rms_norm(hidden, weight, 1e-6), _exact_rms_norm(hidden, weight, 1e-6)
    assert torch.equal(found, expected)
    derived = [torch.autograd.grad(output, (hidden, weight), gradient) for output in (found, expected)]
    for one, other in zip(*derived, strict=True):
        tolerance = 1e-6 if dtype == torch.float32 else 1e-2  # autograd rounds once more on the way
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * float(other.abs().max()))


def test_a_frozen_norm_passes_the_gradient_on() -> None:
    hidden, weight, gradient = _rows(torch.float32)
    (expected,) = torch.autograd.grad(_exact_rms_norm(hidden, weight, 1e-6), hidden, gradient)
    (found,) = torch.autograd.grad(kernels.rms_norm(hidden, weight.detach(), 1e-6), hidden, gradient)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rotation_has_the_bits_of_its_steps(dtype: torch.dtype) -> None:
    """Of a line that is a part of a larger tensor, as queries and keys are."""
    generator = torch.Generator().manual_seed(0)
    lines = torch.randn(7, 1, 3, 36, generator=generator).to(dtype).requires_grad_()
    angles = torch.randn(7, 1, 1, 12, generator=generator)
    table = (angles.cos().to(dtype), angles.sin().to(dtype))
    gradient = torch.randn(7, 1, 3, 12, generator=generator).to(dtype)
    found, expected = (rotate(lines[..., 12:24], *table) for rotate in (kernels.rotate, kernels._rotate))
    assert torch.equal(found, expected)
    derived = [torch.autograd.grad(output, lines, gradient)[0] for output in (found, expected)]
    assert torch.equal(*derived)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_has_the_bits_of_its_steps(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    both = torch.randn(5, 1, 22, generator=generator).to(dtype).requires_grad_()
    gradient = torch.randn(5, 1, 11, generator=generator).to(dtype)
    gate, up = both.chunk(2, dim=-1)
    expected = torch.nn.functional.silu(gate) * up
    found = core.bias_swiglu(both, None, False, False)
    assert torch.equal(found, expected)
    derived = [torch.autograd.grad(output, both, gradient)[0] for output in (found, expected)]
    assert torch.equal(*derived)


def test_a_cpu_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "can_compile", lambda: True)
    monkeypatch.setattr(kernels, "_compiled", None)
    hidden, weight, _ = _rows(torch.float32)
    assert torch.equal(kernels.bias_gelu(hidden, weight), torch.nn.functional.gelu(hidden + weight))


@pytest.mark.parametrize("missing", [None, "triton", "compiler", "headers"])
def test_compiling_takes_triton_a_compiler_and_headers(monkeypatch: pytest.MonkeyPatch, missing: str | None) -> None:
    """Without one of them the steps run as they are: a run must not end at its first kernel."""
    monkeypatch.setattr(kernels, "find_spec", lambda _: None if missing == "triton" else object())
    there = [] if missing == "compiler" else ["gcc"]
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if name in there else None)
    monkeypatch.setattr(Path, "is_file", lambda _: missing != "headers")
    assert kernels.can_compile.__wrapped__() is (missing is None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_gradients_are_added_up_in_fp32(dtype: torch.dtype) -> None:
    """On a CPU torch does not add products of half precision to fp32, so the product comes first."""
    generator = torch.Generator().manual_seed(0)
    rows, gradients = (torch.randn(64, size, generator=generator).to(dtype) for size in (24, 16))
    total = torch.randn(16, 24, generator=generator)
    expected = total + (gradients.t() @ rows).float()
    kernels.add_weight_gradient(rows, gradients, total)
    torch.testing.assert_close(total, expected, rtol=0, atol=1e-5)


def test_where_torch_adds_products_to_fp32_it_is_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def addmm(start: Tensor, left: Tensor, right: Tensor, *, out_dtype: torch.dtype, out: Tensor) -> None:
        assert start is out and out.dtype == out_dtype == torch.float32 and left.dtype == right.dtype == torch.bfloat16
        out += left.float() @ right.float()

    monkeypatch.setattr(torch, "addmm", addmm)
    assert kernels._adds_in_fp32.__wrapped__(torch.device("cpu"), torch.bfloat16), "it is tried"
    monkeypatch.setattr(kernels, "_adds_in_fp32", lambda *_: True)
    generator = torch.Generator().manual_seed(0)
    rows, gradients = (torch.randn(64, size, generator=generator).bfloat16() for size in (24, 16))
    total = torch.ones(16, 24)
    kernels.add_weight_gradient(rows, gradients, total)
    torch.testing.assert_close(total, 1.0 + gradients.float().t() @ rows.float())


@pytest.mark.parametrize("broken", [RuntimeError, TypeError, None])
def test_a_torch_that_cannot_is_found_out(monkeypatch: pytest.MonkeyPatch, broken: type[Exception] | None) -> None:
    """Also one that does not raise and gives something else."""

    def addmm(*_: Any, **__: Any) -> None:
        if broken:
            raise broken("not for this device")

    monkeypatch.setattr(torch, "addmm", addmm)
    assert not kernels._adds_in_fp32.__wrapped__(torch.device("cpu"), torch.bfloat16)


@pytest.mark.parametrize(("capability", "masked", "chosen"), [
    ((9, 0), False, True), ((9, 0), True, False), ((8, 0), False, False),
])  # fmt: skip
def test_cudnn_comes_first_on_hopper_for_lengths_that_stay(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], masked: bool, chosen: bool
) -> None:
    """It plans for each form anew, which a token at a time would wait for."""
    asked: list[Any] = []

    @contextlib.contextmanager
    def record(backends: list[Any], *, set_priority: bool) -> Iterator[None]:
        assert set_priority and backends[0] == SDPBackend.CUDNN_ATTENTION and len(backends) == 4
        asked.append(backends)
        yield

    fastest = kernels._fastest
    monkeypatch.setattr(kernels, "_fastest", lambda _: fastest(torch.device("cuda")))
    monkeypatch.setattr(kernels, "sdpa_kernel", record)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    line = torch.ones(1, 2, 3, 8)
    mask = torch.ones(3, 3, dtype=torch.bool) if masked else None
    assert torch.equal(kernels.attention(line, line, line, mask), line)
    assert bool(asked) is chosen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_lines_need_cuda_and_half_precision(dtype: torch.dtype) -> None:
    assert not kernels.has_varlen(torch.device("cpu"), dtype)
    assert kernels.has_varlen(torch.device("cuda"), dtype) is (dtype == torch.bfloat16)


@pytest.mark.parametrize("older", [False, True])
def test_both_forms_of_torch_s_packed_attention_are_asked_for_a_causal_one(
    monkeypatch: pytest.MonkeyPatch, older: bool
) -> None:
    """torch 2.10 says is_causal; later ones have a window."""
    given: list[dict[str, Any]] = []

    def before(query: Tensor, *_: Any, is_causal: bool = False) -> Tensor:
        given.append({"is_causal": is_causal})
        return query

    def since(query: Tensor, *_: Any, window_size: tuple[int, int] = (-1, -1)) -> Tensor:
        given.append({"window_size": window_size})
        return query

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", before if older else since)
    line = torch.ones(7, 3, 16)
    found = kernels.varlen_attention([line, line, line], torch.tensor([0, 7], dtype=torch.int32), 7, 0.5)
    assert given == [{"is_causal": True} if older else {"window_size": (-1, 0)}]
    assert torch.equal(found, line * 2.0), "the default scale is a quarter here, so queries are doubled"


@pytest.mark.skipif(find_spec("torch.nn.attention.varlen") is None, reason="torch before 2.10")
def test_the_installed_torch_has_one_of_the_two_forms() -> None:
    from torch.nn.attention.varlen import varlen_attn

    names = list(inspect.signature(varlen_attn).parameters)
    assert names[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert "window_size" in names or "is_causal" in names
