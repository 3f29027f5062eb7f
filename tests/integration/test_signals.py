"""Signals, as a terminal, a scheduler and torchrun send them to a real run: it saves, says so in a line, and ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_vl.checkpoint import store
from megatron_vl.config.load import dump_config
from tests.helpers.interruptible import interruptible_children
from tests.helpers.prepared import SEQ_LENGTH
from tests.helpers.tiny import tiny_config
from tests.integration.test_launcher import environment

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ["tools/train.py"]
OURS = ["tools/torchrun.py", "--standalone", "--nproc-per-node"]
THEIRS = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
PATIENCE_S = 240
SLOW_SET_UP = """
import ctypes, sys
from megatron_vl.cli import train
from megatron_vl.training import trainer
def wait(config, topology):
    print("setting up", flush=True)
    while True:
        ctypes.CDLL(None).sleep(1000)  # in a library: Python runs no handler there
trainer.find_start = wait
sys.exit(train.main())
"""
SLOW_VALIDATION = """
import sys, time
from megatron_vl.cli import train
from megatron_vl.training import step
plain = step.forward_backward
def slow(*args, forward_only, **kwargs):
    if forward_only:
        print("validating", flush=True)
        time.sleep(0.5)
    return plain(*args, forward_only=forward_only, **kwargs)
step.forward_backward = slow
sys.exit(train.main())
"""


class Running:
    """A training in a session of its own."""

    def __init__(self, command: list[str], folder: Path, prefix: str, *, valid: bool = False, **training: Any) -> None:
        config = tiny_config(
            data={"data_path": (prefix,), "seq_length": SEQ_LENGTH, "valid_data_path": (prefix,) if valid else ()},
            training={"train_iters": 10**6, "micro_batch_size": 1, "global_batch_size": 2} | training,
            optimizer={"lr": 1e-5, "min_lr": 1e-5},
            logging={"log_interval": 1, "progress": False},
        )
        self.temporary = folder / "temporary"
        self.temporary.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.yaml").write_text(dump_config(config))
        self.save, self.log = folder / "run", folder / f"log{len(list(folder.iterdir()))}"
        arguments = [sys.executable, *command, str(folder / "recipe.yaml"), "--save", str(self.save), "--auto-resume"]
        with self.log.open("w") as stream, interruptible_children():
            self.process = subprocess.Popen(
                arguments,
                cwd=ROOT,
                env=environment(TMPDIR=str(self.temporary)),
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )

    def wait_for(self, ready: Callable[[str], bool]) -> None:
        """Wait until the log is as wanted."""
        deadline = time.monotonic() + PATIENCE_S
        while not ready(self.log.read_text()):
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)

    def end(self) -> str:
        """Wait for the end; the log."""
        self.process.wait(PATIENCE_S)
        return self.log.read_text()

    def stop(self) -> None:
        """Leave nothing behind."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


Start = Callable[..., Running]


@pytest.fixture
def start(tmp_path: Path, prefix: str) -> Iterator[Start]:
    runs: list[Running] = []

    def begin(command: list[str], **training: Any) -> Running:
        runs.append(Running(command, tmp_path / "job", prefix, **training))
        return runs[-1]

    yield begin
    for run in runs:
        run.stop()


def _trains(log: str) -> bool:
    return log.count("lm loss") >= 2


def _last_run(run: Running) -> dict[str, Any]:
    return dict(json.loads((run.save / "last_run.json").read_text()))


