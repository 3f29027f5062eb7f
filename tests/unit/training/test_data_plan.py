"""How often a run takes its rows is said in numbers that the loader's own rows bear out."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_vl.cli.train import main
from megatron_vl.config.schema import RunConfig
from megatron_vl.config.validate import validate
from megatron_vl.data.dataset.manifest import read_manifest
from megatron_vl.data.loading.blend import Blend
from megatron_vl.data.loading.plan import DataPlan
from megatron_vl.training.trainer import Trainer
from tests.helpers.data.prepared import SEQ_LENGTH, make_data_set, run_config
from tests.helpers.listening import heard
from tests.helpers.ranks import RankPools, Start
from tests.helpers.tiny import MODEL, tiny_config

LINE = re.compile(
    r"(\S.*): ([\d,]+) samples in ([\d,]+) rows \(([\d.]+) % filled\); the run takes each row ([\d.,]+) times"
)

FITTING = f"--preset tiny --num-bpe-tokens {MODEL.num_bpe_tokens} --resampler-num-queries {MODEL.resampler.num_queries}"
"""Flags of a model for which the data set is prepared."""


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_data_set(tmp_path_factory.mktemp("data"))


def parsed(line: str) -> tuple[str, str, str, float, str]:
    match = LINE.fullmatch(line)
    assert match, line
    return match[1], match[2], match[3], float(match[4]), match[5]


@pytest.mark.parametrize(
    ("sizes", "weights", "num_rows", "taken"),
    [
        ((30, 7), None, 4 * 37, (120, 28)),  # four whole epochs of one pool
        ((30, 7), (0.9, 0.1), 5000, (4500, 500)),
        ((1000, 10, 7), (1e-7, 1.0, 1.0), 1 << 20, (0, 1 << 19, 1 << 19)),  # the first has its turn after 2^23 rows
    ],
)
def test_passes_are_those_of_the_rows(
    sizes: tuple[int, ...], weights: tuple[float, ...] | None, num_rows: int, taken: tuple[int, ...]
) -> None:
    blend = Blend(sizes, weights, seed=3)
    data_sets, _ = blend.locate(blend.rows(np.arange(num_rows)))
    assert np.bincount(data_sets, minlength=len(sizes)).tolist() == list(taken)
    assert blend.passes(num_rows) == tuple(count / size for count, size in zip(taken, sizes, strict=True))


def test_a_part_of_an_epoch_takes_no_row_twice() -> None:
    blend = Blend((30, 7), None, seed=3)
    assert len(set(blend.rows(np.arange(20)).tolist())) == 20
    assert blend.passes(20) == pytest.approx((0.540540, 0.540540), abs=1e-6)  # 20 of 37 rows, to six digits


def test_data_sets_without_weights_are_one_pool(prefix: str) -> None:
    manifest = read_manifest(prefix)
    rows = manifest.num_rows
    lines = DataPlan((("a", manifest), ("b", manifest)), Blend((rows, rows), None, 0), SEQ_LENGTH).describe(7 * rows)
    name, samples, shown, fill, times = parsed(lines[0])
    assert len(lines) == 1 and (name, times) == ("data", "3.5")
    assert (samples, shown) == (f"{2 * manifest.num_samples:,}", f"{2 * rows:,}")
    assert fill == pytest.approx(100 * manifest.fill, abs=0.05)


def test_the_fill_is_that_of_the_rows_as_the_run_pads_them(prefix: str) -> None:
    manifest = read_manifest(prefix)
    (line,) = DataPlan.read(run_config(prefix, seq_length=4 * SEQ_LENGTH)).describe(manifest.num_rows)
    assert parsed(line)[3] == pytest.approx(25 * manifest.fill, abs=0.05)


@pytest.mark.parametrize(
    ("passes", "said"), [(0.042, "0.04"), (0.5, "0.50"), (1.0, "1.0"), (177.6, "178"), (2e4, "20,000")]
)
def test_numbers_have_the_digits_that_matter(prefix: str, passes: float, said: str) -> None:
    manifest = replace(read_manifest(prefix), num_rows=1000)
    (line,) = DataPlan((("a", manifest),), Blend((1000,), None, 0), SEQ_LENGTH).describe(round(1000 * passes))
    assert line.endswith(f"takes each row {said} times")


def test_a_dry_run_says_it_for_every_data_set_of_a_blend(prefix: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = read_manifest(prefix).num_rows
    argv = f"{FITTING} --dry-run --train-iters 100 --global-batch-size {rows} --data-path 3 {prefix} 1 {prefix}"
    assert main(argv.split()) == 0
    said = [parsed(line) for line in re.findall(r"^# (data .*)$", capsys.readouterr().out, re.MULTILINE)]
    assert [(name, times) for name, *_, times in said] == [(f"data {prefix}", "75"), (f"data {prefix}", "25")]


def test_a_dry_run_without_the_data_plans_all_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.json").touch()
    for name, reason in (("absent", "cannot be read"), ("empty", "not JSON")):
        assert main(["--preset", "tiny", "--dry-run", "--data-path", str(tmp_path / name)]) == 0
        out = capsys.readouterr().out
        assert "# data: how often their rows are taken is not known; " in out and reason in out
        assert "# model: " in out


def test_a_batch_in_samples_is_counted_in_rows(prefix: str) -> None:
    config = run_config(prefix, training={"global_batch_size": 8, "global_batch_samples": 100, "train_iters": 10})
    plan = DataPlan.read(config)
    counted, said = plan.count_rows(config, world_size=1)
    rows = counted.training.global_batch_size
    assert said == f"a step of 100 samples = {rows:,} rows of {plan.samples_per_row:.2f} samples"
    assert rows * plan.samples_per_row == pytest.approx(100, rel=0.05)  # the rows of a step are rounded by 4 %
    assert plan.count_rows(counted, world_size=3) == (counted, None)


@pytest.mark.parametrize("world_size", [1, 3, 5, 16])
def test_rows_of_a_step_are_rounded_to_what_the_ranks_divide(prefix: str, world_size: int) -> None:
    config = run_config(prefix, training={"global_batch_size": 8, "global_batch_samples": 100, "train_iters": 10})
    plan = DataPlan.read(config)
    counted, said = plan.count_rows(config, world_size)
    validate(counted, world_size=world_size, cuda=False)
    exact = 100 / plan.samples_per_row
    rows = counted.training.global_batch_size
    step = 2 * world_size  # a micro-batch has two rows
    assert rows % step == 0 and abs(rows - exact) <= max(step / 2, 0.04 * exact)
    plain = plan.count_rows(config, 1)[0].training.global_batch_size
    assert said and ("do not divide over" in said) == bool(plain % step)


def log_of_run(start: Start, config: RunConfig) -> list[str]:
    """What a rank logs of the data in a run."""
    with start.topology(config.parallel) as topology, heard(logging.INFO) as lines:
        trainer = Trainer.set_up(config, topology)
        trainer.loop()
        trainer.close()
    return [line for line in lines if line.startswith("data")]


def test_a_run_says_it_once_and_counts_what_was_before_a_resume(prefix: str, ranks: RankPools, tmp_path: Path) -> None:
    rows = read_manifest(prefix).num_rows
    config = tiny_config(
        data={"data_path": (prefix,), "seq_length": SEQ_LENGTH},
        training={"micro_batch_size": 1, "global_batch_size": 4, "train_iters": 2},
        checkpoint={"save": str(tmp_path), "auto_resume": True},
    )
    (first,) = ranks(1).run(log_of_run, config)[0]
    assert parsed(first)[-1] == f"{2 * 4 / rows:.2f}"
    longer = replace(config, training=replace(config.training, train_iters=3, global_batch_size=8))
    (resumed,) = ranks(1).run(log_of_run, longer)[0]
    assert parsed(resumed)[-1] == f"{(2 * 4 + 8) / rows:.2f}"
