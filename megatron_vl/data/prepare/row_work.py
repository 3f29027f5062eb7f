"""The second half of preparation: from parts to a stored plan, to written slices, to the files of a data set.

plan_rows_of     number, drop, draw and pack; store the slices and the plan      one process
write_rows       write the slices of a share that are not written yet            in workers, in any order
finish_rows      the keys, the indices and the hashes of the written slices      one process
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from megatron_vl.data.dataset.manifest import Manifest
from megatron_vl.data.prepare.made_for import MadeFor
from megatron_vl.data.prepare.merge import FinishedPart, Progress, merge_parts
from megatron_vl.data.prepare.recipe import DataRecipe
from megatron_vl.data.prepare.row_files import file_entries, finish_files, has_room, make_room
from megatron_vl.data.prepare.row_slices import IMAGES, TOKENS, SliceRecord, read_record, record_path
from megatron_vl.data.prepare.share import WHOLE, Share
from megatron_vl.data.prepare.stored_plan import (
    SliceShape,
    StoredPlan,
    load_slice,
    plan_path,
    shape_of,
    slice_path,
    store_plan,
    store_slices,
    write_stored_slice,
)
from megatron_vl.data.prepare.workers import Pool, hand_out
from megatron_vl.errors import DataError


def plan_rows_of(
    recipe: DataRecipe, parts: Iterable[FinishedPart], folder: Path, made_for: MadeFor, *, report: Progress
) -> StoredPlan:
    """Plan the rows of all parts, store the plan in their folder, and make room for its rows.

    ``parts`` are in the order of the units. ``report`` gets the numbers of planned and of all blocks. Written slices of
    the same plan stay. What belongs to other plans goes.

    Raises:
        DataError: As for ``check_outcome``.
    """
    merged = merge_parts(recipe, parts, folder)
    slices = store_slices(merged.slices(report), folder)
    plan = StoredPlan(folder, slices, merged.manifest(), made_for)
    records = [record_path(plan.stem, item.name) for item in plan.slices]
    make_room(_sizes(plan), plan.stem, records, kept=[slice_path(folder, item.name) for item in plan.slices])
    store_plan(plan)
    return plan


def remove_plan(folder: Path) -> None:
    """Remove the plan, before parts that it reads may change."""
    plan_path(folder).unlink(missing_ok=True)


def write_rows(plan: StoredPlan, *, pool: Pool, report: Progress, share: Share = WHOLE) -> None:
    """Write the slices of a share that are not written yet.

    Raises:
        DataError: The files of rows are not as planning has left them.
    """
    mine, num_done = share.of(plan.slices), 0
    num_mine = sum(item.num_rows for item in mine)
    # Do not check for a file that another machine will make: NFS would cache that it is absent.
    present = set(plan.folder.iterdir())

    def finish(_: str, num_rows: int) -> None:
        nonlocal num_done
        num_done += num_rows
        report(num_done, num_mine)

    def jobs() -> Iterator[tuple[str, Callable[..., int], tuple[Any, ...]]]:
        checked = False
        for item in mine:
            if record_path(plan.stem, item.name) in present and read_record(plan.stem, item.name) is not None:
                finish(item.name, item.num_rows)
                continue
            if not checked:  # not sooner: of a whole plan they are renamed
                _check_room(plan)
            checked = True
            yield f"rows of {plan.stem}, slice {item.name}", write_stored_slice, (plan.folder, item.name, plan.stem)

    hand_out(pool, jobs(), finish)


def num_missing(plan: StoredPlan) -> int:
    """Return how many slices of a plan are not written.

    Opening a folder asks an NFS server for its current state (``nfs_lookup_verify_inode`` in Linux, unless mounted with
    ``nocto``). So of jobs that end at the same time, at least the one that writes last finds the slices of all. Should
    none find them, any job that is run again completes the data set.
    """
    present = set(plan.folder.iterdir())
    return sum(record_path(plan.stem, item.name) not in present for item in plan.slices)


def finish_rows(plan: StoredPlan) -> Manifest:
    """Finish the files of a plan whose slices are written; return the manifest of the data set.

    Raises:
        DataError: A slice, or its record, or a file of rows is gone or damaged.
    """
    _check_room(plan)
    work = ((item.block, _finished(plan, item.name), _shape(plan, item.name)) for item in plan.slices)
    files, hashes = file_entries(plan.stem, finish_files(plan.stem, work))
    return dataclasses.replace(plan.manifest, files=files, hashes_sha256=hashes)


def _check_room(plan: StoredPlan) -> None:
    if not has_room(_sizes(plan), plan.stem):
        raise DataError(f"{plan.stem}{TOKENS}.bin, {IMAGES}.bin: gone or changed; plan again (--phase plan)")


def _shape(plan: StoredPlan, name: str) -> SliceShape:
    return shape_of(load_slice(plan.folder, name))


def _finished(plan: StoredPlan, name: str) -> SliceRecord:
    record = read_record(plan.stem, name)
    if record is None:
        path = record_path(plan.stem, name)
        path.unlink(missing_ok=True)
        raise DataError(f"{path}: gone or damaged; start again, and its rows are written again")
    return record


def _sizes(plan: StoredPlan) -> dict[str, int]:
    """Return the size of each file of rows, by suffix without ``.bin``."""
    sizes: Counter[str] = Counter()
    for item in plan.slices:
        sizes[f"{item.block}{TOKENS}"] += item.token_bytes
        sizes[f"{item.block}{IMAGES}"] += item.image_bytes
    return sizes
