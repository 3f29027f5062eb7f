from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from megatron_vl.backends import fp8, te
from megatron_vl.backends.local.backend import LocalBackend
from megatron_vl.errors import ConfigError
from megatron_vl.model import backend
from megatron_vl.model.backend import select_backend

HAS_TRANSFORMER_ENGINE = importlib.util.find_spec("transformer_engine") is not None


@pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA, auto may choose Transformer Engine")
def test_auto_is_local_without_cuda() -> None:
    assert isinstance(select_backend("auto"), LocalBackend)
    assert isinstance(select_backend("local"), LocalBackend)


@pytest.mark.parametrize(
    ("bf16", "installed", "usable", "chosen", "told"),
    [
        (True, True, True, "transformer_engine", ""),
        (False, True, True, "local", "TF32"),
        (True, False, False, "local", "not installed"),
        (True, True, False, "local", "version 9.9"),
    ],
)
def test_auto_falls_back_to_local_and_says_why(
    monkeypatch: pytest.MonkeyPatch, bf16: bool, installed: bool, usable: bool, chosen: str, told: str
) -> None:
    def check() -> None:
        if not usable:
            raise ConfigError("it has version 9.9")

    said: list[str] = []
    monkeypatch.setattr(te, "_check_package", check)
    monkeypatch.setattr(te, "_check_attention", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backend, "find_spec", lambda _: object() if installed else None)
    monkeypatch.setattr(backend, "log_rank_0", lambda message, **_: said.append(message))
    assert select_backend("auto", bf16=bf16).name == chosen
    assert len(said) == bool(told) and all("backend local: " in line and told in line for line in said)


@pytest.mark.skipif(HAS_TRANSFORMER_ENGINE, reason="Transformer Engine is installed")
def test_a_backend_that_is_not_there_is_refused_with_advice() -> None:
    with pytest.raises(ConfigError, match=r"parallel.backend: transformer_engine .*see Dockerfile.* --backend local"):
        select_backend("transformer_engine")


@pytest.mark.skipif(HAS_TRANSFORMER_ENGINE, reason="Transformer Engine is installed")
@pytest.mark.parametrize("name", ["auto", "transformer_engine"])
def test_fp8_has_no_other_backend(name: Any) -> None:
    """``auto`` does not fall back to the local one, which would compute in bf16."""
    with pytest.raises(ConfigError, match="parallel.backend: transformer_engine"):
        select_backend(name, bf16=True, fp8_recipe="tensorwise")


def test_fp8_asks_for_what_the_device_has(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(te, "_check_package", lambda: None)
    monkeypatch.setattr(te, "_check_attention", lambda: None)
    monkeypatch.setattr(fp8, "check_device", asked.append)
    assert select_backend("auto", bf16=True, fp8_recipe="mxfp8").name == "transformer_engine"
    assert asked == ["mxfp8"]
