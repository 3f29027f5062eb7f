"""A preparation in three phases, for clusters that start many jobs but no process that knows all of them.

    parts    every job makes its share of the parts                        jobs at the same time, in any order
    plan     number, drop, draw and pack, once all parts are there         one process
    rows     every job writes its share of the slices of the plan          jobs at the same time, in any order

The job that finds all slices written makes the data set of them. All work lies in ``<prefix>.parts``, and whatever is
there is whole. So a job that was killed does the rest when it is run again, with any number of shares. The bytes are
those of one process (job.py).

The jobs of a phase have the lock of the folder together. Another phase, another recipe, a whole preparation and another
job with the same share are refused. Nobody removes anything while jobs may be at work: ``plan`` has the lock alone when
it removes what no unit needs, and so does the last of the jobs that leave a complete data set. From then on, the folder
holds one small file. It says for which recipe and raw files the data set was made, so that a job that is run again has
nothing to do, and whether the parts were to be kept.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from megatron_vl import folder_lock
from megatron_vl.data.dataset.manifest import Manifest, manifest_path, read_manifest
from megatron_vl.data.prepare.job import disk_errors_named, in_use_named, parts_folder, progress_bar, shown_by, units_of
from megatron_vl.data.prepare.made_for import MadeFor, difference, made_for
from megatron_vl.data.prepare.part_work import (
    LOCK,
    PartWork,
    finished_parts,
    make_parts,
    remove_finished,
    remove_others,
)
from megatron_vl.data.prepare.parts import Unit
from megatron_vl.data.prepare.recipe import DataRecipe
from megatron_vl.data.prepare.row_files import check_renames, commit, lost_files, read_renaming, remove_rows, renaming
from megatron_vl.data.prepare.row_work import finish_rows, num_missing, plan_rows_of, remove_plan, write_rows
from megatron_vl.data.prepare.share import Share
from megatron_vl.data.prepare.stored_plan import StoredPlan, load_plan, plan_path
from megatron_vl.data.prepare.workers import Pool
from megatron_vl.errors import DataError, FolderInUseError
from megatron_vl.files import sha256_of_file, write_whole

Phase = Literal["parts", "plan", "rows"]
_COMPLETE = "rows-complete.json"
_COMMIT = f"{LOCK}-commit"
_NUM_NAMED = 5


@dataclass(frozen=True)
class Outcome:
    """What a phase has come to."""

    line: str
    manifest: Manifest | None = None
    """That of the data set, if this process has made it."""


@dataclass(frozen=True)
class Settings:
    """How a phase is run."""

    share: Share
    pool: Pool
    progress: bool = True
    """Show rate and remaining time on standard error."""
    keep_parts: bool = False
    """Keep the tokenized parts when the data set is complete."""


@dataclass(frozen=True)
class _Task:
    work: PartWork
    prefix: Path
    made_for: MadeFor
    phase: Phase
    settings: Settings

    @property
    def folder(self) -> Path:
        return self.work.folder

    @property
    def units(self) -> Sequence[Unit]:
        return self.work.units


def run_phase(recipe: DataRecipe, prefix: Path, phase: Phase, settings: Settings) -> Outcome:
    """Do a share of a phase.

    Raises:
        DataError: Files are missing, as for ``prepare``; or an earlier phase is not finished, or was for another
            recipe or other raw files; or another phase, another preparation or the same share is at work; or
            ``<prefix>.parts`` is on another file system.
    """
    folder = parts_folder(prefix)
    with disk_errors_named(folder):
        check_renames(folder, prefix)
        units = units_of(recipe)
        task = _Task(PartWork(recipe, units, folder), prefix, made_for(recipe, units), phase, settings)
        outcome = _nothing_left(task) or {"parts": _parts, "plan": _plan, "rows": _rows}[phase](task)
        if phase == "rows" and _is_complete(task):
            _clean(task)
    return outcome


def _parts(task: _Task) -> Outcome:
    share, pool = task.settings.share, task.settings.pool
    with _joined(task), progress_bar("tokenizing", "shard", show=task.settings.progress) as bar:
        if done := _nothing_left(task):  # since it was asked without the lock
            return done
        plan = load_plan(task.folder)
        if plan is not None and plan.made_for.fingerprint == task.made_for.fingerprint:
            return Outcome(f"{share}: nothing to do, the rows are planned already (go on with --phase rows)")
        before = make_parts(task.work, pool=pool, bar=bar, share=share, renew=False)
    mine = len(share.of(task.units))
    return Outcome(f"{share}: its {mine} of {len(task.units)} parts are there, {before} of them from before")


def _plan(task: _Task) -> Outcome:
    with in_use_named(task.folder), folder_lock.hold(task.folder, LOCK):
        if done := _nothing_left(task):
            return done
        before = load_plan(task.folder)
        if before is not None and difference(before.made_for, task.made_for, task.units):
            before = None  # it stays until another takes its place: this recipe may be the wrong one
        if before is not None and _all_written(task, before):
            return Outcome("all rows are written already (--phase rows completes the data set)")
        parts = finished_parts(task.work, _refuse_missing(task, outdated=before is not None))
        with progress_bar("planning", "block", show=task.settings.progress) as bar:
            plan = plan_rows_of(task.work.recipe, parts, task.folder, task.made_for, report=shown_by(bar))
        remove_others(task.work)  # not before all parts are found: the recipe may be the wrong one
    return Outcome(f"{plan.manifest.num_rows} rows are planned, in {len(plan.slices)} slices")


def _all_written(task: _Task, plan: StoredPlan) -> bool:
    """Return whether the renaming of a plan's files has begun, and none of them was lost since."""
    manifest = read_renaming(plan.stem)
    return manifest is not None and not lost_files(task.prefix, plan.stem, manifest)


