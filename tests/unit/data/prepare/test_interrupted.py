"""Preparation that is killed, interrupted, short of room or disturbed: it says so, goes on, and ends as it would."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_vl import folder_lock
from megatron_vl.data.dataset.manifest import verify_files
from megatron_vl.data.prepare import job, row_work
from megatron_vl.data.prepare.job import prepare
from megatron_vl.data.prepare.recipe import load_recipe
from megatron_vl.data.prepare.workers import open_pool
from megatron_vl.errors import DataError, FolderInUseError
from tests.helpers.data.jobs import ROOT, RUN, SMALL_SLICES, command, hashes, recipe_file, run_tool
from tests.helpers.data.phases import run
from tests.helpers.interruptible import interruptible_children

DIES = """
import os, signal
num_renames, replace = 0, os.replace
def mortal(*names):
    global num_renames
    if num_renames == {survives}:
        os.kill(os.getpid(), signal.SIGKILL)
    num_renames += 1
    replace(*names)
os.replace = mortal
"""


SLOW = """
import time
from megatron_vl.data.prepare import part_work, row_work
hand_out = part_work.hand_out
def slowly(pool, jobs, finish):
    hand_out(pool, jobs, lambda *done: (time.sleep(0.2), finish(*done)))
part_work.hand_out = row_work.hand_out = slowly
"""


KINDS = {
    "part": r"[0-9a-f]{32}\..*", "planned": r"rows-(slice-.*|plan)\.npz", "written": r"rows-.*\.npz",
    "file": r"set\.(?!json$).*",
}  # fmt: skip


def where_to_die(renames: list[str]) -> list[int]:
    """The first and the last rename of all, and of each kind of file among them."""
    kinds = [next((kind for kind, form in KINDS.items() if re.fullmatch(form, name)), name) for name in renames]
    turns = [place for place in range(1, len(kinds)) if kinds[place] != kinds[place - 1]]
    return sorted({0, len(kinds) - 1, *turns, *(place - 1 for place in turns)})


@pytest.mark.usefixtures("small_slices")
def test_killed_anywhere_and_started_again_it_ends_with_the_same_bytes(
    raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, replace = recipe_file(raw), os.replace
    made: list[str] = []

    def told(source: Path, target: Path) -> None:
        made.append(Path(target).name)
        replace(source, target)

    def finish(prefix: Path) -> list[str]:
        """Prepare to the end; the files that get their names, in this order."""
        made.clear()
        prepare(load_recipe(recipe), prefix, progress=False, keep_parts=True)
        return made.copy()

    monkeypatch.setattr(os, "replace", told)
    (raw / "undisturbed").mkdir()
    renames = finish(raw / "undisturbed" / "set")
    places = where_to_die(renames)
    assert 8 <= len(places) <= 14, renames
    for survives in places:
        prefix, folder = raw / str(survives) / "set", raw / str(survives) / "set.parts"
        prefix.parent.mkdir()
        killed = run_tool(*command(recipe, prefix), code=SMALL_SLICES + DIES.format(survives=survives) + RUN)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert not Path(f"{prefix}.json").exists()
        finished = {name for name in renames[:survives] if name.endswith(".npz") and name != "rows-plan.npz"}
        if any(name.startswith("set.") for name in renames[:survives]):  # the files of the rows have left the folder
            finished = {name for name in finished if not name.startswith("rows-")}
        before = {name: (folder / name).stat().st_mtime_ns for name in finished}
        again = finish(prefix)
        assert not finished & set(again), "what is finished is not made again"
        assert set(renames[:survives]) | set(again) == set(renames)
        kept = {name: time for name, time in before.items() if not name.startswith("rows-")}
        assert {name: (folder / name).stat().st_mtime_ns for name in kept} == kept
        verify_files(prefix)
        assert hashes(prefix) == hashes(raw / "undisturbed" / "set"), f"killed before rename {survives}"


def test_workers_end_with_a_killed_parent(raw: Path) -> None:
    """The parent is killed while workers are at work; nothing of theirs is left, and the next start finishes."""
    recipe = recipe_file(raw)
    prefix = raw / "set"
    arguments = [str(recipe), "--output", str(prefix), "--quiet", "--workers", "2"]
    job = subprocess.Popen([sys.executable, "tools/prepare_data.py", *arguments], cwd=ROOT, start_new_session=True)
    folder = Path(f"{prefix}.parts")
    deadline = time.monotonic() + 240
    while not list(folder.glob("*.npz")):
        assert time.monotonic() < deadline and job.poll() is None
        time.sleep(0.001)
    os.kill(job.pid, signal.SIGKILL)
    job.wait(timeout=10)
    while members_of_session(job.pid):
        assert time.monotonic() < deadline, "workers outlive the job"
        time.sleep(0.05)
    prepare(load_recipe(recipe), prefix, progress=False)
    prepare(load_recipe(recipe), raw / "undisturbed", progress=False)
    assert hashes(prefix) == hashes(raw / "undisturbed")
    assert not folder.exists()


def members_of_session(session: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


@pytest.mark.usefixtures("small_slices")
def test_a_straggler_of_another_plan_does_no_harm(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker of a killed run, on another machine, writes its rows when those of another plan are there already."""
    late: list[Any] = []
    write = row_work.write_stored_slice

    def hold_one_back(*work: Any) -> int:
        late.append(work)
        if len(late) == 3:
            raise KeyboardInterrupt
        return write(*work)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(row_work, "write_stored_slice", hold_one_back)
        prepare(load_recipe(recipe_file(raw, pack={"seed": 1})), raw / "set", progress=False)
    straggler = []

    def disturbed(*work: Any) -> int:
        if not straggler:
            straggler.append(pytest.raises(DataError, write, *late[2]))
        return write(*work)

    with monkeypatch.context() as patch:
        patch.setattr(row_work, "write_stored_slice", disturbed)
        prepare(load_recipe(recipe_file(raw, pack={"seed": 2})), raw / "set", progress=False)
    assert straggler
    verify_files(raw / "set")


