"""Collect the facts of this rank."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

from megatron_vl.doctor.facts import Facts
from megatron_vl.doctor.machine import read_driver, read_limits, resolve, try_folder
from megatron_vl.doctor.packages import probe_packages
from megatron_vl.launch import Launch, library_environment


def examine(launch: Launch, path: Path, *, patience_s: float) -> Facts:
    """Return the facts of this rank; see ``Facts``.

    Args:
        path: the folder to try.
        patience_s: how long the import of packages may take.
    """
    probed = probe_packages(patience_s=patience_s)
    place = launch.meeting_place.rpartition(":")[0]
    return Facts(
        launch=launch,
        host=socket.gethostname(),
        python=sys.version_info[:3],
        packages=probed.packages,
        torch=probed.torch,
        driver=read_driver(),
        limits=read_limits(),
        folder=try_folder(path),
        own_name=resolve(socket.gethostname()),
        master=resolve(place) if place and "MASTER_ADDR" not in launch.missing else None,
        environment=library_environment(),
    )
