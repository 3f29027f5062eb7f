"""What the published model adds above the native length, as a function of a length or a position."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from megatron_vl.config.schema import LanguageConfig
from megatron_vl.model.rotary import LongContext

QWEN = LongContext(LanguageConfig())


@pytest.mark.parametrize(
    ("length", "alpha"),
    [(0, 1), (1, 1), (1024, 1), (2048, 1), (2049, 3), (4096, 3), (4097, 7), (8192, 7), (8193, 15), (16384, 15)],
)
def test_the_base_grows_with_the_length(length: int, alpha: int) -> None:
    assert QWEN.ntk_alpha(length) == alpha
    assert QWEN.rotary_base(length) == 10000.0 * alpha ** (128 / 126)
    assert QWEN.needed(length) == (length > 2048)


@pytest.mark.parametrize("native", [1, 3, 16, 1000, 2048, 100_003])
def test_every_doubling_has_one_factor(native: int) -> None:
    long = LongContext(LanguageConfig(native_seq_length=native))
    for doublings in range(5):
        first, last = native * 2**doublings + 1, native * 2 ** (doublings + 1)
        assert long.ntk_alpha(first) == long.ntk_alpha(last) == 2 ** (doublings + 2) - 1


def test_queries_are_scaled_above_the_native_length_only() -> None:
    scale = QWEN.query_scale(torch.tensor([-7, 0, 2046, 2047, 2048, 8191, 32766]))
    assert scale is not None and scale.dtype == torch.float32
    expected = [1.0] * 4 + [math.log(i, 2048) for i in (2049, 8192, 32767)]
    assert scale.tolist() == torch.tensor(expected).tolist()


def test_either_can_be_off() -> None:
    no_ntk = LongContext(replace(QWEN.language, use_dynamic_ntk=False))
    assert no_ntk.ntk_alpha(5000) == 1 and no_ntk.needed(5000)
    no_logn = LongContext(replace(QWEN.language, use_logn_attn=False))
    assert no_logn.query_scale(torch.tensor([5000])) is None and no_logn.needed(5000)
    assert not LongContext(replace(no_ntk.language, use_logn_attn=False)).needed(5000)