@pytest.mark.parametrize(
    ("command", "number", "status"),
    [
        pytest.param(TRAIN, signal.SIGTERM, 75, marks=pytest.mark.long),
        (TRAIN, signal.SIGINT, 130),
        ([*OURS, "2", *TRAIN], signal.SIGTERM, 75),
        ([*OURS, "2", *TRAIN], signal.SIGINT, 130),
        pytest.param([*OURS, "1", *TRAIN], signal.SIGTERM, 75, marks=pytest.mark.long),
        pytest.param([*THEIRS, "2", *TRAIN], signal.SIGTERM, 1, marks=pytest.mark.long),
    ],
    ids=["plain-TERM", "plain-INT", "ours-2-TERM", "ours-2-INT", "ours-1-TERM", "torchrun-2-TERM"],
)
def test_a_signal_saves_and_ends(start: Start, command: list[str], number: int, status: int) -> None:
    run = start(command)
    run.wait_for(_trains)
    if number == signal.SIGINT:
        os.killpg(run.process.pid, number)  # a terminal sends it to all, and torchrun passes it on once more
    else:
        run.process.send_signal(number)
    log = run.end()
    assert run.process.returncode == status, log
    (step,) = store.steps_in(run.save)
    store.verify(store.directory_of(run.save, step))
    reason = "SIGTERM" if number == signal.SIGTERM else "Ctrl-C"
    expected = {"exit_status": 75 if number == signal.SIGTERM else 130, "step": step, "reason": reason}
    assert expected.items() <= _last_run(run).items()
    assert log.count(f"stopping after step {step}: {reason}") == 1
    if status != 1:  # torchrun has a traceback of its own, and leaves a folder
        assert "Traceback" not in log
        assert not list(run.temporary.glob("torchelastic*"))


def test_a_sigterm_before_the_first_step_ends_at_once_and_is_recorded(start: Start) -> None:
    """While the run is set up: it holds the directory and waits, as for a large checkpoint or a rank that is gone."""
    run = start(["-c", SLOW_SET_UP])
    run.wait_for(lambda log: "setting up" in log)
    run.process.send_signal(signal.SIGTERM)
    log = run.end()
    assert run.process.returncode == 75 and "Traceback" not in log, log
    expected = {"exit_status": 75, "step": None, "reason": "SIGTERM before the first step"}
    assert expected.items() <= _last_run(run).items()
    assert not store.steps_in(run.save)


def test_a_sigterm_in_a_validation_saves_before_its_end(start: Start, prefix: str) -> None:
    """A scheduler's notice may be shorter than a validation."""
    run = start(["-c", SLOW_VALIDATION], eval_interval=2, train_iters=4, valid=True)
    run.wait_for(lambda log: log.count("validating") >= 3)
    run.process.send_signal(signal.SIGTERM)
    log = run.end()
    assert run.process.returncode == 75 and "Traceback" not in log, log
    assert store.steps_in(run.save) == [2] and "the validation after step 2 was left at a signal" in log
    assert log.count("validating") < 20 and "validation loss" not in log


def test_a_refusal_is_recorded_in_place_of_the_end_before(start: Start) -> None:
    """torchrun's status does not tell it from a death, and the last one would have the run started again for ever."""
    run = start(TRAIN)
    run.wait_for(_trains)
    run.process.send_signal(signal.SIGTERM)
    run.end()
    assert _last_run(run)["exit_status"] == 75
    (step,) = store.steps_in(run.save)
    (store.directory_of(run.save, step) / "state.json").write_text("{}")
    for later in ({"global_batch_size": 3, "micro_batch_size": 2}, {}):
        refused = start(TRAIN, **later)
        log = refused.end()
        assert refused.process.returncode == 2, log
        last = _last_run(run)
        assert (last["exit_status"], last["meaning"], last["step"]) == (2, "user_error", None)
        assert last["reason"].splitlines()[0] in log


def test_a_second_ctrl_c_ends_at_once(start: Start) -> None:
    run = start(TRAIN, global_batch_size=4000)
    run.wait_for(lambda log: "from step 0" in log)
    time.sleep(2.0)
    os.killpg(run.process.pid, signal.SIGINT)
    run.wait_for(lambda log: "press it again" in log)
    time.sleep(3.5)
    os.killpg(run.process.pid, signal.SIGINT)
    log = run.end()
    assert run.process.returncode == 130 and "Traceback" not in log and not store.steps_in(run.save), log


def test_a_second_training_in_one_directory_is_refused_and_the_place_is_free_after_a_kill(start: Start) -> None:
    first = start(TRAIN)
    first.wait_for(_trains)
    second = start(TRAIN)
    log = second.end()
    assert second.process.returncode == 2 and "Traceback" not in log, log
    assert f"another training saves to {first.save} (process {first.process.pid} on" in log
    first.process.kill()
    first.end()
    third = start(TRAIN)
    third.wait_for(_trains)
    third.process.send_signal(signal.SIGTERM)
    assert "Traceback" not in third.end() and third.process.returncode == 75
