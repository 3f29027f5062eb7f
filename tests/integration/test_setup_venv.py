"""When examples/setup_venv.sh makes a new environment, and when it uses the one that is there."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SETUP = Path(__file__).resolve().parents[2] / "examples" / "setup_venv.sh"
CALL = 'source "$1"; make_venv() { echo made; return 2; }; pip() { :; }; ensure_venv "$2" dev'


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout whose environment has been made and is complete."""
    root = tmp_path / "checkout"
    scripts = root / ".venv" / "bin"
    scripts.mkdir(parents=True)
    for name in ("setup.py", "constraints-cpu.txt"):
        (root / name).touch()
    (scripts / "python").symlink_to(sys.executable)
    (scripts / "activate").write_text(f"VIRTUAL_ENV={root / '.venv'}\n")
    stamp = 'cat "$1/setup.py" "$1/constraints-cpu.txt" | sha256sum | cut -c 1-16'
    found = subprocess.run(["bash", "-c", stamp, "-", str(root)], capture_output=True, text=True, check=True).stdout
    (root / ".venv" / f".installed-{found.strip()}-dev").touch()
    return root


def _makes_one(root: Path) -> bool:
    done = subprocess.run(["bash", "-c", CALL, "-", str(SETUP), str(root)], capture_output=True, text=True, timeout=60)
    assert done.returncode == (2 if done.stdout == "made\n" else 0), done.stderr
    return bool(done.stdout)


def test_an_environment_is_used_again(checkout: Path, tmp_path: Path) -> None:
    assert not _makes_one(checkout)
    (tmp_path / "link").symlink_to(checkout)
    assert not _makes_one(tmp_path / "link"), "the same folder under another name"


def test_a_checkout_that_was_moved_or_copied_gets_its_own(checkout: Path, tmp_path: Path) -> None:
    assert _makes_one(Path(shutil.copytree(checkout, tmp_path / "copied", symlinks=True)))
    assert _makes_one(checkout.rename(tmp_path / "moved"))


def test_one_whose_python_is_gone_is_made_again(checkout: Path) -> None:
    (checkout / ".venv" / "bin" / "python").unlink()
    assert _makes_one(checkout)
