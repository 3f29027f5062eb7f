"""Packages that cannot work here disturb no run that does not ask for them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
BROKEN = "raise FileNotFoundError('Could not find shared object file for Transformer Engine torch lib.')"
ON_CUDA = """
import sys, torch
torch.cuda.is_available = lambda: True
from megatron_vl.backends.presence import hide_unusable_packages
hide_unusable_packages()
print(sys.modules["transformer_engine"])
"""
ON_A_CPU = """
from megatron_vl.backends.platform import prepare_process
prepare_process()
from megatron.core.optimizer.clip_grads import l2_norm_impl
print(l2_norm_impl.__module__)
from megatron_vl.model.backend import select_backend
from megatron_vl.errors import ConfigError
try:
    select_backend("transformer_engine")
except ConfigError as error:
    print(error)
"""
APEX = """
def multi_tensor_l2norm(*arguments):
    raise RuntimeError("CUDA error: no CUDA-capable device is detected")
multi_tensor_scale = multi_tensor_applier = multi_tensor_l2norm
class FusedAdam:
    pass
FusedSGD = FusedAdam
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
    done = _run(packages, "-c", ON_CUDA)
    assert done.returncode == 0 and done.stdout == "None\n", done.stderr
    assert done.stderr.count("Transformer Engine is installed but broken, and left out (Could not find") == 1


@pytest.mark.parametrize("package", ["transformer_engine/pytorch/optimizers", "apex/multi_tensor_apply", "amp_C"])
def test_packages_for_cuda_alone_are_not_used_on_a_cpu(tmp_path: Path, package: str) -> None:
    """NVIDIA's image has them, also on a machine without GPU. There the first step ended with a CUDA error."""
    place = tmp_path / package
    place.mkdir(parents=True)
    (place / "__init__.py").write_text(APEX)
    done = _run(tmp_path, "-c", ON_A_CPU)
    assert done.returncode == 0, done.stderr
    norm, refusal = done.stdout.splitlines()
    assert norm == "megatron_vl.backends.core"
    assert refusal.startswith("parallel.backend: transformer_engine needs a CUDA device, and none was found")


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
