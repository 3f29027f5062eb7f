"""The Slurm script, with stand-ins for ``srun``, ``scancel`` and ``scontrol``.

Tests say whom it signals, and when it puts its job back into the queue.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_vl.checkpoint import store
from megatron_vl.config.load import dump_config
from megatron_vl.errors import ExitStatus
from tests.helpers.prepared import SEQ_LENGTH, prepare_tiny
from tests.helpers.tiny import tiny_config
from tests.integration.test_launcher import environment

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "slurm" / "pretrain_qwenvl.sbatch.sh"
PATIENCE_S = 300
SRUN = """#!/bin/bash
echo "$@" > "$FOLDER/srun"
shift
if [[ -n "${RANKS:-}" ]]; then set -- bash -c "$RANKS"; fi
"$@" &
ranks=$!
trap 'echo "forcing job termination"; kill -KILL "$ranks"; exit 137' TERM
echo "$ranks" > "$FOLDER/ranks"
status=0
wait "$ranks" || status=$?
exit "${HIGHEST:-$status}"
"""
"""Ends its tasks by SIGKILL at SIGTERM, as ``_srun_signal_mgr`` does (Slurm, src/srun/libsrun/srun_job.c).

``HIGHEST`` is a status of another node: srun returns the highest.
"""
SCANCEL = '#!/bin/bash\necho "$@" >> "$FOLDER/scancel"\nkill -TERM "$(cat "$FOLDER/ranks")"\n'
"""Signals the tasks and not the batch script, as scancel(1) says of ``--signal`` without ``--batch``."""
SCONTROL = '#!/bin/bash\necho "$@" >> "$FOLDER/scontrol"\n'
COMMANDS = {"srun": SRUN, "scancel": SCANCEL, "scontrol": SCONTROL}
ENDS = """
if [[ -n "${SAVED:-}" ]]; then echo "$SAVED" > run/latest_checkpointed_iteration.txt; fi
if [[ -n "${RECORD:-}" ]]; then printf '{"exit_status": %s, "meaning": ""}\n' "$RECORD" > run/last_run.json; fi
exit "$STATUS"
"""
TRAINS = """
stop() { echo TERM >> "$FOLDER/signals"; exit "$STATUS"; }
trap stop TERM
echo started > "$FOLDER/started"
for _ in $(seq 3000); do sleep 0.1; done
"""


class Job:
    """The script as Slurm would run it."""

    def __init__(self, folder: Path, ranks: str, *flags: str, **variables: str) -> None:
        self.folder = folder
        for name, text in COMMANDS.items():
            path = folder / "bin" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
            path.chmod(0o755)
        env = environment(SLURM_SUBMIT_DIR=str(ROOT), SLURM_JOB_ID="77", DATA="data", FROM="before", RUN="run")
        env |= {"PATH": f"{folder}/bin:{env['PATH']}", "FOLDER": str(folder), "RANKS": ranks} | variables
        self.log = folder / "log"
        with self.log.open("w") as stream:
            self.process = subprocess.Popen(
                ["bash", str(SCRIPT), *flags], cwd=folder, env=env, stdout=stream, stderr=stream, start_new_session=True
            )

    def wait_for(self, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not ready():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)

    def is_started(self) -> bool:
        ranks = self.folder / "ranks"
        return (self.folder / "started").exists() and ranks.exists() and ranks.read_text().endswith("\n")

    def end(self) -> int:
        return self.process.wait(PATIENCE_S)

    def calls(self, command: str) -> list[str]:
        path = self.folder / command
        return path.read_text().splitlines() if path.exists() else []

    @property
    def requeued(self) -> list[str]:
        return self.calls("scontrol")


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    started: list[Job] = []

    def begin(ranks: str, *flags: str, **variables: str) -> Job:
        started.append(Job(tmp_path, ranks, *flags, **variables))
        return started[-1]

    yield begin
    for job in started:
        if job.process.poll() is None:
            job.process.kill()
            job.process.wait()


@pytest.mark.parametrize(
    ("status", "again"),
    [
        (ExitStatus.DONE, False),
        (ExitStatus.USER_ERROR, False),
        (ExitStatus.NOT_FINITE, False),
        (ExitStatus.INTERRUPTED, False),
        (ExitStatus.STOPPED, True),
        (ExitStatus.BUG, True),
        (137, True),
    ],
)
def test_a_job_goes_on_after_what_may_end_otherwise(jobs: Callable[..., Job], status: int, again: bool) -> None:
    job = jobs(ENDS, "--lr", "1e-5", STATUS=str(int(status)))
    assert job.end() == status
    assert job.requeued == (["requeue 77"] if again else []), job.log.read_text()
    asked = (job.folder / "srun").read_text().split()
    assert asked[:3] == ["--kill-on-bad-exit=1", "bash", str(ROOT / "examples/pretrain_qwenvl.sh")]
    assert asked[3:] == (
        "--data-path data --pretrained-checkpoint before --save run --auto-resume --save-interval 500 --lr 1e-5".split()
    )


@pytest.mark.parametrize(
    ("recorded", "again"),
    [(ExitStatus.DONE, False), (ExitStatus.USER_ERROR, False), (ExitStatus.NOT_FINITE, False), (75, True)],
)
def test_the_record_of_the_run_counts_before_the_highest_status_of_the_nodes(
    jobs: Callable[..., Job], recorded: int, again: bool
) -> None:
    job = jobs(ENDS, STATUS="143", RECORD=str(int(recorded)))
    assert job.end() == recorded
    assert job.requeued == (["requeue 77"] if again else []), job.log.read_text()


def test_the_record_of_an_earlier_attempt_does_not_count(jobs: Callable[..., Job], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last_run.json").write_text('{"exit_status": 0, "meaning": "done"}\n')
    assert jobs(ENDS, STATUS="137").end() == 137


@pytest.mark.parametrize("status", ["1", "75", "137"])
def test_attempts_without_a_checkpoint_are_limited(jobs: Callable[..., Job], status: str) -> None:
    """With MAX_RESTARTS=1, the second attempt in a row that saves nothing is the last one."""
    first_job = [("0", "", 1), ("1", "", 1)]
    second_job = [("0", "", 2), ("1", "100", 3), ("2", "100", 4), ("3", "200", 5), ("4", "", 6), ("5", "", 6)]
    for restarts, checkpoint, requeued in first_job + second_job:
        job = jobs(ENDS, STATUS=status, SAVED=checkpoint, SLURM_RESTART_COUNT=restarts, MAX_RESTARTS="1")
        assert job.end() == int(status)
        assert len(job.requeued) == requeued, (restarts, checkpoint, job.log.read_text())


@pytest.mark.parametrize(
    ("number", "status", "again"),
    [
        (signal.SIGUSR1, 75, True),
        (signal.SIGUSR1, 0, False),
        (signal.SIGUSR1, 3, False),
        (signal.SIGTERM, 75, False),
    ],
)
def test_the_ranks_get_the_notice_and_end_by_themselves(
    jobs: Callable[..., Job], number: int, status: int, again: bool
) -> None:
    """srun gets no signal: it would end the ranks by SIGKILL, before they have saved."""
    job = jobs(TRAINS, STATUS=str(status))
    job.wait_for(job.is_started)
    job.process.send_signal(number)
    assert job.end() == status, job.log.read_text()
    assert job.calls("signals") == ["TERM"]
    assert job.calls("scancel") == ["--signal=TERM 77"]
    assert job.requeued == (["requeue 77"] if again else [])


def test_sigterm_at_the_limit_does_not_cancel_the_job(jobs: Callable[..., Job]) -> None:
    """Ranks that do not end within the notice: Slurm sends SIGTERM to all, then SIGKILL."""
    job = jobs(TRAINS.replace("trap stop TERM", "trap 'touch $FOLDER/noticed' TERM"), STATUS="0")
    job.wait_for(job.is_started)
    job.process.send_signal(signal.SIGUSR1)
    job.wait_for((job.folder / "noticed").exists)
    job.process.send_signal(signal.SIGTERM)
    os.kill(int((job.folder / "ranks").read_text()), signal.SIGKILL)
    assert job.end() == 137, job.log.read_text()
    assert job.calls("scancel") == ["--signal=TERM 77"] and job.requeued == ["requeue 77"]


def test_slurm_gives_more_notice_than_a_save_may_take() -> None:
    """A save has the time that tools/torchrun.py gives to ranks, and the notice goes to the script alone."""
    from megatron_vl.cli.torchrun import _TIME_TO_SAVE_S

    (option,) = [line.split("=")[1] for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH --signal")]
    where, seconds = option.split("@")
    assert where == "B:USR1" and int(seconds) > _TIME_TO_SAVE_S


def test_a_training_goes_on_where_the_limit_has_stopped_it(jobs: Callable[..., Job], tmp_path: Path) -> None:
    config = tiny_config(
        data={"data_path": (prepare_tiny(tmp_path / "data"),), "seq_length": SEQ_LENGTH},
        training={"train_iters": 10**6, "micro_batch_size": 1, "global_batch_size": 2},
        optimizer={"lr": 1e-5, "min_lr": 1e-5},
        logging={"log_interval": 1, "progress": False},
    )
    (tmp_path / "recipe.yaml").write_text(dump_config(config))
    variables = {"RECIPE": str(tmp_path / "recipe.yaml"), "DATA": config.data.data_path[0], "GPUS_PER_NODE": "1"}
    variables["HIGHEST"] = "143"  # another node, ended by Slurm after the first that has saved
    first = jobs("", "--pretrained-checkpoint", "none", **variables)
    first.wait_for(lambda: first.log.read_text().count("lm loss") >= 2)
    first.process.send_signal(signal.SIGUSR1)
    assert first.end() == ExitStatus.STOPPED, first.log.read_text()
    (step,) = store.steps_in(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "last_run.json").read_text())["exit_status"] == ExitStatus.STOPPED
    second = jobs("", "--pretrained-checkpoint", "none", "--train-iters", str(step + 1), **variables)
    assert second.end() == 0, second.log.read_text()
    assert f"from step {step}" in second.log.read_text() and step + 1 in store.steps_in(tmp_path / "run")
    assert second.requeued == ["requeue 77"], "only the first one goes on"
