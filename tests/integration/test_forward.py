"""``tools/forward.py`` as a user starts it: one process, and torchrun with two ranks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.helpers.ranks import RankPools
from tests.integration.test_docs import environment
from tests.parallel.golden import import_on_rank, read_expected

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def _run(launcher: list[str], folder: Path, output: str, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *launcher, str(ROOT / "tools" / "forward.py"), "--checkpoint", "checkpoint"]
    command += ["--inputs", "in.safetensors", "--output", output, *flags]
    return subprocess.run(command, cwd=folder, env=environment(ROOT), capture_output=True, text=True, timeout=180)


@pytest.fixture(scope="module")
def folder(ranks: RankPools, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden model as a checkpoint, and its two cases as rows of one batch."""
    folder = tmp_path_factory.mktemp("forward")
    ranks(1).run(import_on_rank, folder / "checkpoint")
    expected = read_expected()
    long, short = (expected[f"{name}.input_ids"][0] for name in ("multimodal", "text_only"))
    ids = torch.stack([torch.nn.functional.pad(short, (0, len(long) - len(short))), long])
    labels = torch.stack([torch.full_like(long, -100), expected["multimodal.labels_unshifted"][0]])
    save_file({"input_ids": ids, "pixels": expected["pixels"], "labels": labels}, folder / "in.safetensors")
    return folder


@pytest.fixture(scope="module")
def one_process(folder: Path) -> dict[str, Tensor]:
    """What one process writes, in a folder that was not there."""
    done = _run([], folder, "new/one.safetensors")
    assert done.returncode == 0, done.stderr
    return load_file(folder / "new" / "one.safetensors")


def test_one_process_writes_the_original_s_numbers(one_process: dict[str, Tensor]) -> None:
    expected = read_expected()
    length = expected["text_only.logits"].shape[1]
    for found, value, tolerance in (
        (one_process["logits"][1], expected["multimodal.logits"][0], 2e-5),
        (one_process["logits"][0, :length], expected["text_only.logits"][0], 2e-5),
        (one_process["visual_output"], expected["visual_output"], 1e-5),
    ):
        assert found.shape == value.shape and (found - value).abs().max() <= tolerance * value.abs().max()
    shown = {name: value for name, value in expected.items() if name.startswith("grad_norm")}
    assert one_process.keys() == {"logits", "visual_output", "loss", *shown}
    for name, value in {"loss": expected["multimodal.loss"], **shown}.items():
        assert one_process[name].item() == pytest.approx(value.item(), rel=2e-5), name  # as in test_golden.py


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param("", marks=pytest.mark.long),
        "--tensor-model-parallel-size 2",
        pytest.param("--pipeline-model-parallel-size 2", marks=pytest.mark.long),
    ],
)
def test_two_ranks_write_what_one_process_writes(folder: Path, one_process: dict[str, Tensor], flags: str) -> None:
    """Without torchrun, ``tests/parallel/test_golden.py`` and ``test_derived.py`` write the same at every layout."""
    done = _run(TORCHRUN, folder, "new/two.safetensors", *flags.split())
    assert done.returncode == 0, done.stderr
    found = load_file(folder / "new" / "two.safetensors")
    assert found.keys() == one_process.keys()
    for name, value in one_process.items():
        assert (found[name] - value).abs().max() <= 1e-5 * value.abs().max(), name
    assert sorted(path.name for path in (folder / "new").iterdir()) == ["one.safetensors", "two.safetensors"]


@pytest.mark.parametrize(
    ("output", "flags", "says"),
    [
        ("checkpoint", "", "--output checkpoint: cannot be written"),
        ("in.safetensors/out", "", "--output in.safetensors/out: cannot be written"),
        ("refused", "--tensor-model-parallel-size 2", "the run has 1 ranks"),
    ],
)
def test_refused_without_leaving_anything(folder: Path, output: str, flags: str, says: str) -> None:
    before = sorted(folder.iterdir())
    done = _run([], folder, output, *flags.split())
    assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert sorted(folder.iterdir()) == before
