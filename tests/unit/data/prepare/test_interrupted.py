"""Preparation that is killed, interrupted, short of room or disturbed: it says so, goes on, and ends as it would."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_vl.data.dataset.manifest import verify_files
from megatron_vl.data.prepare import row_files
from megatron_vl.data.prepare.job import prepare
from megatron_vl.data.prepare.recipe import load_recipe
from megatron_vl.data.prepare.workers import open_pool
from megatron_vl.errors import DataError
from tests.helpers.data.jobs import NUM_SLICES, ROOT, RUN, SMALL_SLICES, command, hashes, recipe_file, run_tool
from tests.helpers.interruptible import interruptible_children

DIES_AT_CALL = """
import os, signal
calls, replace = 0, os.replace
def counted(*names):
    global calls
    calls += 1
    if calls == {call}:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*names)
os.replace = counted
"""


TELLS_OF_SLICES = """
from megatron_vl.data.prepare import row_files
write = row_files.write_slice
def told(work, folder):
    print(work.name, file=sys.stderr)
    return write(work, folder)
row_files.write_slice = told
"""


SLOW = """
import time
from megatron_vl.data.prepare import job
finish = job._Progress.finish
def slowly(*arguments):
    time.sleep(0.2)
    finish(*arguments)
job._Progress.finish = slowly
"""


# Twelve tars and four shards of text make 16 parts of two renames each; 7 slices of rows take a rename each. Committing
# takes one for the manifest, seven for the files, and one more for the manifest.
@pytest.mark.parametrize("call", [1, 2, 31, 33, 34, 39, 40, 41, 42, 48])
@pytest.mark.usefixtures("small_slices")
def test_killed_anywhere_and_started_again_it_ends_with_the_same_bytes(raw: Path, call: int) -> None:
    recipe = recipe_file(raw)
    prepare(load_recipe(recipe), raw / "undisturbed", progress=False)
    prefix = raw / "disturbed"
    killed = run_tool(*command(recipe, prefix), code=SMALL_SLICES + DIES_AT_CALL.format(call=call) + RUN)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not Path(f"{prefix}.json").exists()
    folder = Path(f"{prefix}.parts")
    done = {path: path.stat().st_mtime_ns for path in folder.glob("[0-9a-f]*.npz")}
    assert len(done) == min((call - 1) // 2, 16)
    rows = {path.name for path in folder.glob("rows-*.npz")}
    assert len(rows) == min(max(call - 33, 0), NUM_SLICES)
    again = run_tool(*command(recipe, prefix, "--keep-parts"), code=SMALL_SLICES + TELLS_OF_SLICES + RUN)
    assert again.returncode == 0, again.stderr
    assert {path: path.stat().st_mtime_ns for path in done} == done, "finished shards are not made again"
    written = {f"rows-{name}.npz" for name in again.stderr.split()}
    if call <= 34 + NUM_SLICES:  # later their file had become the data set's already
        assert not written & rows, "finished rows are not written again"
        written |= rows
    assert len(written) == NUM_SLICES
    verify_files(prefix)
    assert hashes(prefix) == hashes(raw / "undisturbed")


def test_workers_end_with_a_killed_parent(raw: Path) -> None:
    """The parent is killed while workers are at work; nothing of theirs is left, and the next start finishes."""
    recipe = recipe_file(raw)
    prefix = raw / "set"
    arguments = [str(recipe), "--output", str(prefix), "--quiet", "--workers", "2"]
    job = subprocess.Popen([sys.executable, "tools/prepare_data.py", *arguments], cwd=ROOT, start_new_session=True)
    folder = Path(f"{prefix}.parts")
    deadline = time.monotonic() + 60
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
    write = row_files.write_slice

    def hold_one_back(work: Any, stem: Path) -> int:
        late.append((work, stem))
        if len(late) == 3:
            raise KeyboardInterrupt
        return write(work, stem)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(row_files, "write_slice", hold_one_back)
        prepare(load_recipe(recipe_file(raw, pack={"seed": 1})), raw / "set", progress=False)
    straggler = []

    def disturbed(work: Any, stem: Path) -> int:
        if not straggler:
            straggler.append(pytest.raises(FileNotFoundError, write, *late[2]))
        return write(work, stem)

    with monkeypatch.context() as patch:
        patch.setattr(row_files, "write_slice", disturbed)
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
    deadline = time.monotonic() + 60
    while len(list((raw / "set.parts").glob("*.npz"))) < 3:
        assert time.monotonic() < deadline and job.poll() is None
        time.sleep(0.01)
    os.killpg(job.pid, signal.SIGINT)
    _, errors = job.communicate(timeout=30)
    assert (job.returncode, errors) == (130, "interrupted; the same command goes on from what is finished\n")
    prepare(load_recipe(recipe), raw / "set", progress=False)
    verify_files(raw / "set")


@pytest.mark.usefixtures("small_slices")
@pytest.mark.parametrize("syncs", [0, 9, 32, 37, 47])
def test_a_full_disk_is_named_and_does_no_harm(raw: Path, monkeypatch: pytest.MonkeyPatch, syncs: int) -> None:
    """16 parts and 7 slices of rows come to the disk, and then the files."""
    recipe = load_recipe(recipe_file(raw))
    sync, room = os.fsync, [syncs]

    def fsync(descriptor: int) -> None:
        room[0] -= 1
        if room[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    with monkeypatch.context() as patch, pytest.raises(DataError, match=r"set\.parts: No space left on device\. Mend"):
        patch.setattr(os, "fsync", fsync)
        prepare(recipe, raw / "set", progress=False)
    assert not Path(raw / "set.json").exists() and not list((raw / "set.parts").glob("[0-9a-f]*.draft"))
    prepare(recipe, raw / "set", progress=False)
    prepare(recipe, raw / "undisturbed", progress=False)
    assert hashes(raw / "set") == hashes(raw / "undisturbed")


@pytest.mark.parametrize("name", ["file/set", "file"])
def test_an_output_that_cannot_be_is_named(raw: Path, name: str) -> None:
    (raw / "file").write_text("")
    (raw / "file.parts").write_text("")
    with pytest.raises(DataError, match=r"parts: (Not a directory|File exists)\. Mend that"):
        prepare(load_recipe(recipe_file(raw)), raw / name, progress=False)
