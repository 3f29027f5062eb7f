"""The Slurm script, with stand-ins for ``srun`` and ``scontrol``: when it puts its job back into the queue."""

from __future__ import annotations

import json
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
ENDS = """#!/bin/bash
echo "$@" > "{folder}/srun"
exit $STATUS
"""
TRAINS = """#!/bin/bash
echo "$@" > "{folder}/srun"
stop() {{ echo TERM >> "{folder}/signals"; exit $STATUS; }}
trap stop TERM
echo started > "{folder}/started"
for _ in $(seq 3000); do sleep 0.1; done
"""
RUNS = """#!/bin/bash
shift
exec "$@"
"""
SCONTROL = '#!/bin/bash\necho "$@" >> "{folder}/scontrol"\n'


class Job:
    """The script as Slurm would run it."""

    def __init__(self, folder: Path, srun: str, *flags: str, **variables: str) -> None:
        self.folder = folder
        for name, text in (("srun", srun), ("scontrol", SCONTROL)):
            path = folder / "bin" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text.replace("{folder}", str(folder)).replace("{{", "{").replace("}}", "}"))
            path.chmod(0o755)
        env = environment(SLURM_SUBMIT_DIR=str(ROOT), SLURM_JOB_ID="77", DATA="data", FROM="before", RUN="run")
        env |= {"PATH": f"{folder}/bin:{env['PATH']}"} | variables
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

    def end(self) -> int:
        return self.process.wait(PATIENCE_S)

    @property
    def requeued(self) -> list[str]:
        path = self.folder / "scontrol"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    started: list[Job] = []

    def begin(srun: str, *flags: str, **variables: str) -> Job:
        started.append(Job(tmp_path, srun, *flags, **variables))
        return started[-1]

    yield begin
    for job in started:
        if job.process.poll() is None:
            job.process.kill()
            job.process.wait()


@pytest.mark.parametrize(
    ("status", "restarts", "again"),
    [
        (ExitStatus.DONE, "0", False),
        (ExitStatus.USER_ERROR, "0", False),
        (ExitStatus.NOT_FINITE, "0", False),
        (ExitStatus.INTERRUPTED, "0", False),
        (ExitStatus.STOPPED, "50", True),
        (ExitStatus.BUG, "0", True),
        (137, "9", True),
        (137, "10", False),
    ],
)
def test_a_job_goes_on_after_what_may_end_otherwise(
    jobs: Callable[..., Job], status: int, restarts: str, again: bool
) -> None:
    job = jobs(ENDS, "--lr", "1e-5", STATUS=str(int(status)), SLURM_RESTART_COUNT=restarts)
    assert job.end() == status
    assert job.requeued == (["requeue 77"] if again else []), job.log.read_text()
    asked = (job.folder / "srun").read_text().split()
    assert asked[:3] == ["--kill-on-bad-exit=1", "bash", str(ROOT / "examples/pretrain_qwenvl.sh")]
    assert asked[3:] == (
        "--data-path data --pretrained-checkpoint before --save run --auto-resume --save-interval 500 --lr 1e-5".split()
    )


@pytest.mark.parametrize(
    ("number", "status", "again"),
    [
        (signal.SIGUSR1, 75, True),
        (signal.SIGUSR1, 137, True),  # srun has ended a task that was still saving nothing
        (signal.SIGUSR1, 0, False),
        (signal.SIGUSR1, 3, False),
        (signal.SIGTERM, 75, False),
    ],
)
def test_the_notice_of_the_limit_is_passed_on_and_only_scancel_is_final(
    jobs: Callable[..., Job], number: int, status: int, again: bool
) -> None:
    job = jobs(TRAINS, STATUS=str(status), SLURM_RESTART_COUNT="50")
    job.wait_for((job.folder / "started").exists)
    job.process.send_signal(number)
    assert job.end() == status, job.log.read_text()
    assert (job.folder / "signals").read_text().split() == ["TERM"]
    assert job.requeued == (["requeue 77"] if again else [])


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
    first = jobs(RUNS, "--pretrained-checkpoint", "none", **variables)
    first.wait_for(lambda: first.log.read_text().count("lm loss") >= 2)
    first.process.send_signal(signal.SIGUSR1)
    assert first.end() == ExitStatus.STOPPED, first.log.read_text()
    (step,) = store.steps_in(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "last_run.json").read_text())["exit_status"] == ExitStatus.STOPPED
    second = jobs(RUNS, "--pretrained-checkpoint", "none", "--train-iters", str(step + 1), **variables)
    assert second.end() == 0, second.log.read_text()
    assert f"from step {step}" in second.log.read_text() and step + 1 in store.steps_in(tmp_path / "run")
    assert second.requeued == ["requeue 77"], "only the first one goes on"
