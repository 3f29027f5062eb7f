"""With FP8, every weight is quantized anew in every step, in every chunk and in a vision part that every rank holds.

Otherwise training goes on silently against the weights of its first step. Stand-ins for Transformer Engine's layers
keep copies as these do (``tests/helpers/quantizing.py``).
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vl.config.schema import RunConfig
from megatron_vl.planning.parameters import in_fp8, model_tensors
from tests.helpers.quantizing import STEPS, Passes, Trained, saved_and_loaded, train_with_copies
from tests.helpers.ranks import RankPools
from tests.helpers.tiny import tiny_config

VIRTUAL = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
DATA = {"vision_parallel": "data", "vision_micro_batch_size": 2}
OVERLAP = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}


def _config(parallel: dict[str, Any] | None = None, **training: Any) -> RunConfig:
    settings = {"fp8_format": "hybrid", "fp8_parts": "both"} | training
    return tiny_config(parallel=parallel or {}, training=settings)


CASES: dict[str, tuple[int, RunConfig]] = {
    "one process": (1, _config()),
    "pipeline": (2, _config({"pipeline_model_parallel_size": 2})),
    "virtual pipeline": (2, _config(VIRTUAL)),
    "tensor and sequence": (2, _config({"tensor_model_parallel_size": 2, "sequence_parallel": True})),
    "weights gathered during the pass": (2, _config(OVERLAP)),
    "recomputed": (1, _config(recompute_granularity="full")),
    "vision on every rank, encoded twice": (2, _config({"pipeline_model_parallel_size": 2} | DATA)),
    "vision on every rank, kept": (2, _config({"tensor_model_parallel_size": 2, "vision_recompute": False} | DATA)),
    "vision on every rank, layers recomputed": (
        1, _config({"vision_recompute": False} | DATA, recompute_granularity="full"),
    ),
    "delayed": (2, _config({"pipeline_model_parallel_size": 2}, fp8_recipe="delayed")),
    "language alone": (1, _config(fp8_parts="language")),
    "first and last layers in bf16": (
        2, _config(VIRTUAL, first_last_layers_bf16=True, num_layers_at_end_in_bf16=2),
    ),
    "frozen tower": (2, _config({"pipeline_model_parallel_size": 2}, freeze_vision=True)),
}  # fmt: skip


def _layer_of(name: str) -> int:
    match = re.search(r"\.layers\.(\d+)\.", name)
    assert match is not None
    return int(match[1])


def _expected(config: RunConfig) -> set[str]:
    """The linear layers of the model that compute in FP8, as the plan counts them."""
    return {spec.name.removesuffix(".weight") for spec in model_tensors(config.model) if in_fp8(spec.name, config)}


@pytest.mark.parametrize("case", CASES)
def test_weights_are_quantized_anew_in_every_step(ranks: RankPools, case: str) -> None:
    size, config = CASES[case]
    found: list[Trained] = ranks(size).run(train_with_copies, config)
    names = {name for rank in found for name, passes in rank.steps[0].items() if passes.copies}
    assert names == _expected(config)
    for rank in found:
        for step, linears in enumerate(rank.steps):
            for name, passes in linears.items():
                _check(config, name, passes)
                if step and passes.copies and not (config.training.freeze_vision and name.startswith("vision")):
                    before = rank.steps[step - 1][name]
                    assert not torch.equal(passes.copies[0], before.copies[-1]), f"{name} trains"
        assert not any(passes.copies for passes in rank.validated.values()), "a validation computes in bf16"
    recomputed = config.training.recompute_granularity == "full"
    assert [bool(rank.again) for rank in found] == [recomputed] * size


def _check(config: RunConfig, name: str, passes: Passes) -> None:
    assert not passes.stale, f"{name} was multiplied with a weight of an earlier step {passes.stale} times"
    assert not any(passes.replacing[1:]), f"{name}: a later backward pass would replace the gradients of earlier ones"
    if passes.copies:
        assert passes.number == (None if config.training.fp8_recipe == "delayed" else _layer_of(name))


def test_every_step_has_as_many_passes_as_micro_batches(ranks: RankPools) -> None:
    """Four of each layer in each step; recomputed ones twice."""
    for recompute, expected in ((None, 4), ("full", 8)):
        (trained,) = ranks(1).run(train_with_copies, _config(recompute_granularity=recompute))
        counts = {len(passes.copies) for linears in trained.steps for passes in linears.values()}
        assert counts == {expected}
        assert trained.again == (STEPS * 4 * 8 if recompute else 0), "eight layers"


@pytest.mark.parametrize("parallel", [VIRTUAL, {"pipeline_model_parallel_size": 2} | DATA])
def test_a_schedule_that_knows_nothing_of_fp8_would_be_seen(ranks: RankPools, parallel: dict[str, Any]) -> None:
    """Then each weight is quantized once, and every later step is wrong."""
    for rank in ranks(2).run(train_with_copies, _config(parallel), False):
        assert all(not passes.stale for passes in rank.steps[0].values())
        for linears in rank.steps[1:]:
            assert all(passes.stale == len(passes.copies) > 0 for passes in linears.values() if passes.copies)


def test_checkpoints_hold_what_they_hold_without_fp8(ranks: RankPools, tmp_path: Path) -> None:
    """Weights and optimizer under their names, and nothing of the copies or of Transformer Engine's own states."""
    plain = replace(_config(), training=tiny_config().training)
    (fp8,) = ranks(1).run(saved_and_loaded, _config(), tmp_path / "fp8")
    (bf16,) = ranks(1).run(saved_and_loaded, plain, tmp_path / "bf16")
    assert fp8 == bf16 and {spec.name for spec in model_tensors(plain.model)} < set(fp8)
