"""The offline job: a recipe -> a data set, over processes.

    plan_units      what there is to do, in a fixed order                       here, once write_part
    read, check and tokenize one unit                           in worker processes, in any order merge_parts
    number, pack and write, in the order of the units           here, once

The output depends on the recipe and the raw files only: any number of workers gives the same bytes. Other
ways of distributing the middle step (MPI ranks, resumable shards) need only to fill the same folder of parts.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from tqdm import tqdm

from megatron_vl.data.manifest import Manifest
from megatron_vl.data.merge import merge_parts
from megatron_vl.data.parts import Unit, open_part, plan_units, write_part
from megatron_vl.data.recipe import DataRecipe
from megatron_vl.errors import DataError


def prepare(
    recipe: DataRecipe, prefix: Path, *, workers: int | None = None, progress: bool = True
) -> Manifest:
    """Prepare the data set of a recipe at ``prefix`` and return its manifest.

    ``workers``: processes (default: one per core, as far as there is work; 1 works in this process).
    ``progress``: show a bar on standard error where that is a terminal. Raises DataError if files are missing
    or nothing is left.
    """
    units = plan_units(recipe)
    folder = prefix.with_name(prefix.name + ".parts")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    hide = None if progress else True  # None: tqdm hides the bar unless it is on a terminal
    try:
        with tqdm(total=len(units), desc="tokenizing", unit="shard", disable=hide) as bar:
            for kept in _write_parts(recipe, units, folder, workers=workers or os.cpu_count() or 1):
                bar.update()
                bar.set_postfix(samples=kept)
        parts = [open_part(_part_prefix(folder, unit)) for unit in units]
        try:
            with tqdm(desc="packing", unit="row", disable=hide) as bar:

                def report(done: int, total: int) -> None:
                    bar.total = total
                    bar.update(done - bar.n)

                return merge_parts(recipe, parts, prefix, report)
        finally:
            for part in parts:
                part.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def summary_lines(manifest: Manifest) -> list[str]:
    """What was kept and what was left out, as the lines of a table."""
    lines = [f"{'source':<24} {'task / reason':<24} {'samples':>10} {'tokens':>12} {'images':>10}"]
    for count in manifest.counts:
        name, task = count.source, count.task
        lines.append(f"{name:<24} {task:<24} {count.samples:>10} {count.tokens:>12} {count.images:>10}")
    for skip in manifest.skips:
        lines.append(
            f"{skip.source:<24} {'skipped: ' + skip.reason:<24} {skip.count:>10}   {skip.examples[0]:.60}"
        )
    lines.append(
        f"{manifest.num_rows} rows of at most {manifest.seq_length} tokens, {100 * manifest.fill:.1f} % "
        "filled; "
        f"{manifest.samples_per_row:.2f} samples and {manifest.num_images / manifest.num_rows:.2f} images a "
        "row; "
        f"{manifest.num_stored_images} images stored"
    )
    return lines


def _write_parts(recipe: DataRecipe, units: Sequence[Unit], folder: Path, *, workers: int) -> Iterator[int]:
    """Make all parts; yields the number of samples so far after each."""
    kept = 0
    if min(workers, len(units)) <= 1:
        for unit in units:
            kept += write_part(recipe, unit, _part_prefix(folder, unit))
            yield kept
        return
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    with ProcessPoolExecutor(min(workers, len(units)), mp_context=context) as pool:
        pending = {pool.submit(write_part, recipe, unit, _part_prefix(folder, unit)) for unit in units}
        try:
            while pending:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    kept += _result(future)
                    yield kept
        finally:
            for future in pending:
                future.cancel()


def _result(future: Future[int]) -> int:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process was killed (out of memory?); start again with fewer --workers"
        ) from error


def _part_prefix(folder: Path, unit: Unit) -> Path:
    return folder / f"{unit.index:06d}"
