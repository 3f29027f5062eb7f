"""A folder is held by one process at a time, and by none after that has ended, however it did."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_vl import folder_lock
from megatron_vl.errors import FolderInUseError

HOLD = """
import sys, time
from pathlib import Path
from megatron_vl import folder_lock
with folder_lock.hold(Path(sys.argv[1]), ".lock"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_one_is_told_who_holds_it(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    with folder_lock.hold(folder, ".lock"):
        with pytest.raises(FolderInUseError, match=f"process {os.getpid()} on .* since 2"):
            folder_lock.hold(folder, ".lock").__enter__()
        with folder_lock.hold(tmp_path, ".lock"):
            pass
    with folder_lock.hold(folder, ".lock"):
        pass


def test_the_lock_goes_with_a_process_that_is_killed(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert process.stdout and process.stdout.readline() == b"held\n"
        with pytest.raises(FolderInUseError, match=f"process {process.pid} "):
            folder_lock.hold(tmp_path, ".lock").__enter__()
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    with folder_lock.hold(tmp_path, ".lock"):
        pass
