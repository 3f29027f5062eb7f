"""Packages that are broken in any way are found, and the next ones still are."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from megatron_vl.doctor.facts import Package
from megatron_vl.doctor.packages import probe_packages

SOUND = "sound"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the path."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / f"{SOUND}.py").write_text("print('loaded')")
    return tmp_path


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("raise ImportError('libx.so:\\n no such file')", "ImportError: libx.so: no such file"),
        ("raise AssertionError", "AssertionError"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("import no_such_thing", "ModuleNotFoundError: No module named 'no_such_thing'"),
        ("def", "SyntaxError: invalid syntax (broken.py, line 1)"),
        ("import os; print('symbol lookup error'); os._exit(127)", "exit status 127 (symbol lookup error)"),
        ("import os; os.kill(os.getpid(), 11)", "its import ended Python with signal 11"),
    ],
)
def test_a_broken_package_is_a_finding_and_no_end(place: Path, code: str, said: str) -> None:
    (place / "broken.py").write_text(code)
    found = probe_packages((SOUND, "broken", "not_there", "json"), patience_s=60).packages
    assert found[SOUND] == Package("") and found["json"] == Package("") and found["not_there"] == Package(None)
    assert found["broken"].version == "" and found["broken"].error.endswith(said) and not found["broken"].works


def test_an_import_that_does_not_end_is_given_up(place: Path) -> None:
    (place / "endless.py").write_text("import time; time.sleep(600)")
    found = probe_packages(("endless",), patience_s=1).packages
    assert found["endless"] == Package("", error="its import did not end within 1 s")


def test_an_apex_that_is_not_nvidias_is_not_imported(place: Path) -> None:
    (place / "apex").mkdir()
    (place / "apex" / "__init__.py").write_text("raise RuntimeError")
    assert probe_packages(("apex",), patience_s=60).packages["apex"] == Package("", lacks=("apex.optimizers",))


def test_an_apex_without_its_kernels_and_a_whole_one(place: Path) -> None:
    (place / "apex" / "optimizers").mkdir(parents=True)
    for folder in (place / "apex", place / "apex" / "optimizers"):
        (folder / "__init__.py").touch()
    assert probe_packages(("apex",), patience_s=60).packages["apex"] == Package("", lacks=("amp_C",))
    (place / "amp_C.py").touch()
    assert probe_packages(("apex",), patience_s=60).packages["apex"] == Package("")


def test_versions_and_other_names_of_modules() -> None:
    import PIL
    import yaml

    found = probe_packages(("pillow", "pyyaml"), patience_s=60).packages
    assert found == {"pillow": Package(PIL.__version__), "pyyaml": Package(yaml.__version__)}
    assert "PIL" in sys.modules  # of this process, in which the test has imported it
