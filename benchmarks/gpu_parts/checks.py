"""Whether it is right before how fast it is: the checks of ``tests/gpu``, with the numbers that they found."""

from __future__ import annotations

import importlib.util
import os
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from gpu_parts.report import Report
from megatron_vl.backends.platform import prepare_process
from megatron_vl.launch import Launch
from tests.gpu import parity, stepping
from tests.gpu.differences import Difference
from tests.helpers.ranks import Ranks, Start
from tests.helpers.tiny import micro_batches
from tests.parallel.gradients import step_on_rank

TE = "transformer_engine"


def check_runs(report: Report) -> None:
    """One process (over NCCL, on a GPU) computes what a process without GPU does."""
    config = stepping.layout_config({})
    batches = micro_batches(config.model, 8)
    with _starts() as start:
        here = step_on_rank(start, config, batches)
    with _without_gpu():
        elsewhere = Ranks(1)
        try:
            exact = elsewhere.run(step_on_rank, config, batches)
        finally:
            elsewhere.stop()
    _report(report, stepping.against_one_rank("one process beside the CPU", [here], exact))


def check_layouts(report: Report) -> None:
    """Two ranks over gloo on the one device compute what one does, in every way to spread them."""
    one, two = Ranks(1), Ranks(2)
    step = stepping.step_on_one_device
    try:
        exact = one.run(step, stepping.layout_config({}))
        for layout in stepping.LAYOUTS:
            title, config = f"fp32, {layout.name}", stepping.layout_config(layout.parallel)
            with _going_on(report, title):
                _report(report, stepping.against_one_rank(title, two.run(step, config), exact))
        for backend in _backends():
            title = f"{backend} bf16, {stepping.FUSED_LAYOUT.name}"
            with _going_on(report, title):
                nearly = one.run(step, stepping.fused_config(backend, {}))
                found = two.run(step, stepping.fused_config(backend, stepping.FUSED_LAYOUT.parallel))
                allowed = parity.BF16_GRADIENT
                _report(report, stepping.against_one_rank(title, found, nearly, allowed=allowed))
    finally:
        one.stop()
        two.stop()


def check_parity(report: Report) -> None:
    """bf16 beside fp32, on each backend, for both spans of attention."""
    for span in ("segment", "row"):
        with _starts() as start:
            _report(report, parity.parity(start, span, _backends()[1:]))


def check_resume(report: Report) -> None:
    """Resumes, checkpoints across backends, deterministic mode, and the optimizer."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _report(report, stepping.optimizers(torch.optim.AdamW, device))
    backends = _backends()
    with tempfile.TemporaryDirectory() as folder:
        for writer in backends:
            with _going_on(report, f"{writer}: resume"), _starts() as start:
                _report(report, stepping.resume(start, writer, Path(folder, f"resume-{writer}"), bf16=True))
            for reader in backends:
                with _going_on(report, f"{writer} -> {reader}"), _starts() as start:
                    checkpoint = Path(folder, f"{writer}-{reader}")
                    _report(report, stepping.exchange(start, writer, reader, checkpoint))
        for backend in backends:
            with _going_on(report, f"{backend}: determinism"), _starts() as start:
                _report(report, stepping.determinism(start, backend))


def _backends() -> list[str]:
    present = torch.cuda.is_available() and importlib.util.find_spec(TE) is not None
    return ["local", TE] if present else ["local"]


def _report(report: Report, differences: list[Difference]) -> None:
    for difference in differences:
        name = f"{difference.name} (off by, at most)"
        report.cost(name, difference.found, difference.allowed)


@contextmanager
def _going_on(report: Report, title: str) -> Iterator[None]:
    """A check that fails is a row, and the others go on."""
    try:
        yield
    except Exception:  # noqa: BLE001 - whatever it is, it is told
        traceback.print_exc()
        _report(report, [Difference(f"{title}: did not run", float("inf"), 1.0)])


@contextmanager
def _starts() -> Iterator[Start]:
    """A world of one in this process."""
    prepare_process()
    with tempfile.TemporaryDirectory() as folder:
        yield Start(Launch(0, 1, 0), f"file://{folder}/meet")


@contextmanager
def _without_gpu() -> Iterator[None]:
    """Processes that start meanwhile see no device."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        yield
    finally:
        if before is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = before
