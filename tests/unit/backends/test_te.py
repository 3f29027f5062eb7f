"""What Transformer Engine's backend refuses, tested without the package: a stand-in for it is imported."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_vl.backends import te
from megatron_vl.backends.attention_inputs import PackedLine
from megatron_vl.errors import ConfigError
from megatron_vl.model import build
from tests.helpers.tiny import tiny_config


def _installed(
    monkeypatch: pytest.MonkeyPatch,
    number: str = "2.9.0",
    *,
    usable: bool = True,
    flash_attn: str | None = None,
    core: str = "0.16.1",
) -> None:
    """Packages of these versions which have nothing in them."""
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    versions = {"transformer_engine": number, "flash_attn": flash_attn}

    def version(name: str) -> str:
        if (found := versions[name]) is None:
            raise PackageNotFoundError(name)
        return found

    monkeypatch.setattr(te, "version", version)
    monkeypatch.setattr(te, "installed_core", lambda: core)
    extension = SimpleNamespace(HAVE_TE=usable)
    monkeypatch.setitem(sys.modules, "megatron.core.extensions.transformer_engine", extension)


@pytest.mark.parametrize(
    ("core", "number"), [("0.16.1", "2.9.0"), ("0.16.1", "2.11.0+c188b53"), ("0.19.2", "2.9.0"), ("0.19.2", "2.20.2")]
)
def test_versions_that_megatron_core_takes_are_taken(monkeypatch: pytest.MonkeyPatch, core: str, number: str) -> None:
    _installed(monkeypatch, number, core=core)
    te.TransformerEngineBackend()


@pytest.mark.parametrize(
    ("core", "number", "usable", "told"),
    [
        (
            "0.16.1",
            "2.8.0",
            True,
            r"has version 2\.8\.0, and Megatron-Core 0\.16\.1 takes those from 2\.9 and below 2\.12\.",
        ),
        ("0.16.1", "2.12.0", True, r"has version 2\.12\.0"),
        ("0.19.2", "2.8.0", True, r"has version 2\.8\.0, and Megatron-Core 0\.19\.2 takes those from 2\.9\."),
        ("0.19.2", "2.11.0", False, "lacks a part that Megatron-Core imports"),
    ],
)
def test_others_are_refused(monkeypatch: pytest.MonkeyPatch, core: str, number: str, usable: bool, told: str) -> None:
    _installed(monkeypatch, number, usable=usable, core=core)
    with pytest.raises(ConfigError, match=rf"parallel.backend: transformer_engine {told}.*--backend local"):
        te.TransformerEngineBackend()


@pytest.mark.parametrize("error", [ImportError, RuntimeError, FileNotFoundError, AssertionError])
def test_whatever_a_broken_installation_raises_is_one_message(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    class Broken:
        def find_spec(self, name: str, *_: Any) -> None:
            if name == "transformer_engine":
                raise error("no binding")

    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    monkeypatch.delitem(sys.modules, "transformer_engine", raising=False)
    with pytest.raises(ConfigError, match=r"cannot be imported \(no binding\).*see Dockerfile.*--backend local"):
        te.TransformerEngineBackend()


@pytest.mark.parametrize(
    ("capability", "flash_attn", "taken"),
    [((8, 0), None, False), ((8, 0), "2.0.9", False), ((8, 0), "2.8.3", True), ((9, 0), None, True)],
)
def test_gpus_before_hopper_need_flash_attn(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], flash_attn: str | None, taken: bool
) -> None:
    _installed(monkeypatch, flash_attn=flash_attn)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    with contextlib.nullcontext() if taken else pytest.raises(ConfigError, match="flash-attn 2.1 or newer.*--backend"):
        te.TransformerEngineBackend()


def test_spans_above_the_native_length_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _installed(monkeypatch)
    backend, line = te.TransformerEngineBackend(), PackedLine.of([7, 3000, 3])
    with pytest.raises(ConfigError, match=r"a span of 3000 tokens .*native_seq_length.* --backend local"):
        backend.long_attention_inputs(line, torch.zeros(3010, 1, 1, 16), None, dtype=torch.float32)


@pytest.mark.parametrize(("length", "validates", "ntk", "refused"), [
    (4096, True, True, True), (4096, False, True, False), (2048, True, True, False), (4096, True, False, False),
])  # fmt: skip
def test_a_run_that_would_be_refused_at_its_validation_does_not_start(
    monkeypatch: pytest.MonkeyPatch, length: int, validates: bool, ntk: bool, refused: bool
) -> None:
    """A run that is not refused goes on to the ranks, of which there are none here."""
    _installed(monkeypatch)
    sets = ("valid",) if validates else ()  # at the end of the run, whatever the interval
    config = tiny_config(
        data={"seq_length": length, "valid_data_path": sets}, parallel={"backend": "transformer_engine"}
    )
    language = replace(config.model.language, use_dynamic_ntk=ntk, use_logn_attn=ntk)
    config = replace(config, model=replace(config.model, language=language))
    no_ranks: Any = SimpleNamespace()
    if refused:
        expected = r"data.seq_length 4096 .*native_seq_length 2048.*--backend local.*--native-seq-length 4096"
        with pytest.raises(ConfigError, match=expected):
            build.build_model(config, no_ranks)
    else:
        with pytest.raises(AttributeError, match="SimpleNamespace.* has no attribute"):
            build.build_model(config, no_ranks)
