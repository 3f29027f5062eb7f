"""A checkpoint fits a run whose weights have its sizes; what no weight depends on may differ."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_vl.checkpoint.same_model import check_same_model
from megatron_vl.errors import CheckpointError
from tests.helpers.tiny import MODEL


def test_what_evaluation_does_above_the_native_length_may_differ() -> None:
    language = replace(MODEL.language, native_seq_length=4096, use_dynamic_ntk=False, use_logn_attn=False)
    check_same_model(replace(MODEL, language=language, image_size=112), MODEL, Path("iter_0000003"))


def test_every_other_size_that_differs_is_named() -> None:
    saved = replace(
        MODEL, num_bpe_tokens=300, language=replace(MODEL.language, rotary_base=1e6, num_layers=3, native_seq_length=16)
    )
    with pytest.raises(CheckpointError, match="iter_0000003 is of another model") as caught:
        check_same_model(MODEL, saved, Path("iter_0000003"))
    assert "language.rotary_base is 1000000.0 in the checkpoint and 10000.0 in this run" in str(caught.value)
    assert "language.num_layers is 3" in str(caught.value) and "num_bpe_tokens is 300" in str(caught.value)
    assert "native_seq_length" not in str(caught.value)
