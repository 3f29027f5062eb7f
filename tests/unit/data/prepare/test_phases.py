"""Preparation in phases: any number of jobs, in any order, killed and repeated, give the bytes of one process."""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from megatron_vl.cli.prepare import main
from megatron_vl.data.dataset.manifest import read_manifest, verify_files
from megatron_vl.data.prepare import phases, row_work
from megatron_vl.data.prepare.job import prepare
from megatron_vl.data.prepare.parts import part_prefix, plan_units
from megatron_vl.data.prepare.phases import Phase
from megatron_vl.data.prepare.recipe import DataRecipe, load_recipe
from megatron_vl.data.prepare.stored_plan import load_plan
from megatron_vl.data.prepare.workers import Pool, this_process
from megatron_vl.errors import DataError
from tests.helpers.data.jobs import RUN, SMALL_SLICES, hashes, recipe_file, run_tool
from tests.helpers.data.phases import run, run_all
from tests.helpers.data.prepared import png, recipe_values
from tests.helpers.data.reading import write_tar
from tests.unit.data.prepare.test_jobs import mpirun

pytestmark = pytest.mark.usefixtures("small_slices")


def numbers_of_units(recipe: DataRecipe, folder: Path) -> set[int]:
    """Of which units the parts are there."""
    return {i for i, unit in enumerate(plan_units(recipe)) if part_prefix(folder, unit).with_suffix(".npz").exists()}


@pytest.mark.parametrize(("of_parts", "of_rows"), [(1, 1), (3, 2), (20, 40)])
def test_any_number_of_jobs_gives_the_same_bytes(raw: Path, recipe: DataRecipe, of_parts: int, of_rows: int) -> None:
    """Also more jobs than there is work, and every one twice."""
    prepare(recipe, raw / "one", progress=False)
    for index in [*reversed(range(of_parts)), *range(of_parts)]:
        run(recipe, raw / "set", "parts", index, of_parts)
    assert run(recipe, raw / "set", "plan").line == run(recipe, raw / "set", "plan").line
    lines = [run(recipe, raw / "set", "rows", index, of_rows).line for index in reversed(range(of_rows))]
    assert sum(line == f"prepared {raw / 'set'}" for line in lines) == 1
    assert hashes(raw / "set") == hashes(raw / "one")
    verify_files(raw / "set")
    assert [path.name for path in (raw / "set.parts").iterdir()] == ["rows-complete.json"]


def test_every_nth_unit_and_slice_is_of_a_share(raw: Path, recipe: DataRecipe) -> None:
    run(recipe, raw / "set", "parts", 1, 5)
    assert numbers_of_units(recipe, raw / "set.parts") == {1, 6, 11}
    run_all(recipe, raw / "set", "parts", 2)
    run(recipe, raw / "set", "plan")
    plan = load_plan(raw / "set.parts")
    assert plan is not None and len(plan.slices) > 6
    run(recipe, raw / "set", "rows", 2, 3)
    written = [i for i, item in enumerate(plan.slices) if Path(f"{plan.stem}-{item.name}.npz").exists()]
    assert written == list(range(2, len(plan.slices), 3))


