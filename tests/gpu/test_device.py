"""One device computes what the others do: parity, checkpoints, resumes, layouts, determinism, the optimizer.

Tests marked ``gpu`` need CUDA. The others run on a CPU too, which proves the functions that measure. Run them alone
(``python -m pytest tests/gpu``): the other tests are about the CPU, and want CUDA_VISIBLE_DEVICES to be empty.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu import parity, stepping
from tests.gpu.differences import assert_met, relative
from tests.helpers.ranks import RankPools

TE = "transformer_engine"
gpu = pytest.mark.gpu
BACKENDS = ["local", pytest.param(TE, marks=gpu)]


@pytest.mark.parametrize("span", ["segment", "row"])
def test_local_bf16_is_as_near_to_fp32_as_rounding(ranks: RankPools, span: str) -> None:
    assert_met(ranks(1).run(parity.parity, span)[0])


@gpu
@pytest.mark.parametrize("span", ["segment", "row"])
def test_transformer_engine_is_as_near_to_fp32_as_local(ranks: RankPools, span: str) -> None:
    assert_met(ranks(1).run(parity.parity, span, [TE])[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_resume_changes_no_bit(ranks: RankPools, tmp_path: Path, backend: str) -> None:
    assert_met(ranks(1).run(_resume_bf16, backend, tmp_path)[0])


def _resume_bf16(start: Any, backend: str, folder: Path) -> Any:
    return stepping.resume(start, backend, folder, bf16=True)


@pytest.mark.parametrize(
    ("writer", "reader"),
    [
        ("local", "local"),
        pytest.param("local", TE, marks=gpu),
        pytest.param(TE, "local", marks=gpu),
        pytest.param(TE, TE, marks=gpu),
    ],
)
def test_a_checkpoint_loads_in_either_backend(ranks: RankPools, tmp_path: Path, writer: str, reader: str) -> None:
    assert_met(ranks(1).run(stepping.exchange, writer, reader, tmp_path)[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_deterministic_mode_repeats_every_bit(ranks: RankPools, backend: str) -> None:
    assert_met(ranks(1).run(stepping.determinism, backend)[0])


@pytest.mark.parametrize("layout", stepping.LAYOUTS, ids=lambda layout: layout.name)
def test_two_ranks_on_one_device_compute_what_one_does(ranks: RankPools, layout: stepping.Layout) -> None:
    config = stepping.layout_config(layout.parallel)
    one = ranks(1).run(stepping.step_on_one_device, stepping.layout_config({}))
    assert_met(stepping.against_one_rank(layout.name, ranks(2).run(stepping.step_on_one_device, config), one))


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_ranks_in_bf16_compute_nearly_what_one_does(ranks: RankPools, backend: str) -> None:
    one, two = (stepping.fused_config(backend, parallel) for parallel in ({}, stepping.FUSED_LAYOUT.parallel))
    exact = ranks(1).run(stepping.step_on_one_device, one)
    found = ranks(2).run(stepping.step_on_one_device, two)
    assert_met(stepping.against_one_rank(backend, found, exact, allowed=parity.BF16_GRADIENT))


def test_our_adamw_is_torchs() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assert_met(stepping.optimizers(torch.optim.AdamW, device))


@gpu
def test_our_adamw_is_transformer_engines() -> None:
    optimizers = pytest.importorskip("transformer_engine.pytorch.optimizers", reason="no Transformer Engine")
    assert_met(stepping.optimizers(optimizers.FusedAdam, torch.device("cuda")))


def test_a_nan_is_never_near_enough() -> None:
    nothing = torch.full((3,), float("nan"))
    difference = parity.Difference("x", relative(nothing, torch.ones(3)), 1.0)
    with pytest.raises(AssertionError, match="x"):
        assert_met([difference])
