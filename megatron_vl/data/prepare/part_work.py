"""The parts of a recipe: which are to be made, which are there, and which files of the folder nobody needs.

A source with a limit needs its units only up to the one that reaches the limit. How much a unit gives is known when it
is finished. So a unit is made unless finished earlier units give enough already. More parts may be made than are
needed, by workers and jobs that work at the same time. What is too much is cut off when the parts are gathered, so it
changes no byte of the data set.
"""

from __future__ import annotations

import re
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from megatron_vl.data.prepare.gather import cut
from megatron_vl.data.prepare.merge import FinishedPart
from megatron_vl.data.prepare.part_files import PartIndex, data_path, index_path, read_index
from megatron_vl.data.prepare.parts import Unit, part_prefix, write_part
from megatron_vl.data.prepare.recipe import DataRecipe
from megatron_vl.data.prepare.row_files import is_of_rows
from megatron_vl.data.prepare.share import WHOLE, Share
from megatron_vl.data.prepare.workers import Pool, hand_out

LOCK = "lock"
_OURS = re.compile(rf"{LOCK}(-.*)?|rows-.*|[0-9a-f]{{32}}\..*")
"""Names of our files in the folder of parts. All other files belong to someone else."""


@dataclass(frozen=True)
class PartWork:
    """The units of a recipe, and the folder of their parts."""

    recipe: DataRecipe
    units: Sequence[Unit]
    folder: Path


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

    def look(self, folder: Path, mine: frozenset[Unit], source: int) -> None:
        """Record what the units of a source gave that other jobs have finished by now."""
        present = set(folder.iterdir())
        for unit in list(self._waiting[source]):
            place = part_prefix(folder, unit)
            if unit not in mine and unit not in self._kept and index_path(place) in present:
                index = read_index(place)
                if index is not None:
                    self.finish(unit, index.num_samples)


def make_parts(work: PartWork, *, pool: Pool, bar: tqdm[Any], share: Share = WHOLE, renew: bool = True) -> int:
    """Make the parts of a share that are needed and absent; return how many of the share were there or not needed.

    ``renew``: parts of which records lacked files are made anew, since the files may be there by now.
    """
    recipe, units, folder = work.recipe, work.units, work.folder
    progress, mine = _Progress(recipe, units), frozenset(share.of(units))
    num_made = 0

    def finish(unit: Unit, kept: int) -> None:
        progress.finish(unit, kept)
        bar.update()
        bar.set_postfix(samples=progress.num_kept, refresh=False)

    # Do not check for a part that another machine will make: NFS would cache that it is absent.
    present = set(folder.iterdir())

    def found(unit: Unit) -> PartIndex | None:
        place = part_prefix(folder, unit)
        index = read_index(place) if index_path(place) in present and progress.is_wanted(unit) else None
        return None if index is not None and renew and index.lacks_files else index

    def jobs() -> Iterator[tuple[Unit, Callable[..., int], tuple[Any, ...]]]:
        nonlocal num_made
        for unit in share.of(units):
            if share.count > 1 and recipe.sources[unit.source_index].limit is not None:
                progress.look(folder, mine, unit.source_index)
            index = found(unit)
            if index is not None:
                if not bar.disable:
                    bar.initial += 1  # not work of this run, so not part of the rate
                finish(unit, index.num_samples)
            elif progress.is_wanted(unit):
                num_made += 1
                yield unit, write_part, (recipe, unit, folder)
            else:
                bar.update()

    bar.total = len(mine)
    hand_out(pool, jobs(), finish)
    return len(mine) - num_made


def finished_parts(work: PartWork, refuse: Callable[[list[int]], NoReturn]) -> Iterator[FinishedPart]:
    """Yield the parts in the order of the units. If a source has a limit, stop at its last sample.

    ``refuse`` is called at the end with the numbers of the units whose parts are missing, if there are any.
    """
    left = [entry.limit for entry in work.recipe.sources]
    missing = []
    for number, unit in enumerate(work.units):
        most = left[unit.source_index]
        if most == 0:
            continue
        place = part_prefix(work.folder, unit)
        index = read_index(place)
        if index is None:
            missing.append(number)
            continue
        if most is not None:
            index = cut(index, most)
            left[unit.source_index] = most - index.num_samples
        yield FinishedPart(unit.source_index, place, index)
    if missing:
        refuse(missing)


def remove_others(work: PartWork) -> None:
    """Remove files that no unit needs: parts of other recipes or older files, and unfinished files.

    Nobody else may be at work in the folder, for an unfinished file may be another's.
    """
    prefixes = [part_prefix(work.folder, unit) for unit in work.units]
    wanted = {path(prefix).name for prefix in prefixes for path in (data_path, index_path)}
    for path in _ours(work.folder):
        if path.name not in wanted and not path.name.startswith(LOCK) and not is_of_rows(path):
            path.unlink(missing_ok=True)


def remove_finished(folder: Path, *, kept: frozenset[Path] = frozenset()) -> None:
    """Remove the parts and all other files of ours but ``kept``.

    The caller holds the lock. Its file goes last, for whoever finds none there makes another and is alone with it.
    """
    for path in sorted(_ours(folder), key=lambda path: (path.name.startswith(LOCK), path.name == LOCK)):
        if path not in kept:
            path.unlink(missing_ok=True)


def _ours(folder: Path) -> Iterator[Path]:
    return (path for path in list(folder.iterdir()) if _OURS.fullmatch(path.name))
