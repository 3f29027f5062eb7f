"""What a run reports, and where: Megatron's log line, JSON lines, TensorBoard."""

from __future__ import annotations

import json
import math
import re
import resource
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_vl.config.schema import RunConfig
from megatron_vl.training.metrics import JsonLines, Layout, Reporter, StepMetrics, Window, log_line
from megatron_vl.training.optimizer import LearningRates
from megatron_vl.training.state import TrainState
from megatron_vl.training.step import Counts, LossSum, StepResult
from tests.helpers.listening import heard
from tests.helpers.tiny import tiny_config

METRICS = StepMetrics(
    iteration=120,
    train_iters=5000,
    consumed_rows=960,
    consumed_samples=3100,
    consumed_tokens=200_000,
    lm_loss=2.345678,
    learning_rate=1.5e-4,
    smallest_learning_rate=1.2e-5,
    grad_norm=0.98765,
    elapsed_ms_per_iteration=123.45,
    global_batch_size=8,
    tokens_per_second=10_000.4,
    images_per_second=55.0,
    samples_per_second=30.0,
    tflops_per_rank=0.0123,
    memory_gib=1.5,
    skipped_iterations=1,
    nan_iterations=0,
    layout="TP 1 x PP 1 x DP 2",
)
LAYOUT = Layout("TP 1 x PP 1 x DP 2", world_size=2)


def test_the_log_line_is_found_by_megatron_s_patterns() -> None:
    """Patterns that tools use on logs of Megatron-LM."""
    line = log_line(METRICS)
    patterns = {
        r"^ \[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+\] iteration +(\d+)/ +(\d+) \|": ("120", "5000"),
        r"consumed samples: +(\d+) \|": ("3100",),
        r"elapsed time per iteration \(ms\): ([\d.]+) \|": ("123.5",),
        r"throughput per GPU \(TFLOP/s/GPU\): ([\d.]+) \|": ("0.0123",),
        r"learning rate: ([\d.E+-]+) \|": ("1.500000E-04",),
        r"smallest learning rate: ([\d.E+-]+) \|": ("1.200000E-05",),
        r"global batch size: +(\d+) \|": ("8",),
        r"lm loss: ([\d.E+-]+) \|": ("2.345678E+00",),
        r"loss scale: ([\d.]+) \|": ("1.0",),
        r"grad norm: ([\d.]+) \|": ("0.988",),
        r"number of skipped iterations: +(\d+) \|": ("1",),
        r"number of nan iterations: +(\d+) \|$": ("0",),
    }
    for pattern, values in patterns.items():
        match = re.search(pattern, line)
        assert match and match.groups() == values, pattern
    assert "\n" not in line


def _result(total: float, tokens: int, *, skipped: bool = False) -> StepResult:
    counts = Counts(images=3, samples=5, tokens=100, squared_spans=5000.0)
    return StepResult(LossSum(total, tokens), counts, LearningRates(0.02, 0.1), grad_norm=0.5, skipped=skipped)


def test_a_window_weighs_tokens_not_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    config, window = tiny_config(training={"freeze_vision": True}), Window(started=10.0)
    window.add(_result(30.0, 10))
    window.add(_result(90.0, 90))
    monkeypatch.setattr("time.perf_counter", lambda: 14.0)
    metrics = window.summarize(TrainState(step=2), _result(90.0, 90), config=config, layout=LAYOUT)
    assert metrics.lm_loss == pytest.approx(1.2)
    assert metrics.elapsed_ms_per_iteration == pytest.approx(2000.0)
    assert (metrics.tokens_per_second, metrics.images_per_second, metrics.samples_per_second) == (50.0, 1.5, 2.5)
    # By hand, from the sizes of the tiny model, for 6 images of 16 patches, 200 tokens, 100 labels and spans whose
    # squares add up to 10,000, with the vision tower frozen. A product costs 2 a multiply-add.
    vision = 2 * 96 * 588 * 32 + 4 * (2 * 96 * (4 * 32 * 32 + 2 * 32 * 48) + 4 * 96 * 16 * 32)
    resampler = 6 * (2 * 65_536 + 3 * (32_768 + 262_144 + 2 * 32_768 + 16_384))
    language = 4 * 3 * (2 * 200 * (4 * 64 * 64 + 3 * 64 * 96) + 2 * 10_000 * 64)
    head = 3 * 2 * 100 * 64 * 500
    assert (vision, resampler, language, head) == (9_904_128, 7_569_408, 182_476_800, 19_200_000)
    assert metrics.tflops_per_rank == pytest.approx(219_150_336 / 4.0 / 2 / 1e12)  # 4 seconds, 2 ranks


