"""Norms and attention of the local backend against their formulas."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megatron_vl.backends import kernels
from megatron_vl.backends.attention_inputs import PackedLine
from megatron_vl.backends.local.attention import LocalInputs, SpanAttention
from megatron_vl.backends.local.backend import LocalBackend
from megatron_vl.backends.local.norms import LayerNorm, RMSNorm
from megatron_vl.backends.local.spans import group_spans

HEADS, WIDTH = 3, 8
ROUNDING = 2e-6
"""Values of up to 4 are sums in fp32, whose step is 2.4e-7 there, in another order; two steps were found."""


def _config(**fields: Any) -> Any:
    return SimpleNamespace(**({"params_dtype": torch.float32, "sequence_parallel": False} | fields))


def _qkv(length: int, batch: int = 1, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, batch, HEADS, WIDTH, generator=generator, requires_grad=True) for _ in range(3)]


def _by_hand(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None) -> Tensor:
    """softmax(q k / sqrt(d)) v for [s, heads, d] with an explicit mask bool[sq, sk], True = hidden."""
    scores = torch.einsum("qhd,khd->hqk", query, key) / WIDTH**0.5
    if hidden is not None:
        scores = scores.masked_fill(hidden, float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), value).flatten(1)


def _spans(lengths: list[int]) -> LocalInputs:
    return LocalInputs(line=PackedLine.of(lengths), groups=group_spans(lengths))


def _causal(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).triu(1)


@pytest.mark.parametrize("lengths", [[5, 40, 1, 17, 33, 16], [12, 12, 12], [30]], ids=str)
def test_attention_stays_within_spans(lengths: list[int]) -> None:
    """Values and gradients, also where spans of one group differ in length."""
    attention = SpanAttention(_config(), AttnMaskType.causal)
    lines = _qkv(sum(lengths))
    found = attention(*lines, None, packed_seq_params=_spans(lengths))
    assert found.shape == (sum(lengths), 1, HEADS * WIDTH)
    spans = zip(*(line.squeeze(1).split(lengths) for line in lines), strict=True)
    expected = torch.cat([_by_hand(*span, _causal(len(span[0]))) for span in spans])
    torch.testing.assert_close(found.squeeze(1), expected, rtol=0, atol=ROUNDING)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad((found * weights).sum(), lines)
    theirs = torch.autograd.grad((expected * weights.squeeze(1)).sum(), lines)
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference, rtol=0, atol=3 * ROUNDING)  # through two products more


def test_attention_within_a_span_is_torch_s_own() -> None:
    lengths = [5, 40, 17]
    lines = _qkv(sum(lengths))
    found = SpanAttention(_config(), AttnMaskType.causal)(*lines, None, packed_seq_params=_spans(lengths))
    for part, *span in zip(found.split(lengths), *(line.split(lengths) for line in lines), strict=True):
        query, key, value = (line.permute(1, 2, 0, 3) for line in span)
        expected = F.scaled_dot_product_attention(query, key, value, is_causal=True).permute(2, 0, 1, 3).flatten(2)
        torch.testing.assert_close(part, expected, rtol=0, atol=ROUNDING)


def test_where_a_kernel_takes_spans_as_they_are_it_gets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA in half precision: the lines without their batch of one, the borders, and no groups."""
    lengths, given = [5, 40, 17], []

    def record(query: Tensor, key: Tensor, value: Tensor, *others: Any, **options: Any) -> Tensor:
        given.append((query, key, value, *others, options))
        return torch.cat([
            _by_hand(*span, _causal(len(span[0])))
            for span in zip(*(line.split(lengths) for line in (query, key, value)), strict=True)
        ]).view_as(query)  # fmt: skip

    monkeypatch.setattr(kernels, "has_varlen", lambda *_: True)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", record)
    inputs = LocalBackend().attention_inputs(PackedLine.of(lengths), torch.zeros(40, 1, 1, WIDTH), dtype=torch.float32)
    assert inputs.packed.groups == () and inputs.mask is None and inputs.rotary is None
    lines = _qkv(62)
    attention = SpanAttention(_config(), AttnMaskType.causal)
    found = attention(*lines, None, packed_seq_params=inputs.packed)
    torch.testing.assert_close(found, attention(*lines, None, packed_seq_params=_spans(lengths)), rtol=0, atol=ROUNDING)
    ((_, _, value, borders, same, *longest, options),) = given
    assert value.shape == (62, HEADS, WIDTH) and borders is same and borders.tolist() == [0, 5, 45, 62]
    assert borders.dtype == torch.int32 and longest == [40, 40]
    assert all(type(length) is int for length in longest), "no tensor, for which the CPU would wait"


