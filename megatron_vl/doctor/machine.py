"""Look at this machine with what Python and the kernel offer, without any package.

Limits of control groups are those of a container or of a Slurm job. They may stand at any level above the process, so
all levels are read and the smallest counts (``man 7 cgroups``; the files of version 1 have names of their own).
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from megatron_vl import files
from megatron_vl.doctor.facts import Address, Driver, Folder, Limits
from megatron_vl.launch import ask_cuda_driver

_ROOT = Path("/")
_POLL_S = 0.2
_NO_LIMIT = 2**60
"""Version 1 of the control groups writes a number near 2**63 where there is no limit."""


def read_limits(root: Path = _ROOT) -> Limits:
    """Return what this process may use.

    Args:
        root: where ``proc`` and ``sys`` are.
    """
    cores_of_machine = os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores_of_machine
    memory_of_machine = _machine_memory(root)
    limits = [value for value in (memory_of_machine, *_memory_limits(root)) if value is not None]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return Limits(
        cores=max(1, min([allowed, *_core_limits(root)])),
        cores_of_machine=cores_of_machine,
        memory=min(limits, default=None),
        memory_of_machine=memory_of_machine,
        open_files=tuple(-1 if value == resource.RLIM_INFINITY else value for value in (soft, hard)),  # type: ignore[arg-type]
        shared_memory=_shared_memory(root / "dev" / "shm"),
    )


def _machine_memory(root: Path) -> int | None:
    match = re.search(r"MemTotal:\s*(\d+) kB", _read(root / "proc" / "meminfo"))
    if match:
        return int(match[1]) * 1024
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None


def _memory_limits(root: Path) -> Iterator[int]:
    for folder in _control_groups(root, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            text = _read(folder / name).strip()
            if text.isdigit() and int(text) < _NO_LIMIT:
                yield int(text)


def _core_limits(root: Path) -> Iterator[int]:
    """Yield quotas as numbers of cores, rounded up."""
    for folder in _control_groups(root, "cpu"):
        quota, _, period = _read(folder / "cpu.max").strip().partition(" ")
        if not period:
            quota, period = (_read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
        if quota.isdigit() and period.isdigit() and int(period) > 0:
            yield -(-int(quota) // int(period))


def _control_groups(root: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of the group of this process and of all groups above it, for both versions."""
    mounted = root / "sys" / "fs" / "cgroup"
    for line in _read(root / "proc" / "self" / "cgroup").splitlines():
        number, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if number == "0" and not names:
            base = mounted
        elif controller in names.split(","):
            base = mounted / controller
        else:
            continue
        parts = Path(path.lstrip("/")).parts
        yield from (base.joinpath(*parts[:count]) for count in range(len(parts), -1, -1))


def _shared_memory(folder: Path) -> tuple[int, int] | None:
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return None
    return usage.total, usage.free


def try_folder(path: Path) -> Folder:
    """Write a file in a folder that is there, bring it to the disk under its name, and remove it."""
    probe = path / f".doctor-{socket.gethostname()}-{os.getpid()}"
    free = size = 0
    try:
        usage = shutil.disk_usage(path)
        free, size = usage.free, usage.total
        try:
            files.write_whole(probe, b"\0" * 4096, durable=True)
            files.sync_path(path)
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        return Folder(path, free, size, error.strerror or str(error))
    return Folder(path, free, size)


def read_driver(root: Path = _ROOT) -> Driver:
    """Return what the kernel and the CUDA driver say of NVIDIA's devices."""
    place = root / "proc" / "driver" / "nvidia"
    match = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", _read(place / "version"))
    try:
        devices = len(list((place / "gpus").iterdir()))
    except OSError:
        devices = 0
    return Driver(ask_cuda_driver(), match[1] if match else "", devices)


def resolve(name: str) -> Address:
    """Return the addresses of a name of a machine."""
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        return Address(name, error=getattr(error, "strerror", None) or str(error))
    addresses = tuple(dict.fromkeys(str(address[0]) for *_, address in found))
    return Address(name, addresses, is_here=any(_belongs_here(family, address) for family, *_, address in found))


def wait_for_listener(place: str, seconds: float) -> str:
    """Wait until a process listens at HOST:PORT. Return nothing, or why there is still no connection after a while."""
    host, _, port = place.rpartition(":")
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=max(0.1, deadline - time.monotonic())).close()
            return ""
        except (OSError, UnicodeError) as error:
            if time.monotonic() >= deadline:
                return str(error)
        time.sleep(_POLL_S)


def _belongs_here(family: int, address: tuple[object, ...]) -> bool:
    """A machine binds to its own addresses alone."""
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((address[0], 0))
    except OSError:
        return False
    return True


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