def test_a_killed_worker_is_named(raw: Path) -> None:
    recipe = load_recipe(recipe_file(raw))
    with open_pool(2) as pool:
        assert pool is not None
        victim = pool.executor.submit(os.getpid).result()
        os.kill(victim, signal.SIGKILL)
        with pytest.raises(DataError, match="a worker process was killed"):
            prepare(recipe, raw / "set", pool=pool, progress=False)
    prepare(recipe, raw / "set", progress=False)
    verify_files(raw / "set")


@pytest.mark.parametrize("workers", [1, 2])
def test_an_interruption_is_one_line_and_work_goes_on(raw: Path, workers: int) -> None:
    recipe = recipe_file(raw)
    code = SMALL_SLICES + SLOW + RUN
    arguments = [str(recipe), "--output", str(raw / "set"), "--quiet", "--workers", str(workers)]
    program = [sys.executable, "-c", code, *arguments]
    with interruptible_children():
        job = subprocess.Popen(program, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 240
    while len(list((raw / "set.parts").glob("*.npz"))) < 3:
        assert time.monotonic() < deadline and job.poll() is None
        time.sleep(0.01)
    os.killpg(job.pid, signal.SIGINT)
    _, errors = job.communicate(timeout=120)
    assert (job.returncode, errors) == (130, "interrupted; the same command goes on from what is finished\n")
    prepare(load_recipe(recipe), raw / "set", progress=False)
    verify_files(raw / "set")


@pytest.mark.usefixtures("small_slices")
def test_a_full_disk_is_named_and_does_no_harm(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the first and the last time that bytes are to come to the disk, and at every fifth in between."""
    recipe = load_recipe(recipe_file(raw))
    sync, num_syncs = os.fsync, 0

    def fsync(descriptor: int) -> None:
        nonlocal num_syncs
        if num_syncs == room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        num_syncs += 1
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    room = -1
    prepare(recipe, raw / "undisturbed", progress=False)
    total = num_syncs
    assert total > 20
    for failing in sorted({*range(0, total, 5), total - 1}):
        prefix, room, num_syncs = raw / f"full{failing}", failing, 0
        with pytest.raises(DataError, match=rf"full{failing}\.parts: No space left on device\. Mend"):
            prepare(recipe, prefix, progress=False)
        assert not list(Path(f"{prefix}.parts").glob("[0-9a-f]*.draft"))
        if Path(f"{prefix}.json").exists():  # the manifest comes last: with it, all is there
            verify_files(prefix)
        room = -1
        prepare(recipe, prefix, progress=False)
        assert hashes(prefix) == hashes(raw / "undisturbed")


@pytest.mark.parametrize("name", ["file/set", "file"])
def test_an_output_that_cannot_be_is_named(raw: Path, name: str) -> None:
    (raw / "file").write_text("")
    (raw / "file.parts").write_text("")
    with pytest.raises(DataError, match=r"parts: (Not a directory|File exists)\. Mend that"):
        prepare(load_recipe(recipe_file(raw)), raw / name, progress=False)


def test_nobody_else_is_in_the_folder_while_finished_work_is_removed(
    raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file of the lock goes last, under the lock."""
    unlink, removed, others = Path.unlink, list[str](), list[str]()

    def watched(self: Path, *, missing_ok: bool = False) -> None:
        if self.parent.name == "set.parts" and re.fullmatch(r"[0-9a-f]{32}\.npz|lock.*", self.name):
            removed.append(self.name)
            with pytest.raises(FolderInUseError) as refused:
                folder_lock.hold(self.parent, "lock").__enter__()
            others.append(str(refused.value))
        unlink(self, missing_ok=missing_ok)

    (raw / "set.parts").mkdir()
    (raw / "set.parts" / "lock-rows-0-of-1").write_text("of a job before")
    monkeypatch.setattr(Path, "unlink", watched)
    prepare(load_recipe(recipe_file(raw)), raw / "set", progress=False)
    assert len(removed) == 18 and removed[-2:] == ["lock-rows-0-of-1", "lock"]
    assert all(f"process {os.getpid()} on" in other for other in others)
    assert not (raw / "set.parts").exists()


@pytest.mark.parametrize("how", ["whole", "phases", "commit"])
def test_parts_on_another_file_system_cost_no_data_set(raw: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """Also if that comes to be after the beginning: no file of the old data set is removed."""
    prefix, stat = raw / "set", Path.stat
    prepare(load_recipe(recipe_file(raw)), prefix, progress=False)
    before = hashes(prefix)
    (raw / "elsewhere").mkdir()
    (raw / "set.parts").symlink_to(raw / "elsewhere")

    def elsewhere(self: Path, **how: bool) -> os.stat_result:
        found = stat(self, **how)
        device = found.st_dev + (self.name == "set.parts")
        return os.stat_result((*found[:2], device, *found[3:]))

    message = r"set\.parts: is in .*/elsewhere, on another file system than .*choose an --output in "
    other = load_recipe(recipe_file(raw, seq_length=72))
    with monkeypatch.context() as patch, pytest.raises(DataError, match=message):
        if how == "commit":
            commit = job.commit
            patch.setattr(job, "commit", lambda *what: (patch.setattr(Path, "stat", elsewhere), commit(*what)))
        else:
            patch.setattr(Path, "stat", elsewhere)
        if how == "phases":
            run(other, prefix, "parts")
        else:
            prepare(other, prefix, progress=False)
    assert hashes(prefix) == before
    verify_files(prefix)
    assert (how == "commit") == any((raw / "elsewhere").iterdir()), "it is said before there is any work"