def test_a_job_that_is_run_again_does_nothing_that_is_finished(raw: Path, recipe: DataRecipe) -> None:
    """Not even parts of which records lacked files, unlike a preparation in one go: a retry would never end."""
    write_tar(raw / "captions/00011.tar", [("a.txt", b"an image that is not there")])
    pairs = [{"image": f"{name}.png", "caption": "a shade"} for name in "ab"]
    (raw / "a.png").write_bytes(png(3))
    (raw / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    values = recipe_values()
    values["sources"].append({"name": "pairs", "type": "pairs", "path": "pairs.jsonl", "image_root": "."})
    recipe = load_recipe(recipe_file(raw, sources=values["sources"]))

    def files(begin: str) -> dict[str, int]:
        return {path.name: path.stat().st_ino for path in (raw / "set.parts").glob(f"{begin}*.npz")}

    for count in (2, 1):
        run_all(recipe, raw / "set", "parts", count)
        before = files("[0-9a-f]")
        assert (
            run(recipe, raw / "set", "parts").line
            == "share 0 of 1: its 17 of 17 parts are there, 17 of them from before"
        )
        assert files("[0-9a-f]") == before
    run(recipe, raw / "set", "plan")
    (raw / "b.png").write_bytes(png(4))
    assert "the rows are planned already" in run(recipe, raw / "set", "parts").line
    first = files("rows-slice-")
    run(recipe, raw / "set", "rows", 0, 2)
    records = files("rows-")
    run(recipe, raw / "set", "rows", 0, 2)
    run(recipe, raw / "set", "plan")
    assert files("rows-slice-") == first and {
        name: ino for name, ino in files("rows-").items() if "plan" not in name
    } == {name: ino for name, ino in records.items() if "plan" not in name}


@pytest.mark.parametrize("limit", [1, 7, 31])
def test_a_limit_holds_whatever_the_jobs_knew_of_each_other(raw: Path, limit: int) -> None:
    values = recipe_values()
    values["sources"][0]["limit"] = limit
    recipe = load_recipe(recipe_file(raw, sources=values["sources"]))
    prepare(recipe, raw / "one", progress=False)
    for name, order in (("up", range(4)), ("down", reversed(range(4)))):
        for index in order:
            run(recipe, raw / name, "parts", index, 4)
        made = numbers_of_units(recipe, raw / f"{name}.parts")
        run(recipe, raw / name, "plan")
        run_all(recipe, raw / name, "rows", 2)
        assert hashes(raw / name) == hashes(raw / "one"), name
        if limit == 7:
            not_needed = set(range(1, 12)) if name == "up" else {4, 8}
            assert set(range(16)) - made == not_needed, "what job 0 has finished is enough"


def test_what_other_jobs_finish_meanwhile_is_seen(raw: Path) -> None:
    values = recipe_values()
    values["sources"][0]["limit"] = 21
    recipe = load_recipe(recipe_file(raw, sources=values["sources"]))
    seen = []

    class Watched:
        def submit(self, fn: Callable[..., Any], /, *arguments: Any) -> Future[Any]:
            seen.append(str(arguments[1]))
            if len(seen) == 1:
                run(recipe, raw / "set", "parts", 1, 2)
            return this_process().executor.submit(fn, *arguments)

    run(recipe, raw / "set", "parts", 0, 2, pool=Pool(Watched(), 1))
    tars = [re.findall(r"\d{5}\.tar", item)[0] for item in seen if ".tar" in item]
    assert tars == ["00000.tar", "00002.tar"], "with 00001.tar they give 30"


def test_parts_that_are_missing_are_named_with_their_shares(raw: Path, recipe: DataRecipe) -> None:
    with pytest.raises(
        DataError, match=r"16 of 16 parts are missing:\n.*00000\.tar.*(\n.*){4}\n  and 11 others\nRun the"
    ):
        run(recipe, raw / "set", "plan")
    for index in (0, 1, 3):
        run(recipe, raw / "set", "parts", index, 5)
    with pytest.raises(
        DataError,
        match=r"6 of 16 parts are missing:\n.*00002\.tar(.*\n)+They are of 2 of 5 shares: 2, 4\. "
        r"Run the same command with --phase parts --shard-index 2 --num-shards 5, and so on\.",
    ):
        run(recipe, raw / "set", "plan")
    before = numbers_of_units(recipe, raw / "set.parts")
    other = load_recipe(recipe_file(raw, max_sample_length=40))
    with pytest.raises(DataError, match="16 of 16 parts are missing"):
        run(other, raw / "set", "plan")
    assert numbers_of_units(recipe, raw / "set.parts") == before, "a mistake costs no work"
    with pytest.raises(DataError, match="there is no plan; run --phase plan"):
        run(recipe, raw / "set", "rows")


def test_another_recipe_and_other_files_are_refused_by_name(raw: Path, recipe: DataRecipe) -> None:
    run(recipe, raw / "set", "parts")
    run(recipe, raw / "set", "plan")
    with pytest.raises(
        DataError, match=r"for another recipe or other files: pack\.seed was 0, and is now 3\. Take back"
    ):
        run(load_recipe(recipe_file(raw, pack={"seed": 3})), raw / "set", "rows")
    tar = raw / "captions/00004.tar"
    state = tar.stat()
    os.utime(tar, (1, 1))
    with pytest.raises(DataError, match=r"of 16 shards, 1 are new or have changed since, first .*00004\.tar, shard"):
        run(recipe, raw / "set", "rows")
    content = tar.read_bytes()
    tar.unlink()
    with pytest.raises(DataError, match="there were 16 shards, and now there are 15"):
        run(recipe, raw / "set", "rows")
    tar.write_bytes(content)
    os.utime(tar, ns=(state.st_atime_ns, state.st_mtime_ns))
    run(recipe, raw / "set", "rows")
    verify_files(raw / "set")


@pytest.mark.parametrize("folder", [False, True])
def test_other_benchmark_images_are_refused_by_name(raw: Path, folder: bool) -> None:
    """No part depends on them, but the plan does."""
    listed = raw / ("bench" if folder else "bench.txt")
    if folder:
        listed.mkdir()
    image = listed / "a.png" if folder else listed
    image.write_bytes(png(250) if folder else b"00000000000000ff\n")
    sources = [entry | {"filters": {"benchmark_images": listed.name}} for entry in recipe_values()["sources"]]
    recipe = load_recipe(recipe_file(raw, sources=sources))
    for phase in ("parts", "plan"):
        run(recipe, raw / "set", phase)
    image.write_bytes(png(3) if folder else b"00000000000000ff\n00000000000000fe\n")
    with pytest.raises(DataError, match=r"other files: state of the files of sources\[0\]\.filters\.benchmark_"):
        run(recipe, raw / "set", "rows")


def test_once_complete_every_phase_has_nothing_to_do(raw: Path, recipe: DataRecipe) -> None:
    for phase in ("parts", "plan", "rows"):
        run(recipe, raw / "set", phase, keep_parts=True)
    parts = numbers_of_units(recipe, raw / "set.parts")
    assert len(parts) == 16 and not list((raw / "set.parts").glob("rows-slice*"))
    for phase in ("parts", "plan"):
        assert run(recipe, raw / "set", phase, 0, 1).line == f"{raw / 'set'}: the data set is complete"
    assert run(recipe, raw / "set", "rows", 3, 4, keep_parts=True).line.endswith("complete")
    assert numbers_of_units(recipe, raw / "set.parts") == parts
    other = load_recipe(recipe_file(raw, pack={"seed": 3}))
    assert "16 of them from before" in run(other, raw / "set", "parts").line
    (raw / "set.json").write_text(" " + (raw / "set.json").read_text())
    assert "16 of them from before" in run(recipe, raw / "set", "parts").line, "another manifest is another data set"
    run(other, raw / "set", "plan")
    assert run(other, raw / "set", "rows").manifest == read_manifest(raw / "set")
    prepare(recipe, raw / "set", progress=False)
    assert not (raw / "set.parts").exists()


@pytest.mark.parametrize("damage", ["gone", "empty"])
def test_a_data_set_that_lacks_a_file_is_not_complete(raw: Path, recipe: DataRecipe, damage: str) -> None:
    """And a job that says nothing of parts removes none that the job which completed the data set has kept."""
    for phase in ("parts", "plan", "rows"):
        run(recipe, raw / "set", phase, keep_parts=True)
    before, parts = hashes(raw / "set"), numbers_of_units(recipe, raw / "set.parts")
    assert run(recipe, raw / "set", "rows").line.endswith("the data set is complete")
    assert numbers_of_units(recipe, raw / "set.parts") == parts and len(parts) == 16
    images = raw / "set.images.bin"
    images.unlink() if damage == "gone" else images.write_bytes(b"")
    with pytest.raises(DataError, match="there is no plan; run --phase plan"):
        run(recipe, raw / "set", "rows")
    assert "16 of them from before" in run(recipe, raw / "set", "parts").line
    run(recipe, raw / "set", "plan")
    assert run(recipe, raw / "set", "rows").line == f"prepared {raw / 'set'}"
    assert hashes(raw / "set") == before
    assert [path.name for path in (raw / "set.parts").iterdir()] == ["rows-complete.json"]


def test_a_job_that_comes_while_another_completes_the_data_set_has_nothing_to_do(
    raw: Path, recipe: DataRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its first look and its lock, the other one completes the data set, and removes the parts and the plan."""
    look = phases._is_complete
    for phase in ("parts", "plan", "rows"):
        prefix, looks = raw / f"at-{phase}", [0]
        run(recipe, prefix, "parts")
        run(recipe, prefix, "plan")

        def late(task: Any, prefix: Path = prefix, looks: list[int] = looks) -> bool:
            looks[0] += 1
            if looks[0] == 1:
                assert run(recipe, prefix, "rows").manifest is not None
                return False
            return look(task)

        with monkeypatch.context() as patch:
            patch.setattr(phases, "_is_complete", late)
            assert run(recipe, prefix, phase).line == f"{prefix}: the data set is complete"


def test_who_else_is_at_work_is_refused(raw: Path, recipe: DataRecipe) -> None:
    other = load_recipe(recipe_file(raw, max_sample_length=40))
    others = [
        lambda: prepare(recipe, raw / "set", progress=False),
        lambda: run(recipe, raw / "set", "parts", 1, 3),
        lambda: run(recipe, raw / "set", "plan"),
        lambda: run(recipe, raw / "set", "rows", 2, 3),
        lambda: run(other, raw / "set", "parts", 2, 3),
    ]

    class Watched:
        def submit(self, fn: Callable[..., Any], /, *arguments: Any) -> Future[Any]:
            while others:
                with pytest.raises(
                    DataError, match=rf"another preparation is at work here \(.*process {os.getpid()} on"
                ):
                    others.pop()()
                assert "prepared" not in run(recipe, raw / "set", "parts", 0, 3).line, "another job may work"
            return this_process().executor.submit(fn, *arguments)

    run(recipe, raw / "set", "parts", 1, 3, pool=Pool(Watched(), 1))
    assert not others


def test_jobs_at_the_same_time_complete_the_data_set_once(raw: Path, recipe: DataRecipe) -> None:
    prepare(recipe, raw / "one", progress=False)
    with ThreadPoolExecutor(4) as threads:

        def together(phase: Phase) -> list[str]:
            return [
                item.line for item in threads.map(lambda index: run(recipe, raw / "set", phase, index, 4), range(4))
            ]

        together("parts")
        run(recipe, raw / "set", "plan")
        lines = together("rows")
    assert lines.count(f"prepared {raw / 'set'}") == 1, lines
    assert hashes(raw / "set") == hashes(raw / "one")
    run(recipe, raw / "set", "rows")
    assert [path.name for path in (raw / "set.parts").iterdir()] == ["rows-complete.json"]


def test_in_any_order_among_all_kinds_of_workers(raw: Path, recipe: DataRecipe) -> None:
    """A preparation in one go takes up what jobs have begun, and jobs what it has left."""
    prepare(recipe, raw / "one", progress=False)
    chance = random.Random(0)
    shards = [(index, count) for count in (2, 3) for index in range(count)]
    chance.shuffle(shards)
    for index, count in shards[:3]:
        run(recipe, raw / "set", "parts", index, count)

    class Dying:
        def submit(self, fn: Callable[..., Any], /, *arguments: Any) -> Future[Any]:
            if fn is row_work.write_stored_slice:
                raise KeyboardInterrupt
            return this_process().executor.submit(fn, *arguments)

    with pytest.raises(KeyboardInterrupt):
        prepare(recipe, raw / "set", pool=Pool(Dying(), 1), progress=False)
    for index, count in shards:
        run(recipe, raw / "set", "rows", index, count)
    assert hashes(raw / "set") == hashes(raw / "one")


def test_a_share_may_have_processes_or_ranks_of_its_own(raw: Path, recipe: DataRecipe) -> None:
    prepare(recipe, raw / "one", progress=False)
    flags = [str(raw / "data.yaml"), "--output", str(raw / "set"), "--quiet", "--num-shards", "2", "--shard-index"]
    for phase, of_ranks in (("parts", "0"), ("rows", "1")):
        of_processes = "1" if of_ranks == "0" else "0"
        done = [
            mpirun(2, *flags, of_ranks, "--phase", phase, code=SMALL_SLICES + RUN),
            run_tool(*flags, of_processes, "--phase", phase, "--workers", "2", code=SMALL_SLICES + RUN),
        ]
        assert [job.returncode for job in done] == [0, 0], [job.stderr for job in done]
        assert all(job.stdout.count("share ") == 1 for job in done[: 1 if phase == "rows" else 2]), "one rank speaks"
        if phase == "parts":
            run(recipe, raw / "set", "plan")
    assert hashes(raw / "set") == hashes(raw / "one")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--shard-index 0 --num-shards 2", "need --phase"),
        ("--phase plan --shard-index 1 --num-shards 2", "--phase plan: one process plans"),
        ("--phase parts --shard-index 1", "found only one"),
        ("--phase rows --num-shards 4", "found only one"),
        ("--phase rows --shard-index 4 --num-shards 4", "--shard-index 4: expected 0 to 3"),
        ("--phase rows --shard-index -1 --num-shards 4", "--shard-index -1: expected 0 to 3"),
        ("--phase parts --shard-index 0 --num-shards 0", "--num-shards 0: expected at least 1"),
    ],
)
def test_flags_that_contradict_each_other(raw: Path, capsys: pytest.CaptureFixture[str], flags: str, says: str) -> None:
    assert main([str(recipe_file(raw)), "--quiet", *flags.split()]) == 2
    assert says in capsys.readouterr().err


def test_the_command_says_what_has_come_of_a_phase(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [str(recipe_file(raw)), "--output", str(raw / "set"), "--quiet", "--workers", "1", "--phase"]
    assert main([*command, "plan"]) == 2
    assert "16 of 16 parts are missing" in capsys.readouterr().err
    assert main([*command, "parts", "--shard-index", "0", "--num-shards", "1"]) == main([*command, "plan"]) == 0
    assert main([*command, "rows", "--shard-index", "1", "--num-shards", "2"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "share 0 of 1: its 16 of 16 parts are there, 0 of them from before"
    assert re.fullmatch(r"\d+ rows are planned, in \d+ slices", said[1])
    assert re.fullmatch(r"share 1 of 2: its \d+ slices are written, \d+ of all \d+ are not", said[2])
    assert main([*command, "rows", "--shard-index", "0", "--num-shards", "2"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"prepared {raw / 'set'}"
    assert main([*command, "rows", "--shard-index", "0", "--num-shards", "2"]) == 0
    assert capsys.readouterr().out == f"{raw / 'set'}: the data set is complete\n"
