"""A Transformer Engine that is installed but broken disturbs no run that does not ask for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
BROKEN = "raise FileNotFoundError('Could not find shared object file for Transformer Engine torch lib.')"
PREPARE = """
from megatron_vl.backends.platform import prepare_process
prepare_process()
from megatron_vl.model.backend import select_backend
from megatron_vl.errors import ConfigError
print(select_backend("local").name)
try:
    select_backend("transformer_engine")
except ConfigError as error:
    print(error)
"""


def _run(packages: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": f"{packages}:{ROOT}", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-W", "ignore", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine" / "__init__.py").write_text("")
    (tmp_path / "transformer_engine" / "pytorch.py").write_text(BROKEN)
    return tmp_path


def test_a_broken_one_looks_as_if_it_were_absent(packages: Path) -> None:
    done = _run(packages, "-c", PREPARE)
    assert done.returncode == 0, done.stderr
    local, refusal = done.stdout.splitlines()
    assert local == "local" and refusal.startswith("parallel.backend: transformer_engine cannot be imported")
    assert done.stderr.count("Transformer Engine is installed but broken, and left out (Could not find") == 1


@pytest.mark.parametrize(
    "command",
    [
        ("generate", "--checkpoint", "nowhere", "--inputs", "{folder}/inputs.jsonl", "--output", "{folder}/out"),
        ("evaluate_loss", "--checkpoint", "nowhere", "--data-path", "nothing"),
        ("convert_checkpoint", "import", "nowhere", "{folder}/imported"),
    ],
    ids=lambda command: command[0],
)
def test_commands_reach_their_own_errors(packages: Path, command: tuple[str, ...]) -> None:
    """Whatever they import of Megatron-Core comes after it was hidden."""
    (packages / "inputs.jsonl").write_text('{"prompt": "What is this?"}')
    tool, *arguments = (word.format(folder=packages) for word in command)
    done = _run(packages, f"tools/{tool}.py", *arguments)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "nowhere" in done.stderr or "nothing" in done.stderr
