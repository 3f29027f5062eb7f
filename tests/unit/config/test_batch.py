"""Rows of a step never depend on the layout, and ranks are counted with the arithmetic in the message."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vl.config.batch import data_parallel_size, num_microbatches, rows_per_step, with_rows
from megatron_vl.config.load import apply_overrides
from megatron_vl.config.schema import ParallelConfig, RunConfig, TrainingConfig
from megatron_vl.config.validate import check_batch
from megatron_vl.errors import ConfigError


@pytest.mark.parametrize(
    ("samples", "per_row", "rows"),
    [(30_720, 6.3, 4_864), (4_096, 5.5, 768), (128, 3.0, 44), (30_720, 1.0, 30_720), (128, 1.0, 128), (7, 1.0, 7)],
)
def test_the_numbers_in_the_recipes_headers(samples: int, per_row: float, rows: int) -> None:
    assert rows_per_step(samples, per_row) == rows


@settings(max_examples=200, derandomize=True, deadline=None)
@given(st.integers(1, 100_000), st.floats(1.0, 50.0))
def test_rows_are_near_the_quotient_and_as_even_as_can_be(samples: int, per_row: float) -> None:
    exact = samples / per_row
    rows = rows_per_step(samples, per_row)
    near = [n for n in range(int(exact * 0.96), int(exact * 1.04) + 2) if n > 0 and abs(n - exact) <= 0.04 * exact]
    if not near:
        assert rows == max(1, round(exact))
    else:
        assert rows in near
        assert (rows & -rows) == max(n & -n for n in near)


def test_with_rows_replaces_samples_by_rows_once() -> None:
    config = apply_overrides(RunConfig(), {"training.global_batch_samples": 128})
    counted = with_rows(config, 3.0, None)
    assert (counted.training.global_batch_size, counted.training.global_batch_samples) == (44, None)
    assert with_rows(counted, 5.0, 4) == counted


@pytest.mark.parametrize(
    ("world_size", "parallel", "rows"),
    [
        (32, {"tensor_model_parallel_size": 2}, 48),  # stage 3's own recipe on 4 x 8 GPUs: 44 does not divide over 16
        (8, {"tensor_model_parallel_size": 2}, 44),
        (64, {"tensor_model_parallel_size": 2}, 32),
        (256, {"tensor_model_parallel_size": 2}, 128),
        (8, {"pipeline_model_parallel_size": 4, "virtual_pipeline_model_parallel_size": 2}, 40),
    ],
)
def test_rows_of_samples_divide_over_the_ranks(world_size: int, parallel: dict[str, int], rows: int) -> None:
    overrides = {f"parallel.{name}": size for name, size in parallel.items()} | {"training.global_batch_samples": 128}
    config = with_rows(apply_overrides(RunConfig(), overrides), 3.0, world_size)
    assert config.training.global_batch_size == rows
    check_batch(config, world_size)


def test_data_parallel_size() -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=3)
    assert data_parallel_size(parallel, 12) == 2
    for world_size in (4, 8):
        with pytest.raises(ConfigError, match=rf"{world_size} ranks.*2 x .*3 = 6"):
            data_parallel_size(parallel, world_size)


def test_num_microbatches() -> None:
    training = TrainingConfig(micro_batch_size=2, global_batch_size=12)
    assert num_microbatches(training, 3) == 2
    with pytest.raises(ConfigError, match="12 rows.*micro_batch_size 2 x data-parallel size 4 = 8.*8 or 16"):
        num_microbatches(training, 4)
    with pytest.raises(ConfigError, match="that fit: 32"):
        num_microbatches(training, 16)
