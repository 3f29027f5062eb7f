"""A folder is held by one process at a time, and by none after that has ended, however it did."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO

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


@pytest.mark.parametrize("removes", ["file", "folder"])
@pytest.mark.parametrize("way", ["hold", "join"])
def test_a_lock_counts_only_while_its_path_names_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, removes: str
) -> None:
    """The holder before removes the file, or all, between the opening of the file and its lock."""
    folder, flock, removed = tmp_path / "folder", fcntl.flock, []

    def late(lock: IO[str], how: int) -> None:
        if not removed:
            removed.append(os.fstat(lock.fileno()).st_ino)
            for path in list(folder.iterdir()):
                if removes == "folder" or path.name == ".lock":
                    path.unlink()
            if removes == "folder":
                folder.rmdir()
        flock(lock, how)

    entered = {"hold": lambda: folder_lock.hold(folder, ".lock"),
               "join": lambda: folder_lock.join(folder, ".lock", "parts", "3")}  # fmt: skip
    monkeypatch.setattr(fcntl, "flock", late)
    with entered[way]():
        assert removed
        with pytest.raises(FolderInUseError, match=f"process {os.getpid()} on "):
            folder_lock.hold(folder, ".lock").__enter__()
        if way == "join":
            with pytest.raises(FolderInUseError, match=f"process {os.getpid()} on "):
                folder_lock.join(folder, ".lock", "parts", "3").__enter__()


def test_a_folder_that_is_removed_before_its_lock_is_opened_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mkdir, made = Path.mkdir, []

    def removed(self: Path, *mode: int, **how: bool) -> None:
        mkdir(self, *mode, **how)
        made.append(self)
        if len(made) == 1:
            self.rmdir()

    monkeypatch.setattr(Path, "mkdir", removed)
    with folder_lock.hold(tmp_path / "folder", ".lock"):
        assert len(made) == 2


def test_a_lock_that_others_remove_again_and_again_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "samestat", lambda *states: False)
    for enter in (folder_lock.hold(tmp_path, ".lock"), folder_lock.join(tmp_path, ".lock", "parts", "3")):
        with pytest.raises(FolderInUseError, match="processes that remove .*lock"):
            enter.__enter__()
