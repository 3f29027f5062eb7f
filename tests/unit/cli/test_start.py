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
    _importing_fails(monkeypatch, ModuleNotFoundError("No module named 'nowhere.x'", name="nowhere.x"))
    assert start.run("prepare") == 2
    said = capsys.readouterr().err
    assert (
        said.startswith("error: Python's package nowhere is not installed for ") and "source .venv/bin/activate" in said
    )


@pytest.mark.parametrize("name", ["megatron_vl.cli.nothing", "torch.of.another.version", None])
def test_a_missing_part_of_a_package_is_a_bug(monkeypatch: pytest.MonkeyPatch, name: str | None) -> None:
    _importing_fails(monkeypatch, ModuleNotFoundError("No module", name=name))
    with pytest.raises(ModuleNotFoundError):
        start.run("nothing")
