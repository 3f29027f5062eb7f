"""What Transformer Engine's backend refuses, tested without the package: a stand-in for it is imported."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_vl.errors import ConfigError
from megatron_vl.model import build
from tests.helpers.tiny import tiny_config

MODULE = "megatron_vl.backends.te"


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The backend over a package that has nothing in it."""
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        if name not in sys.modules:
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    yield importlib.import_module(MODULE).TransformerEngineBackend()
    sys.modules.pop(MODULE, None)


def test_spans_above_the_native_length_are_refused(backend: Any) -> None:
    borders = torch.tensor([0, 7, 3007, 3010])
    with pytest.raises(ConfigError, match=r"a span of 3000 tokens .*native_seq_length.* --backend local"):
        backend.long_attention_inputs(borders, torch.zeros(3010, 1, 1, 16), None)


@pytest.mark.parametrize(("length", "validates", "ntk", "refused"), [
    (4096, True, True, True), (4096, False, True, False), (2048, True, True, False), (4096, True, False, False),
])  # fmt: skip
def test_a_run_that_would_be_refused_at_its_validation_does_not_start(
    backend: Any, monkeypatch: pytest.MonkeyPatch, length: int, validates: bool, ntk: bool, refused: bool
) -> None:
    sets = ("valid",) if validates else ()  # at the end of the run, whatever the interval
    config = tiny_config(data={"seq_length": length, "valid_data_path": sets})
    language = replace(config.model.language, use_dynamic_ntk=ntk, use_logn_attn=ntk)
    config = replace(config, model=replace(config.model, language=language))
    monkeypatch.setattr(build, "select_backend", lambda _: backend)
    monkeypatch.setattr(build, "core_configs", mock.Mock(side_effect=LookupError("it was not refused")))
    expected = r"data.seq_length 4096 .*native_seq_length 2048.*--backend local.*--native-seq-length 4096"
    with pytest.raises(ConfigError if refused else LookupError, match=expected if refused else "not refused"):
        build.build_model(config, mock.Mock())
