"""``--dry-run --build``: a run of many ranks, rehearsed by one command."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_vl.config.load import load_config
from tests.integration.test_launcher import environment

ROOT = Path(__file__).resolve().parents[2]
STAGE_2 = "examples/qwen_vl/stage2_multitask.yaml"
FITS = "# every message and every collective finds its other side, and no rank waits for ever\n"


def rehearse(*words: str) -> str:
    """What the command writes; it must succeed."""
    command = [sys.executable, "tools/train.py", *words, "--dry-run", "--build"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("more", ["", "--bf16 --fp8-format hybrid"])
def test_the_output_says_what_each_rank_does_and_is_a_recipe(tmp_path: Path, more: str) -> None:
    """FP8 is not rehearsed, but stays in the recipe."""
    flags = f"--preset tiny --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 {more}".split()
    out = rehearse(*flags, "--world-size", "8")
    assert "process groups of 8 ranks, and a step of the 6 ranks that differ" in out
    assert "numbers compared with the plan: 0 differ" in out and out.endswith(FITS)
    (tmp_path / "printed.yaml").write_text(out, encoding="utf-8")
    assert load_config(tmp_path / "printed.yaml") == load_config(None, flags)


@pytest.mark.long
def test_a_thousand_ranks_of_the_published_model_need_little_memory() -> None:
    flags = "--tensor-model-parallel-size 4 --pipeline-model-parallel-size 4".split()
    out = rehearse(STAGE_2, *flags, "--world-size", "1024")
    assert "a step of the 12 ranks that differ, with 8 of its 16 micro-batches" in out
    assert "numbers compared with the plan: 0 differ" in out and out.endswith(FITS)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 2 * 2**20  # kB, of the largest process
