"""Limits of control groups, folders, names and the driver are read as the kernel says them."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

import pytest

from megatron_vl.doctor.machine import read_driver, read_limits, resolve, try_folder, wait_for_listener

GIB = 2**30


def write(root: Path, **files: str) -> Path:
    """Files of a made-up ``/``; ``__`` in a name stands for ``/``."""
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMINFO = "MemTotal:       67108864 kB\nMemFree:  1 kB\n"  # 64 GiB
PERIOD = "100000"


def test_without_control_groups_the_machine_is_the_limit(tmp_path: Path) -> None:
    limits = read_limits(write(tmp_path, proc__meminfo=MEMINFO))
    assert limits.memory == limits.memory_of_machine == 64 * GIB
    assert limits.cores == len(os.sched_getaffinity(0)) and limits.cores_of_machine == os.cpu_count()
    assert limits.shared_memory is None


def test_the_smallest_limit_of_all_groups_above_counts(tmp_path: Path) -> None:
    """Version 2, as Slurm nests them; a job has 4 GiB, its step has no limit of its own."""
    root = write(tmp_path, proc__meminfo=MEMINFO, proc__self__cgroup="0::/slurm/job_1/step_0\n")
    groups = root / "sys" / "fs" / "cgroup"
    write(groups / "slurm" / "job_1" / "step_0", **{"memory.max": "max\n", "cpu.max": f"max {PERIOD}\n"})
    write(groups / "slurm" / "job_1", **{"memory.max": f"{4 * GIB}\n", "cpu.max": f"50000 {PERIOD}\n"})
    write(groups / "slurm", **{"memory.max": f"{32 * GIB}\n"})
    limits = read_limits(root)
    assert limits.memory == 4 * GIB and limits.memory_of_machine == 64 * GIB
    assert limits.cores == 1, "half a core is one"


def test_a_container_has_its_limit_at_the_root(tmp_path: Path) -> None:
    root = write(tmp_path, proc__meminfo=MEMINFO, proc__self__cgroup="0::/\n")
    write(root / "sys" / "fs" / "cgroup", **{"memory.max": f"{8 * GIB}\n", "cpu.max": f"100000 {PERIOD}\n"})
    assert (read_limits(root).memory, read_limits(root).cores) == (8 * GIB, 1)


def test_version_1(tmp_path: Path) -> None:
    root = write(
        tmp_path, proc__meminfo=MEMINFO, proc__self__cgroup="4:memory:/docker/1\n1:cpu,cpuacct:/docker/1\n0::/\n"
    )
    groups = root / "sys" / "fs" / "cgroup"
    write(groups / "memory" / "docker" / "1", **{"memory.limit_in_bytes": f"{2 * GIB}\n"})
    write(groups / "memory", **{"memory.limit_in_bytes": "9223372036854771712\n"})  # none
    write(groups / "cpu" / "docker" / "1", **{"cpu.cfs_quota_us": "100000\n", "cpu.cfs_period_us": f"{PERIOD}\n"})
    write(groups / "cpu", **{"cpu.cfs_quota_us": "-1\n", "cpu.cfs_period_us": f"{PERIOD}\n"})
    assert (read_limits(root).memory, read_limits(root).cores) == (2 * GIB, 1)


def test_a_folder_is_tried_and_left_as_it_was(tmp_path: Path) -> None:
    found = try_folder(tmp_path)
    assert not found.error and 0 < found.free <= found.size and list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_or_no_folder_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert try_folder(tmp_path / "none").error == "No such file or directory"
    assert try_folder(tmp_path / "file").error == "Not a directory"
    assert not (tmp_path / "none").exists()


def test_a_folder_without_fsync_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    assert try_folder(tmp_path).error == "Invalid argument" and list(tmp_path.iterdir()) == []


def test_the_driver_is_read_from_the_kernel(tmp_path: Path) -> None:
    version = (
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.10  Release Build  (x@y)  Thu Jan 2 2025\n"
    )
    root = write(tmp_path, proc__driver__nvidia__version=version, proc__driver__nvidia__gpus__1__information="x")
    assert (read_driver(root).release, read_driver(root).devices) == ("570.86.10", 1)
    assert (read_driver(tmp_path / "none").release, read_driver(tmp_path / "none").devices) == ("", 0)


def test_names_are_resolved() -> None:
    found = resolve("127.0.0.1")
    assert found.addresses == ("127.0.0.1",) and found.is_here and not found.error
    far = resolve("192.0.2.1")  # of documentation, and of no machine
    assert far.addresses == ("192.0.2.1",) and not far.is_here
    assert resolve("no such name").error and not resolve("no such name").addresses


def test_a_listener_is_waited_for() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{server.getsockname()[1]}"
        assert "refused" in wait_for_listener(place, 0.0)
        late = threading.Timer(0.3, server.listen)
        late.start()
        assert wait_for_listener(place, 60.0) == ""
        late.join()