def test_skipped_steps_are_counted_and_their_loss_is_not() -> None:
    """A step may be skipped for its loss or for its gradient alone; the work was done all the same."""
    wrong = [_result(loss, 10, skipped=True) for loss in (math.nan, math.inf, 90.0)]
    window = Window()
    for result in (_result(20.0, 10), *wrong, _result(60.0, 30)):
        window.add(result)
    metrics = window.summarize(TrainState(step=5), wrong[0], config=tiny_config(), layout=LAYOUT)
    assert metrics.lm_loss == 2.0
    assert (window.steps, window.supervised, metrics.skipped_iterations, metrics.nan_iterations) == (5, 70, 3, 2)
    window = Window()
    window.add(wrong[2])
    assert math.isnan(window.summarize(TrainState(), wrong[2], config=tiny_config(), layout=LAYOUT).lm_loss)


def test_what_is_not_finite_is_null_in_json(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.step(replace(METRICS, lm_loss=math.nan, grad_norm=math.inf))
    lines.validation(7, {"set": math.nan})
    texts = (tmp_path / "metrics.jsonl").read_text().splitlines()
    step, validation = (json.loads(text, parse_constant=lambda name: pytest.fail(name)) for text in texts)
    assert (step["lm_loss"], step["grad_norm"], step["learning_rate"]) == (None, None, 1.5e-4)
    assert validation["validation_loss"] is None


def _config(folder: Path, **logging: Any) -> RunConfig:
    fields = {"log_interval": 2, "progress": False, "tensorboard_dir": str(folder / "tb")} | logging
    return tiny_config(logging=fields, training={"train_iters": 5}, checkpoint={"save": str(folder / "run")})


def _report(config: RunConfig, *, first: int = 0, last: int = 5, losses: dict[str, float] | None = None) -> None:
    state = TrainState(step=first)
    reporter = Reporter(config, layout=LAYOUT, state=state, active=True)
    for _ in range(first, last):
        state = state.advanced(rows=8, samples=5, tokens=100, skipped=False)
        reporter.step(state, _result(2.0 * state.step, 1))
    reporter.validation(state, losses or {"set": 0.25})
    reporter.close()


def test_reports_come_at_the_interval_and_at_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _report(_config(tmp_path))
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["iteration"] for record in records] == [2, 4, 5, 5]
    assert [record["lm_loss"] for record in records[:3]] == [3.0, 7.0, 10.0], "each window's own mean"
    assert [record["consumed_rows"] for record in records[:3]] == [16, 32, 40]
    assert (records[3]["validation_set"], records[3]["validation_loss"]) == ("set", 0.25)
    assert records[0]["layout"] == LAYOUT.text and records[0]["time"] > 1e9
    printed = capsys.readouterr().out
    assert len(re.findall(r"iteration +\d+/ +5 \|", printed)) == 3
    assert " validation loss at iteration 5 | lm loss value: 2.500000E-01 |" in printed


def test_a_resumed_run_goes_on_in_the_same_file(tmp_path: Path) -> None:
    config = _config(tmp_path, log_file=str(tmp_path / "elsewhere" / "log.jsonl"))
    _report(config, last=4)
    _report(config, first=4)
    records = [json.loads(line) for line in (tmp_path / "elsewhere" / "log.jsonl").read_text().splitlines()]
    assert [record["iteration"] for record in records if "lm_loss" in record] == [2, 4, 5]
    assert not (tmp_path / "run").exists()


def test_steps_before_a_stop_are_reported(tmp_path: Path) -> None:
    """The interval is 2, and the run stops after step 3, whatever for."""
    config = _config(tmp_path)
    _report(config, last=3)
    _report(config, first=3)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = [(line["iteration"], line["lm_loss"]) for line in lines if "lm_loss" in line]
    assert found == [(2, 3.0), (3, 6.0), (4, 8.0), (5, 10.0)]


