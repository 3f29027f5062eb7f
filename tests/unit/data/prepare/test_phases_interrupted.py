"""Phases of a preparation that are killed, or find damage: run again, they end with the bytes of one process."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from megatron_vl.data.prepare import phases
from megatron_vl.data.prepare.job import prepare
from megatron_vl.data.prepare.parts import part_prefix, plan_units
from megatron_vl.data.prepare.phases import Phase
from megatron_vl.data.prepare.recipe import DataRecipe, load_recipe
from megatron_vl.data.prepare.stored_plan import load_plan, slice_path
from megatron_vl.errors import DataError
from tests.helpers.data.jobs import RUN, SMALL_SLICES, hashes, recipe_file, run_tool
from tests.helpers.data.phases import run, run_all

pytestmark = pytest.mark.usefixtures("small_slices")


DIES = """
import os, signal
num_renames, replace = 0, os.replace
def mortal(*names):
    global num_renames
    if num_renames == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    num_renames += 1
    replace(*names)
os.replace = mortal
"""


def test_a_killed_job_is_run_again(raw: Path, recipe: DataRecipe) -> None:
    """In each phase, before its third file gets its name."""
    prepare(recipe, raw / "one", progress=False)
    flags = [str(raw / "data.yaml"), "--output", str(raw / "set"), "--quiet", "--workers", "1"]
    all_phases: tuple[tuple[Phase, int], ...] = (("parts", 3), ("plan", 1), ("rows", 2))
    for phase, shards in all_phases:
        share = ["--shard-index", str(shards - 1), "--num-shards", str(shards)]
        killed = run_tool(*flags, "--phase", phase, *share, code=SMALL_SLICES + DIES + RUN)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        run_all(recipe, raw / "set", phase, shards)
    assert hashes(raw / "set") == hashes(raw / "one")


@pytest.mark.parametrize("dies_at", range(-1, 8))
def test_killed_at_any_rename_of_the_commit_it_is_completed(
    raw: Path, recipe: DataRecipe, monkeypatch: pytest.MonkeyPatch, dies_at: int
) -> None:
    """Before the rename of that number, of the files of the data set; -1: before all of them."""
    prefix, made, replace = raw / "set", list[str](), os.replace
    prepare(recipe, raw / "one", progress=False)
    assert len(hashes(raw / "one")) == 8
    prefix.with_suffix(".json").write_text("an older one")
    run(recipe, prefix, "parts")
    run(recipe, prefix, "plan")

    def mortal(source: Path, target: Path) -> None:
        is_last = len(made) == dies_at if target.parent == raw else dies_at < 0 and target.name == "rows-complete.json"
        if is_last:
            raise KeyboardInterrupt
        if target.parent == raw:
            made.append(target.name)
        replace(source, target)

    def inodes() -> dict[str, int]:
        return {name: (raw / name).stat().st_ino for name in made}

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", mortal)
        run(recipe, prefix, "rows")
    assert prefix.with_suffix(".json").exists() == (dies_at < 0), "the old one stays until the new one is finished"
    if dies_at >= 0:
        assert "--phase rows completes" in run(recipe, prefix, "plan").line
    before = inodes()
    assert run(recipe, prefix, "rows", 1, 2).line == f"prepared {prefix}"
    assert hashes(prefix) == hashes(raw / "one")
    assert inodes() == before, "what has its name keeps it"


@pytest.mark.parametrize("damage", ["slice", "room", "record"])
def test_damage_between_phases_is_named_and_mended(raw: Path, recipe: DataRecipe, damage: str) -> None:
    prepare(recipe, raw / "one", progress=False)
    run(recipe, raw / "set", "parts")
    run(recipe, raw / "set", "plan")
    plan = load_plan(raw / "set.parts")
    assert plan is not None
    if damage == "slice":
        path = slice_path(plan.folder, plan.slices[2].name)
        path.write_bytes(path.read_bytes()[:-30])
        with pytest.raises(DataError, match=rf"{path.name}: gone or damaged; plan again"):
            run(recipe, raw / "set", "rows")
        run(recipe, raw / "set", "plan")
    elif damage == "room":
        Path(f"{plan.stem}.tokens.bin").unlink()
        with pytest.raises(DataError, match=r"gone or changed; plan again \(--phase plan\)"):
            run(recipe, raw / "set", "rows")
        run(recipe, raw / "set", "plan")
    else:
        run(recipe, raw / "set", "rows", 0, 2)
        record = Path(f"{plan.stem}-{plan.slices[0].name}.npz")
        record.write_bytes(b"")
        with pytest.raises(DataError, match=r"gone or damaged; start again, and its rows are written again"):
            run(recipe, raw / "set", "rows", 1, 2)
        run(recipe, raw / "set", "rows", 0, 2)
    run(recipe, raw / "set", "rows")
    assert hashes(raw / "set") == hashes(raw / "one")


def test_a_part_that_is_lost_after_planning_is_made_anew(raw: Path, recipe: DataRecipe) -> None:
    """Planning refuses, and the plan goes; what is written of its rows stays. A plan of another recipe stays."""
    prefix = raw / "set"
    prepare(recipe, raw / "one", progress=False)
    run(recipe, prefix, "parts")
    run(recipe, prefix, "plan")
    plan = load_plan(prefix.with_suffix(".parts"))
    assert plan is not None
    run(recipe, prefix, "rows", 1, 3)
    records = {path: path.stat().st_ino for path in plan.folder.glob(f"{plan.stem.name}-*.npz")}
    lost = part_prefix(plan.folder, plan_units(recipe)[0]).with_suffix(".bin")
    lost.unlink()
    with pytest.raises(DataError, match=rf"{lost.name}: cannot be opened .*plan again \(--phase plan"):
        run(recipe, prefix, "rows")
    records |= {path: path.stat().st_ino for path in plan.folder.glob(f"{plan.stem.name}-*.npz")}
    with pytest.raises(DataError, match="16 of 16 parts are missing"):
        run(load_recipe(recipe_file(raw, max_sample_length=40)), prefix, "plan")
    assert load_plan(plan.folder) is not None
    with pytest.raises(DataError, match="1 of 16 parts are missing"):
        run(recipe, prefix, "plan")
    assert "15 of them from before" in run(recipe, prefix, "parts").line
    run(recipe, prefix, "plan")
    assert records and {path: path.stat().st_ino for path in records} == records
    run(recipe, prefix, "rows")
    assert hashes(prefix) == hashes(raw / "one")


@pytest.mark.parametrize("damage", ["gone", "empty"])
def test_files_that_are_lost_during_the_commit_are_written_again(
    raw: Path, recipe: DataRecipe, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    prefix, replace = raw / "set", os.replace
    prepare(recipe, raw / "one", progress=False)
    run(recipe, prefix, "parts")
    run(recipe, prefix, "plan")

    def mortal(source: Path, target: Path) -> None:
        if target.parent == raw and list(raw.glob("set.*.bin")):
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", mortal)
        run(recipe, prefix, "rows")
    (renamed,) = raw.glob("set.*.bin")
    assert "--phase rows completes" in run(recipe, prefix, "plan").line
    renamed.unlink() if damage == "gone" else renamed.write_bytes(b"")
    with pytest.raises(DataError, match=r"gone; plan again \(--phase plan"):
        run(recipe, prefix, "rows")
    assert "rows are planned" in run(recipe, prefix, "plan").line
    run(recipe, prefix, "rows")
    assert hashes(prefix) == hashes(raw / "one")


def test_a_file_that_is_lost_before_the_cleaning_is_written_again(
    raw: Path, recipe: DataRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job that completed the data set was killed before it removed the plan and the records of its rows."""
    run(recipe, raw / "set", "parts")
    run(recipe, raw / "set", "plan")
    with monkeypatch.context() as patch:
        patch.setattr(phases, "_clean", lambda task: None)
        run(recipe, raw / "set", "rows")
    before = hashes(raw / "set")
    (raw / "set.images.bin").unlink()
    with pytest.raises(DataError, match=r"gone or changed; plan again \(--phase plan\)"):
        run(recipe, raw / "set", "rows")
    run(recipe, raw / "set", "plan")
    run(recipe, raw / "set", "rows")
    assert hashes(raw / "set") == before