def test_rotary_angles_and_scales_are_applied_to_queries_and_keys_only() -> None:
    """Equal to Megatron-Core's own, bit for bit; the scale comes behind, and to queries alone."""
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

    lengths = [5, 3]
    generator = torch.Generator().manual_seed(3)
    table = torch.randn(5, 1, 1, WIDTH // 2, generator=generator).repeat(1, 1, 1, 2)
    scale = torch.rand(8, generator=generator)
    backend, line = LocalBackend(), PackedLine.of(lengths)
    for dtype in (torch.float32, torch.bfloat16):
        query, key, value = (tensor.to(dtype) for tensor in _qkv(8))
        angles = table.index_select(0, line.positions)
        told = backend.long_attention_inputs(line, angles, scale, dtype=dtype).packed
        plain = backend.attention_inputs(line, table, dtype=dtype).packed
        rotated = [_apply_rotary_pos_emb_bshd(tensor, angles) for tensor in (query, key)]
        assert torch.equal(kernels.rotate(query, *plain.rotary), rotated[0])
        attention = SpanAttention(_config(), AttnMaskType.causal)
        expected = attention(
            rotated[0] * scale.view(-1, 1, 1, 1).to(dtype), rotated[1], value, None, packed_seq_params=_spans(lengths)
        )
        assert torch.equal(attention(query, key, value, None, packed_seq_params=told), expected)


def test_a_boolean_mask_hides_keys() -> None:
    """As generation uses it: fewer queries than keys, another mask for each prompt."""
    attention = SpanAttention(_config(), AttnMaskType.causal)
    (query, _, _), (_, key, value) = _qkv(3, batch=2), _qkv(7, batch=2, seed=1)
    hidden = torch.rand(2, 1, 3, 7, generator=torch.Generator().manual_seed(2)) < 0.5
    hidden[..., -1] = False
    found = attention(query, key, value, hidden)
    for row in range(2):
        expected = _by_hand(query[:, row], key[:, row], value[:, row], hidden[row])
        torch.testing.assert_close(found[:, row], expected, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize(("kind", "hidden"), [(AttnMaskType.causal, True), (AttnMaskType.no_mask, False)])
def test_without_a_mask_the_layer_s_kind_decides(kind: AttnMaskType, hidden: bool) -> None:
    lines = _qkv(9, batch=2)
    found = SpanAttention(_config(), kind)(*lines, None)
    for row in range(2):
        expected = _by_hand(*(line[:, row] for line in lines), _causal(9) if hidden else None)
        torch.testing.assert_close(found[:, row], expected, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_casts_before_it_scales(dtype: torch.dtype) -> None:
    norm = RMSNorm(_config(params_dtype=dtype), 16, eps=1e-6)
    generator = torch.Generator().manual_seed(0)
    norm.weight.data = torch.randn(16, generator=generator).to(dtype)
    hidden = (3 * torch.randn(5, 2, 16, generator=generator)).to(dtype)
    wide = hidden.double()
    normalized = (wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()).float().to(dtype)
    found = norm(hidden)
    assert found.dtype == dtype
    torch.testing.assert_close(found, normalized * norm.weight, rtol=0, atol=ROUNDING if dtype == torch.float32 else 0)


def test_layer_norm_is_its_formula() -> None:
    norm = LayerNorm(_config(), 16, eps=1e-6)
    generator = torch.Generator().manual_seed(0)
    norm.weight.data, norm.bias.data = torch.randn(2, 16, generator=generator)
    hidden = torch.randn(5, 2, 16, generator=generator)
    centered = hidden - hidden.mean(-1, keepdim=True)
    expected = centered / (hidden.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt() * norm.weight + norm.bias
    torch.testing.assert_close(norm(hidden), expected, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_norms_are_marked_for_reduction_under_sequence_parallelism(sequence_parallel: bool) -> None:
    for norm in (LayerNorm, RMSNorm):
        parameters = list(norm(_config(sequence_parallel=sequence_parallel), 4).parameters())
        assert parameters and all(p.sequence_parallel is sequence_parallel for p in parameters)


def test_layers_of_both_towers_do_not_share_a_spec() -> None:
    """Megatron-Core keeps its specs in the module; changing one in place would change them all."""
    backend = LocalBackend()
    vision, language = backend.vision_layer(), backend.language_layer()
    assert vision.submodules.input_layernorm is LayerNorm and language.submodules.input_layernorm is RMSNorm
    assert vision.submodules.self_attention.params == {"attn_mask_type": AttnMaskType.no_mask}
    assert language.submodules.self_attention.params == {"attn_mask_type": AttnMaskType.causal}
