"""The first line of every tool, before anything can be said about its arguments."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from megatron_vl.cli import start


def _importing_fails(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(importlib, "import_module", fail)


def test_a_package_that_is_not_installed_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is what happens to a tool outside its environment."""
    _importing_fails(monkeypatch, ModuleNotFoundError("No module named 'tqdm'", name="tqdm"))
    assert start.run("prepare") == 2
    said = capsys.readouterr().err
    assert said.startswith("error: Python's package tqdm is not installed for ") and "source .venv/bin/activate" in said


def test_a_module_of_ours_that_is_missing_is_a_fault_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    _importing_fails(monkeypatch, ModuleNotFoundError("No module", name="megatron_vl.cli.nothing"))
    with pytest.raises(ModuleNotFoundError):
        start.run("nothing")
