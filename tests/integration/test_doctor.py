"""tools/doctor.py on this machine: alone, under torchrun, with a broken torch, and with ranks that die or wait."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

import pytest

from tests.integration.test_launcher import environment

ROOT = Path(__file__).resolve().parents[2]
DOCTOR = str(ROOT / "tools" / "doctor.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

RANK = """
import os, sys, time
from dataclasses import replace
from megatron_vl.doctor import group as it
from megatron_vl.doctor.waiting import still_waits
from megatron_vl.errors import ConfigError
from megatron_vl.launch import read_launch
from tests.unit.doctor.made_up import LAPTOP

own, how, timeout_s = replace(LAPTOP, launch=read_launch()), sys.argv[1], float(sys.argv[2])
if own.launch.rank == 1 and how == "dies":
    it._compare_clocks = lambda *_: os._exit(9)
if own.launch.rank == 1 and how == "sleeps":
    it._rates = lambda *_: time.sleep(600)
try:
    group = it.examine_group(own, timeout_s)
except ConfigError as error:
    sys.exit(str(error))
print(len(group.ranks), "ranks;", [rates.error for rates in group.rates], group.error, flush=True)
if not group.error:
    it.leave()
if still_waits():
    os._exit(0)
"""


def run(command: list[str], folder: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=folder, env=environment(**changes), capture_output=True, text=True, timeout=300
    )  # fmt: skip


@pytest.fixture
def address(unused_port: int) -> dict[str, str]:
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(unused_port), "WORLD_SIZE": "2"}


def start(address: dict[str, str], rank: int, how: str, timeout_s: int) -> subprocess.Popen[str]:
    env = environment(PYTHONPATH=str(ROOT), RANK=str(rank), LOCAL_RANK=str(rank), **address)
    command = [sys.executable, "-c", RANK, how, str(timeout_s)]
    return subprocess.Popen(command, env=env, stdout=PIPE, stderr=PIPE, text=True)


def test_a_machine_without_gpu_is_fine(tmp_path: Path) -> None:
    done = run([sys.executable, DOCTOR, "--json", "rows.json"], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr and done.stdout.endswith("0 wrong. Training works here, with one rank on the CPU\n")
    rows = json.loads((tmp_path / "rows.json").read_text())
    kinds = {row["name"]: row["kind"] for row in rows}
    assert kinds["torch"] == kinds["Megatron-Core"] == kinds["packages"] == kinds["disk"] == kinds["extra data"] == "ok"
    assert kinds["CUDA devices"] == "missing" and {row["hosts"][0] for row in rows} == {socket.gethostname()}
    lines = done.stdout.splitlines()[: len(rows)]
    assert [line.split()[0] for line in lines] == [row["kind"] for row in rows]
    column = {line.index(row["found"]) for line, row in zip(lines, rows, strict=True)}
    assert len(column) == 1, "the lines are aligned"


def test_two_ranks_compare_and_measure(tmp_path: Path) -> None:
    done = run([*TORCHRUN, DOCTOR], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("Python") == 1 and "Training works here, with 2 ranks on the CPU" in done.stdout
    found = {line[9:].split("  ")[0]: line for line in done.stdout.splitlines() if line.startswith("ok")}
    assert {"ranks", "same versions", "clock", "all-reduce", "neighbors", "MASTER_ADDR"} <= set(found)
    assert "slowest between rank 0" in found["neighbors"] and "8 MiB over gloo" in found["all-reduce"]


def test_a_torch_that_cannot_be_imported_is_a_finding(tmp_path: Path) -> None:
    """And so is a folder that is not there."""
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.12: cannot open')")
    done = run([sys.executable, DOCTOR, "--path", "none"], tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 2 and "Traceback" not in done.stdout + done.stderr
    lines = done.stdout.splitlines()
    wrong = {line.split()[1]: line for line in lines if line.startswith("wrong")}
    assert list(wrong) == ["torch", "Megatron-Core", "disk"] and any(line.startswith("ok") for line in lines)
    assert "libcudart.so.12" in wrong["torch"] and "pip install" in wrong["torch"]
    assert "none: No such file or directory" in wrong["disk"]


def test_a_broken_torch_of_one_rank_is_named(tmp_path: Path, address: dict[str, str]) -> None:
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.12: cannot open')")
    ranks = {"RANK": "1", "LOCAL_RANK": "1"} | address
    done = run([sys.executable, DOCTOR], tmp_path, PYTHONPATH=str(tmp_path), **ranks)
    assert done.returncode == 2 and not done.stdout
    said = (
        f"error on rank 1: {socket.gethostname()} cannot meet the others: torch does not work there (OSError: libcudart"
    )
    assert done.stderr.startswith(said) and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("rank", "said"), [(0, "1 ranks; [] rank 0 of 2 cannot meet the others"), (1, "finds nobody at 127.0.0.1")]
)
def test_a_rank_whose_peer_does_not_come_says_so(address: dict[str, str], rank: int, said: str) -> None:
    process = start(address, rank, "waits", 2)
    output, errors = process.communicate(timeout=120)
    assert said in output + errors
    assert process.returncode == rank and "Traceback" not in errors


def test_a_rank_that_dies_ends_the_others_with_what_they_know(address: dict[str, str]) -> None:
    """Long before the time-out of ten minutes."""
    processes = [start(address, rank, "dies", 600) for rank in (0, 1)]
    output, errors = processes[0].communicate(timeout=120)
    assert processes[0].returncode == 0, errors
    assert processes[1].wait(60) == 9
    found, _, error = output.strip().partition("[] ")
    assert found == "2 ranks; " and error


def test_ranks_that_wait_in_vain_tell_each_other(address: dict[str, str]) -> None:
    processes = [start(address, rank, "sleeps", 30) for rank in (0, 1)]
    for process in processes:
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert output == "2 ranks; ['rank 0 waited 15 s for the others', 'rank 1 waited 15 s for the others'] \n"
