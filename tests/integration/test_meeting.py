"""Ranks meet under each launcher, and a world of one needs nothing to meet: megatron_vl/parallel/process_group.py."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE

import pytest

from tests.integration.test_launcher import environment

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]

RANK = """
import os, sys
from datetime import timedelta
from pathlib import Path
import torch, torch.distributed as dist
from megatron_vl.errors import ConfigError
from megatron_vl.launch import read_launch
from megatron_vl.parallel.process_group import start_process_group

launch, folder = read_launch(), Path(sys.argv[1])
if "--die-once" in sys.argv and launch.rank == 1 and not (folder / "died").exists():
    (folder / "died").touch()
    sys.exit(1)
try:
    start_process_group("gloo", launch, init_method=None, timeout=timedelta(minutes=1))
except ConfigError as error:
    sys.exit(f"error: {error}")
total = torch.ones(1)
dist.all_reduce(total)
(folder / f"{launch.rank}.rank").write_text(f"{int(total)} {launch.local_rank}")
dist.destroy_process_group()
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "rank.py").write_text(RANK, encoding="utf-8")
    return tmp_path / "rank.py"


def start(command: list[str], script: Path, *flags: str, **changes: str) -> subprocess.Popen[str]:
    words = [*command, str(script), str(script.parent), *flags]
    env = environment(PYTHONPATH=str(ROOT), **changes)
    return subprocess.Popen(words, cwd=script.parent, env=env, stderr=PIPE, stdout=PIPE, text=True)


def end(*processes: subprocess.Popen[str]) -> None:
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(map(str, sum(outputs, ())))


def local_ranks(script: Path, world_size: int) -> list[int]:
    """Local rank of each rank, all of which have met."""
    found = {path.stem: path.read_text().split() for path in script.parent.glob("*.rank")}
    assert sorted(found) == [str(rank) for rank in range(world_size)]
    assert {total for total, _ in found.values()} == {str(world_size)}
    return [int(found[str(rank)][1]) for rank in range(world_size)]


def test_plain_python(script: Path) -> None:
    end(start([sys.executable], script))
    assert local_ranks(script, 1) == [0]


@pytest.mark.parametrize("world_size", [1, 2, pytest.param(4, marks=pytest.mark.long)])
def test_torchrun(script: Path, world_size: int) -> None:
    """At 1 it once waited ten minutes for a store that nobody served."""
    end(start([*TORCHRUN, "--standalone", "--nproc-per-node", str(world_size)], script))
    assert local_ranks(script, world_size) == list(range(world_size))


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.long), 2])
def test_torchrun_with_a_port(script: Path, unused_port: int, world_size: int) -> None:
    end(start([*TORCHRUN, "--master-port", str(unused_port), "--nproc-per-node", str(world_size)], script))
    assert local_ranks(script, world_size) == list(range(world_size))


@pytest.mark.parametrize("each", [1, pytest.param(2, marks=pytest.mark.long)])
def test_two_agents_of_torchrun(script: Path, unused_port: int, each: int) -> None:
    meet = ["--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", str(unused_port)]
    meet += ["--nproc-per-node", str(each), "--node-rank"]
    end(*[start([*TORCHRUN, *meet, node], script) for node in ("0", "1")])
    assert local_ranks(script, 2 * each) == list(range(each)) * 2


def test_torchrun_starts_ranks_again(script: Path) -> None:
    command = [*TORCHRUN, "--standalone", "--max-restarts", "1", "--nproc-per-node", "2"]
    end(start(command, script, "--die-once"))
    assert (script.parent / "died").exists() and local_ranks(script, 2) == [0, 1]


@pytest.mark.skipif(shutil.which("mpirun", path=environment()["PATH"]) is None, reason="needs mpirun")
@pytest.mark.parametrize("world_size", [1, 2])
def test_mpirun(script: Path, unused_port: int, world_size: int) -> None:
    mpirun = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", str(world_size), sys.executable]
    end(start(mpirun, script, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(unused_port)))
    assert local_ranks(script, world_size) == list(range(world_size))


@pytest.mark.parametrize("world_size", [1, 2])
def test_srun(script: Path, unused_port: int, world_size: int) -> None:
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(unused_port)} if world_size > 1 else {}
    tasks = [
        {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_STEP_NUM_TASKS": str(world_size), "SLURM_NTASKS": "9"}
        for rank in map(str, range(world_size))
    ]
    end(*[start([sys.executable], script, **task, **meet) for task in tasks])
    assert local_ranks(script, world_size) == list(range(world_size))


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as server:
        server.bind(("", 0))
        server.listen()
        yield server.getsockname()[1]


def test_a_port_in_use_is_one_line(script: Path, taken: int) -> None:
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken)}
    rank = start([sys.executable], script, RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", **where)
    said = rank.communicate(timeout=120)[1]
    assert rank.returncode == 1 and "Traceback" not in said
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert f"cannot meet the others at 127.0.0.1:{taken}" in line and "choose another one" in line
