"""The offline job that makes a data set from a recipe, in several processes or MPI ranks.

    plan_units      list the work in a fixed order                              here, once
    write_part      read, clean, check and tokenize one unit                    in workers, in any order
    merge_parts     number, drop, draw and pack, with numbers only              here, once
    write_slice     write some rows and their images at their positions         in workers, in any order

The output depends only on the recipe and the raw files. Any number of workers gives the same bytes. Finished work lies
in ``<prefix>.parts`` until the data set is complete. A killed job resumes from there when it is started again.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_vl import folder_lock
from megatron_vl.data.dataset.manifest import Manifest
from megatron_vl.data.prepare.gather import SourceCounts, cut
from megatron_vl.data.prepare.merge import FinishedPart, merge_parts
from megatron_vl.data.prepare.outcome import check_outcome
from megatron_vl.data.prepare.part_files import data_path, index_path, read_index
from megatron_vl.data.prepare.parts import Unit, part_prefix, plan_units, write_part
from megatron_vl.data.prepare.recipe import DataRecipe
from megatron_vl.data.prepare.row_files import commit, is_of_rows
from megatron_vl.data.prepare.workers import Pool, hand_out, this_process
from megatron_vl.errors import DataError, FolderInUseError

_LOCK = "lock"
_OURS = re.compile(rf"{_LOCK}|rows-.*|[0-9a-f]{{32}}\..*")
"""Names of our files in the folder of parts. All other files belong to someone else."""


def prepare(
    recipe: DataRecipe, prefix: Path, *, pool: Pool | None = None, progress: bool = True, keep_parts: bool = False
) -> Manifest:
    """Prepare the data set of a recipe at ``prefix`` and return its manifest.

    ``pool``: the workers, by default this process. ``progress``: show rate and remaining time on standard error.
    ``keep_parts``: keep the tokenized parts, so that the next run over the same files only draws, packs and writes.

    Raises:
        DataError: Files are missing, no samples remain, or another process is preparing the same prefix.
    """
    pool = pool or this_process()
    folder = prefix.with_name(prefix.name + ".parts")
    with _disk_errors_named(folder):
        units = plan_units(recipe)
        if not units:
            check_outcome(recipe, [SourceCounts() for _ in recipe.sources])
        with _locked(folder):
            _remove_others(folder, units)
            with _bar("tokenizing", "shard", show=progress) as bar:
                bar.total = len(units)
                _make_parts(recipe, units, folder, pool=pool, bar=bar)
            with _bar("writing", "row", show=progress) as bar:
                parts = _finished_parts(recipe, units, folder)
                stem, manifest = merge_parts(recipe, parts, folder, pool=pool, report=_shown_by(bar))
            commit(prefix, stem, manifest)
        if not keep_parts:
            _remove_finished(folder)
    return manifest


def _bar(what: str, unit: str, *, show: bool) -> tqdm[Any]:
    """Return a progress bar for a terminal. In a log, it prints one line per minute, from the second minute on."""
    wait_seconds = 0.0 if sys.stderr.isatty() else 60.0
    return tqdm(desc=what, unit=unit, disable=not show, delay=wait_seconds, mininterval=wait_seconds or 0.1)


def _shown_by(bar: tqdm[Any]) -> Callable[[int, int], None]:
    def report(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    return report


class _Progress:
    """Number of samples that the units gave, and which units are still needed."""

    def __init__(self, recipe: DataRecipe, units: Sequence[Unit]) -> None:
        self.num_kept = 0
        self._limits = [entry.limit for entry in recipe.sources]
        self._waiting: defaultdict[int, deque[Unit]] = defaultdict(deque)
        for unit in units:
            self._waiting[unit.source_index].append(unit)
        self._kept: dict[Unit, int] = {}
        self._given = [0] * len(recipe.sources)
        """For each source: samples of its units, up to the first unfinished unit."""

    def is_wanted(self, unit: Unit) -> bool:
        """Return False if the earlier units have already given all samples that the source may give."""
        limit = self._limits[unit.source_index]
        return limit is None or self._given[unit.source_index] < limit

    def finish(self, unit: Unit, kept: int) -> None:
        """Record the number of samples that a unit gave."""
        self.num_kept += kept
        self._kept[unit] = kept
        waiting = self._waiting[unit.source_index]
        while waiting and waiting[0] in self._kept:
            self._given[unit.source_index] += self._kept.pop(waiting.popleft())


def _make_parts(recipe: DataRecipe, units: Sequence[Unit], folder: Path, *, pool: Pool, bar: tqdm[Any]) -> None:
    """Make all parts that are needed and absent."""
    progress = _Progress(recipe, units)

    def finish(unit: Unit, kept: int) -> None:
        progress.finish(unit, kept)
        bar.update()
        bar.set_postfix(samples=progress.num_kept, refresh=False)

    # Do not check for a part that another machine will make: NFS would cache that it is absent.
    present = set(folder.iterdir())

    def jobs() -> Iterator[tuple[Unit, Callable[..., int], tuple[Any, ...]]]:
        for unit in units:
            place = part_prefix(folder, unit)
            index = read_index(place) if index_path(place) in present and progress.is_wanted(unit) else None
            if index is not None and not index.lacks_files:
                if not bar.disable:
                    bar.initial += 1  # not work of this run, so not part of the rate
                finish(unit, index.num_samples)
            elif progress.is_wanted(unit):
                yield unit, write_part, (recipe, unit, folder)
            else:
                bar.update()

    hand_out(pool, jobs(), finish)


def _finished_parts(recipe: DataRecipe, units: Sequence[Unit], folder: Path) -> Iterator[FinishedPart]:
    """Yield the parts in the order of the units. If a source has a limit, stop at its last sample."""
    left = [entry.limit for entry in recipe.sources]
    for unit in units:
        most = left[unit.source_index]
        if most == 0:
            continue
        index = read_index(part_prefix(folder, unit))
        if index is None:
            raise DataError(f"{part_prefix(folder, unit)}: the part of {unit.shard.path} is gone; start again")
        if most is not None:
            index = cut(index, most)
            left[unit.source_index] = most - index.num_samples
        yield FinishedPart(unit.source_index, part_prefix(folder, unit), index)


def _remove_others(folder: Path, units: Sequence[Unit]) -> None:
    """Remove files that no unit needs: parts of other recipes or older files, and unfinished files."""
    prefixes = [part_prefix(folder, unit) for unit in units]
    wanted = {_LOCK, *(path(prefix).name for prefix in prefixes for path in (data_path, index_path))}
    for path in folder.iterdir():
        if _OURS.fullmatch(path.name) and path.name not in wanted and not is_of_rows(path):
            path.unlink(missing_ok=True)


def _remove_finished(folder: Path) -> None:
    """Remove the parts, and also the folder if nothing else is in it."""
    for path in folder.iterdir():
        if _OURS.fullmatch(path.name):
            path.unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


@contextmanager
def _disk_errors_named(folder: Path) -> Iterator[None]:
    """Add the location and a remedy to errors of the file system, here or in a worker. Raises DataError for them."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{error.filename or folder}: {error.strerror or error}. Mend that (room, rights, the path) and start "
            f"again: it goes on from what is finished, in {folder}"
        ) from error


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Make the folder and lock it against a second preparation."""
    try:
        with folder_lock.hold(folder, _LOCK):
            yield
    except FolderInUseError as holder:
        raise DataError(
            f"{folder}: another preparation is at work here ({holder}); wait for it, or choose another --output"
        ) from holder