def test_tensorboard_has_the_scalars(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _report(_config(tmp_path))
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("lm-loss")] == [(2, 3.0), (4, 7.0), (5, 10.0)]
    assert [event.step for event in events.Scalars("validation-loss")] == [5]
    assert [round(event.value, 6) for event in events.Scalars("smallest-learning-rate")] == [0.02] * 3
    assert {"learning-rate", "grad-norm", "tokens-per-second", "images-per-second"} <= set(events.Tags()["scalars"])


def test_each_of_several_validation_sets_has_its_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _report(_config(tmp_path), losses={"captions": 0.25, "en/text": 0.5})
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = {line["validation_set"]: line["validation_loss"] for line in lines if "validation_loss" in line}
    assert found == {"captions": 0.25, "en/text": 0.5}
    printed = capsys.readouterr().out
    assert " validation loss at iteration 5 on captions | lm loss value: 2.500000E-01 |" in printed
    assert " validation loss at iteration 5 on en/text | lm loss value: 5.000000E-01 |" in printed
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    values = [events.Scalars(f"validation-loss/{name}")[0].value for name in ("captions", "en/text")]
    assert values == [0.25, 0.5]


def test_weights_and_biases_has_the_names_and_the_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = mock.MagicMock()
    client.api.api_key = None
    monkeypatch.setitem(sys.modules, "wandb", client)
    _report(_config(tmp_path, wandb_project="vision", wandb_exp_name="first"))
    (started,) = client.init.call_args_list
    assert (started.kwargs["project"], started.kwargs["name"], started.kwargs["mode"]) == ("vision", "first", "offline")
    logged = [call for call in client.init.return_value.log.call_args_list if "lm_loss" in call.args[0]]
    assert [(call.kwargs["step"], call.args[0]["lm_loss"]) for call in logged] == [(2, 3.0), (4, 7.0), (5, 10.0)]


@pytest.mark.parametrize("wanted", [True, False])
def test_a_bar_moves_where_one_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: bool) -> None:
    bar = mock.MagicMock(n=0)
    monkeypatch.setattr("tqdm.tqdm", bar)
    _report(_config(tmp_path, progress=wanted))
    assert bar.called == wanted
    if wanted:
        assert (bar.call_args.kwargs["initial"], bar.call_args.kwargs["total"]) == (0, 5)
        assert bar.return_value.update.call_count == 3


def test_other_ranks_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = _config(tmp_path)
    reporter = Reporter(config, layout=LAYOUT, state=TrainState(), active=False)
    reporter.step(TrainState(step=2), _result(1.0, 1))
    reporter.close()
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ""


def test_what_is_not_training_takes_no_training_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of 2,000 seconds each, and 7,000 seconds of something else between them."""
    now = [time.perf_counter()]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    reporter = Reporter(_config(tmp_path), layout=LAYOUT, state=TrainState(), active=True)
    for step in (1, 2):
        now[0] += 2000.0
        reporter.step(TrainState(step=step), _result(1.0, 1))
        if step == 1:
            with reporter.not_training():
                now[0] += 7000.0
    reporter.close()
    (record,) = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    # The first window begins by the real clock, which goes on between the first line above and the third.
    assert record["elapsed_ms_per_iteration"] == pytest.approx(2e6, rel=0.01)


def test_state_advances_by_what_was_read() -> None:
    state = TrainState(step=3, consumed_rows=24, data="abc").advanced(rows=8, samples=5, tokens=100, skipped=True)
    read = {"consumed_rows": 32, "consumed_samples": 5, "consumed_tokens": 100}
    assert state == TrainState(step=4, data="abc", skipped_steps=1, skipped_in_a_row=1, **read)


def test_a_report_that_cannot_be_written_does_not_end_the_run() -> None:
    """/dev/full is a file on a full disk."""
    config = tiny_config(logging={"log_file": "/dev/full", "log_interval": 1, "progress": False})
    reporter = Reporter(config, layout=LAYOUT, state=TrainState(), active=True)
    with heard() as warnings:
        for step in (1, 2):
            reporter.step(TrainState(step=step), _result(1.0, 1))
        reporter.close()
    assert warnings == ["JsonLines gets no more reports: No space left on device; training goes on"]


def test_no_half_line_is_left(tmp_path: Path) -> None:
    """A resumed run would append to it."""
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.validation(1, {"set": 0.5})
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 10, before[1]))
    try:
        with pytest.raises(OSError, match="No space left"):
            lines.validation(2, {"set": 0.5})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (tmp_path / "metrics.jsonl").read_bytes() == whole
