"""The offline job that makes a data set from a recipe, in several processes or MPI ranks.

    plan_units        list the work in a fixed order                              here, once
    write_part        read, clean, check and tokenize one unit                    in workers, in any order
    plan_rows_of      number, drop, draw and pack, with numbers only              here, once
    write_slice       write some rows and their images at their positions         in workers, in any order
    finish, commit    keys, indices, hashes; the files get their names            here, once

The output depends only on the recipe and the raw files. Any number of workers gives the same bytes. Finished work lies
in ``<prefix>.parts`` until the data set is complete. A killed job resumes from there when it is started again. The same
steps in many jobs, which need not know of each other: phases.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from megatron_vl import folder_lock
from megatron_vl.data.dataset.manifest import Manifest
from megatron_vl.data.prepare.gather import SourceCounts
from megatron_vl.data.prepare.made_for import made_for
from megatron_vl.data.prepare.outcome import check_outcome
from megatron_vl.data.prepare.part_work import (
    LOCK,
    PartWork,
    finished_parts,
    make_parts,
    remove_finished,
    remove_others,
)
from megatron_vl.data.prepare.parts import Unit, part_prefix, plan_units
from megatron_vl.data.prepare.recipe import DataRecipe
from megatron_vl.data.prepare.row_files import check_renames, commit, remove_rows
from megatron_vl.data.prepare.row_work import finish_rows, plan_rows_of, remove_plan, write_rows
from megatron_vl.data.prepare.workers import Pool, this_process
from megatron_vl.errors import DataError, FolderInUseError


def prepare(
    recipe: DataRecipe, prefix: Path, *, pool: Pool | None = None, progress: bool = True, keep_parts: bool = False
) -> Manifest:
    """Prepare the data set of a recipe at ``prefix`` and return its manifest.

    ``pool``: the workers, by default this process. ``progress``: show rate and remaining time on standard error.
    ``keep_parts``: keep the tokenized parts, so that the next run over the same files only draws, packs and writes.

    Raises:
        DataError: Files are missing, no samples remain, another process is preparing the same prefix, or
            ``<prefix>.parts`` is on another file system.
    """
    pool = pool or this_process()
    folder = parts_folder(prefix)
    with disk_errors_named(folder):
        check_renames(folder, prefix)
        units = units_of(recipe)
        with in_use_named(folder), folder_lock.hold(folder, LOCK):
            work = PartWork(recipe, units, folder)
            remove_others(work)
            remove_plan(folder)
            with progress_bar("tokenizing", "shard", show=progress) as bar:
                make_parts(work, pool=pool, bar=bar)
            with progress_bar("planning", "block", show=progress) as bar:
                parts = finished_parts(work, _refuse(work))
                plan = plan_rows_of(recipe, parts, folder, made_for(recipe, units), report=shown_by(bar))
            with progress_bar("writing", "row", show=progress) as bar:
                write_rows(plan, pool=pool, report=shown_by(bar))
            manifest = finish_rows(plan)
            commit(prefix, plan.stem, manifest)
            remove_rows(folder)
            if not keep_parts:
                remove_finished(folder)
        with suppress(OSError):  # it stays if there is anything in it
            folder.rmdir()
    return manifest


def units_of(recipe: DataRecipe) -> list[Unit]:
    """Return the units of a recipe. Raises DataError if there is none, or if files of a source are missing."""
    units = plan_units(recipe)
    if not units:
        check_outcome(recipe, [SourceCounts() for _ in recipe.sources])
    return units


def parts_folder(prefix: Path) -> Path:
    """Return the folder of a preparation's unfinished work."""
    return prefix.with_name(prefix.name + ".parts")


def progress_bar(what: str, unit: str, *, show: bool) -> tqdm[Any]:
    """Return a progress bar for a terminal. In a log, it prints one line per minute, from the second minute on."""
    wait_seconds = 0.0 if sys.stderr.isatty() else 60.0
    return tqdm(desc=what, unit=unit, disable=not show, delay=wait_seconds, mininterval=wait_seconds or 0.1)


def shown_by(bar: tqdm[Any]) -> Callable[[int, int], None]:
    """Return a function that shows how much is finished, and of how much, in a bar."""

    def report(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    return report


@contextmanager
def disk_errors_named(folder: Path) -> Iterator[None]:
    """Add the location and a remedy to errors of the file system, here or in a worker. Raises DataError for them."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{error.filename or folder}: {error.strerror or error}. Mend that (room, rights, the path) and start "
            f"again: it goes on from what is finished, in {folder}"
        ) from error


@contextmanager
def in_use_named(folder: Path) -> Iterator[None]:
    """Say where another preparation is at work, and what to do. Raises DataError."""
    try:
        yield
    except FolderInUseError as holder:
        raise DataError(
            f"{folder}: another preparation is at work here ({holder}); wait for it, or choose another --output"
        ) from holder


def _refuse(work: PartWork) -> Callable[[list[int]], NoReturn]:
    def refuse(missing: list[int]) -> NoReturn:
        unit = work.units[missing[0]]
        raise DataError(f"{part_prefix(work.folder, unit)}: the part of {unit.shard.path} is gone; start again")

    return refuse
