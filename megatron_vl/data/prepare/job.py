"""The offline job: a recipe -> a data set, over processes or MPI ranks.

    plan_units      what there is to do, in a fixed order                       here, once
    write_part      read, clean, check and tokenize one unit                    in workers, in any order
    merge_parts     number, drop, draw, pack: numbers alone                     here, once
    write_slice     write some rows and their images where they belong          in workers, in any order

The output depends on the recipe and the raw files only: any number of workers gives the same bytes. What is finished
lies in ``<prefix>.parts`` until the data set is complete; what was killed goes on from there when it is started again.
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
"""Names of our files among the parts; whatever else is there is somebody's."""


def prepare(
    recipe: DataRecipe, prefix: Path, *, pool: Pool | None = None, progress: bool = True, keep_parts: bool = False
) -> Manifest:
    """Prepare the data set of a recipe at ``prefix`` and return its manifest.

    ``pool``: who works, by default this process. ``progress``: show rate and time left on standard error.
    ``keep_parts``: leave the tokenized parts, so that the next run over the same files only draws, packs and writes.
    Raises DataError if files are missing, nothing is left, or the same prefix is being prepared already.
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
    """A bar on a terminal; in the log of a job a line each minute, from the second minute on."""
    wait_seconds = 0.0 if sys.stderr.isatty() else 60.0
    return tqdm(desc=what, unit=unit, disable=not show, delay=wait_seconds, mininterval=wait_seconds or 0.1)


def _shown_by(bar: tqdm[Any]) -> Callable[[int, int], None]:
    def report(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    return report


class _Progress:
    """How many samples the units have given, and which units are still wanted."""

    def __init__(self, recipe: DataRecipe, units: Sequence[Unit]) -> None:
        self.num_kept = 0
        self._limits = [entry.limit for entry in recipe.sources]
        self._waiting: defaultdict[int, deque[Unit]] = defaultdict(deque)
        for unit in units:
            self._waiting[unit.source_index].append(unit)
        self._kept: dict[Unit, int] = {}
        self._given = [0] * len(recipe.sources)
        """Of each source: samples of its units up to the first that is not finished."""

    def is_wanted(self, unit: Unit) -> bool:
        """False once the units before it have given all samples that its source may give."""
        limit = self._limits[unit.source_index]
        return limit is None or self._given[unit.source_index] < limit

    def finish(self, unit: Unit, kept: int) -> None:
        """Note what a unit has given."""
        self.num_kept += kept
        self._kept[unit] = kept
        waiting = self._waiting[unit.source_index]
        while waiting and waiting[0] in self._kept:
            self._given[unit.source_index] += self._kept.pop(waiting.popleft())


def _make_parts(recipe: DataRecipe, units: Sequence[Unit], folder: Path, *, pool: Pool, bar: tqdm[Any]) -> None:
    """Make all parts that are wanted and not there."""
    progress = _Progress(recipe, units)

    def finish(unit: Unit, kept: int) -> None:
        progress.finish(unit, kept)
        bar.update()
        bar.set_postfix(samples=progress.num_kept, refresh=False)

    # A part that another machine is to make must not be looked for before: NFS would remember that it is not there.
    present = set(folder.iterdir())

    def jobs() -> Iterator[tuple[Unit, Callable[..., int], tuple[Any, ...]]]:
        for unit in units:
            place = part_prefix(folder, unit)
            index = read_index(place) if index_path(place) in present and progress.is_wanted(unit) else None
            if index is not None and not index.lacks_files:
                if not bar.disable:
                    bar.initial += 1  # no work of this run, which the rate is about
                finish(unit, index.num_samples)
            elif progress.is_wanted(unit):
                yield unit, write_part, (recipe, unit, folder)
            else:
                bar.update()

    hand_out(pool, jobs(), finish)


def _finished_parts(recipe: DataRecipe, units: Sequence[Unit], folder: Path) -> Iterator[FinishedPart]:
    """The parts in the order of the units; of a source with a limit, up to its last sample."""
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
    """Remove what no unit asks for: parts of other recipes or older files, and what was not finished."""
    prefixes = [part_prefix(folder, unit) for unit in units]
    wanted = {_LOCK, *(path(prefix).name for prefix in prefixes for path in (data_path, index_path))}
    for path in folder.iterdir():
        if _OURS.fullmatch(path.name) and path.name not in wanted and not is_of_rows(path):
            path.unlink(missing_ok=True)


def _remove_finished(folder: Path) -> None:
    """Remove the parts, and the folder if nothing else is in it."""
    for path in folder.iterdir():
        if _OURS.fullmatch(path.name):
            path.unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


@contextmanager
def _disk_errors_named(folder: Path) -> Iterator[None]:
    """Say of an error of the file system, here or in a worker, where it came up and what to do."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{error.filename or folder}: {error.strerror or error}. Mend that (room, rights, the path) and start "
            f"again: it goes on from what is finished, in {folder}"
        ) from error


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Make the folder and hold it against a second preparation."""
    try:
        with folder_lock.hold(folder, _LOCK):
            yield
    except FolderInUseError as holder:
        raise DataError(
            f"{folder}: another preparation is at work here ({holder}); wait for it, or choose another --output"
        ) from holder