def _rows(task: _Task) -> Outcome:
    share, pool = task.settings.share, task.settings.pool
    with _joined(task), progress_bar("writing", "row", show=task.settings.progress) as bar:
        if done := _nothing_left(task):
            return done
        plan = _fitting_plan(task)
        if not renaming(plan.stem):
            write_rows(plan, pool=pool, report=shown_by(bar), share=share)
            missing = num_missing(plan)
            if missing:
                mine, all_slices = len(share.of(plan.slices)), len(plan.slices)
                return Outcome(f"{share}: its {mine} slices are written, {missing} of all {all_slices} are not")
        return _complete(task, plan)


def _complete(task: _Task, plan: StoredPlan) -> Outcome:
    """Make the data set of a plan whose slices are written, unless another job is at it, or has done it."""
    try:
        with folder_lock.hold(task.folder, _COMMIT):
            if done := _nothing_left(task):
                return done
            manifest = read_renaming(plan.stem) or finish_rows(plan)
            facts = {
                "made_for": task.made_for.fingerprint,
                "manifest": manifest.fingerprint,
                "keep_parts": task.settings.keep_parts,
            }
            write_whole(task.folder / _COMPLETE, json.dumps(facts), durable=True)  # true once the manifest is there
            commit(task.prefix, plan.stem, manifest)
    except FolderInUseError as holder:
        return Outcome(
            f"{task.settings.share}: its slices are written, and another job completes the data set ({holder})"
        )
    return Outcome(f"prepared {task.prefix}", manifest)


def _nothing_left(task: _Task) -> Outcome | None:
    return Outcome(f"{task.prefix}: the data set is complete") if _is_complete(task) else None


def _is_complete(task: _Task) -> bool:
    """Return whether the data set was made by the phases, for this recipe and these raw files, and is in its place."""
    facts = _completed(task)
    try:
        found = sha256_of_file(manifest_path(task.prefix))
        if (facts.get("made_for"), facts.get("manifest")) != (task.made_for.fingerprint, found):
            return False
        read_manifest(task.prefix)
    except (OSError, DataError):
        return False
    return True


def _completed(task: _Task) -> Mapping[str, Any]:
    """Return what the job that completed the data set has left: for what it was made, and whether parts are kept."""
    try:
        return dict(json.loads((task.folder / _COMPLETE).read_bytes()))
    except (OSError, ValueError, TypeError):
        return {}


def _clean(task: _Task) -> None:
    """Remove what a complete data set no longer needs, if no other job is in the folder.

    Parts stay if this job, or the one that completed the data set, was told to keep them.
    """
    kept = frozenset([task.folder / _COMPLETE])
    with suppress(FolderInUseError), folder_lock.hold(task.folder, LOCK):
        if task.settings.keep_parts or _completed(task).get("keep_parts", True):
            remove_rows(task.folder, kept)
        else:
            remove_finished(task.folder, kept=kept)


@contextmanager
def _joined(task: _Task) -> Iterator[None]:
    """Share the lock of the folder with the other jobs of this phase."""
    share, phase = task.settings.share, task.phase
    group = f"phase {phase}" if phase == "rows" else f"phase {phase}, recipe and files {task.made_for.fingerprint[:8]}"
    with ExitStack() as held:
        with in_use_named(task.folder):
            member = f"{phase}-{share.index}-of-{share.count}"
            held.enter_context(folder_lock.join(task.folder, LOCK, group, member))
        yield


def _fitting_plan(task: _Task) -> StoredPlan:
    plan = load_plan(task.folder)
    if plan is None:
        raise DataError(f"{plan_path(task.folder)}: there is no plan; run --phase plan, when all parts are there")
    differs = difference(plan.made_for, task.made_for, task.units)
    if differs:
        raise DataError(
            f"{plan_path(task.folder)}: the plan is for another recipe or other files: {differs}. Take back that "
            "change, or run the phases again, from parts on: what is finished is used again"
        )
    return plan


def _refuse_missing(task: _Task, *, outdated: bool) -> Callable[[list[int]], NoReturn]:
    """Return what refuses missing parts.

    ``outdated``: the plan that is there was made of them. It goes, so that ``--phase parts`` makes them anew. What is
    written of its rows stays: the same parts give the same plan.
    """

    def refuse(missing: list[int]) -> NoReturn:
        if outdated:
            remove_plan(task.folder)
        named = "\n".join(f"  {task.units[number]}" for number in missing[:_NUM_NAMED])
        more = f"\n  and {len(missing) - _NUM_NAMED} others" if len(missing) > _NUM_NAMED else ""
        raise DataError(
            f"{task.folder}: {len(missing)} of {len(task.units)} parts are missing:\n{named}{more}\n"
            f"{_who_makes(missing, task.folder)} If they were made, the recipe or the raw files have changed since."
        )

    return refuse


def _who_makes(missing: Sequence[int], folder: Path) -> str:
    """Return which shares are to be done again, if all jobs so far had the same number of shares."""
    found = [re.fullmatch(rf"{LOCK}-parts-\d+-of-(\d+)", path.name) for path in folder.iterdir()]
    counts = {int(match[1]) for match in found if match}
    if len(counts) != 1:
        return "Run the same command with --phase parts, which makes all that are missing."
    (count,) = counts
    shares = sorted({number % count for number in missing})
    named = ", ".join(map(str, shares[:_NUM_NAMED])) + (", …" if len(shares) > _NUM_NAMED else "")
    return (
        f"They are of {len(shares)} of {count} shares: {named}. Run the same command with --phase parts --shard-index "
        f"{shares[0]} --num-shards {count}, and so on."
    )
