"""A folder is held by one process at a time, and by none after that has ended, however it did."""

from __future__ import annotations

import contextlib
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


def test_members_of_a_group_are_in_together_and_nobody_else(tmp_path: Path) -> None:
    with folder_lock.join(tmp_path, ".lock", "parts", "3"):
        with folder_lock.join(tmp_path, ".lock", "parts", "4"):
            with pytest.raises(FolderInUseError, match=f"^parts: process {os.getpid()} "):
                folder_lock.join(tmp_path, ".lock", "rows", "5").__enter__()
            with pytest.raises(FolderInUseError, match=f"^parts: process {os.getpid()} "):
                folder_lock.hold(tmp_path, ".lock").__enter__()
        with folder_lock.join(tmp_path, ".lock", "parts", "4"):
            pass
        with pytest.raises(FolderInUseError, match=f"^process {os.getpid()} on "):
            folder_lock.join(tmp_path, ".lock", "parts", "3").__enter__()
    with folder_lock.join(tmp_path, ".lock", "rows", "3"):
        pass
    with (
        folder_lock.hold(tmp_path, ".lock"),
        pytest.raises(FolderInUseError, match=f"^process {os.getpid()} on "),
    ):
        folder_lock.join(tmp_path, ".lock", "rows", "3").__enter__()


def test_a_group_outlives_the_member_that_named_it(tmp_path: Path) -> None:
    with contextlib.ExitStack() as first, contextlib.ExitStack() as second:
        first.enter_context(folder_lock.join(tmp_path, ".lock", "parts", "1"))
        second.enter_context(folder_lock.join(tmp_path, ".lock", "parts", "2"))
        first.close()
        with pytest.raises(FolderInUseError, match="^parts: "):
            folder_lock.join(tmp_path, ".lock", "rows", "1").__enter__()


JOIN = """
import sys, time
from pathlib import Path
from megatron_vl import folder_lock
for _ in range(40):
    with folder_lock.join(Path(sys.argv[1]), ".lock", "parts", sys.argv[2]):
        pass
"""


def test_members_that_come_and_go_at_the_same_time_are_never_refused(tmp_path: Path) -> None:
    members = [subprocess.Popen([sys.executable, "-c", JOIN, str(tmp_path), str(number)]) for number in range(4)]
    assert [member.wait(60) for member in members] == [0] * 4
