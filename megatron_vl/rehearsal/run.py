"""Run a rehearsal: the groups of all ranks, the programs of the distinct ones, and what follows from both.

Ranks are rehearsed in processes of their own: torch keeps one process group a process, Megatron-Core one layout, and
what is replaced in both (``backends/platform.py``) stays replaced. This process needs neither.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace

from megatron_vl.config.batch import num_microbatches, with_rows
from megatron_vl.config.schema import RunConfig
from megatron_vl.errors import ConfigError
from megatron_vl.log import silence_dependency_warnings
from megatron_vl.planning.layout import PipelineLayout
from megatron_vl.planning.rows import Row
from megatron_vl.rehearsal.groups import group_faults
from megatron_vl.rehearsal.matching import find_faults
from megatron_vl.rehearsal.places import Grid, Place
from megatron_vl.rehearsal.planned import Comparer
from megatron_vl.rehearsal.records import Membership, Rehearsed
from megatron_vl.rehearsal.report import describe
from megatron_vl.rehearsal.step import Step, count_images

_RANKS_AT_ONCE = 16
"""Ranks whose groups a process makes before it takes the next ones."""


@dataclass(frozen=True)
class Rehearsal:
    """What is rehearsed: a step of two replicas, one of them without images."""

    grid: Grid
    steps: Mapping[int, Step]
    """By data-parallel rank."""
    micro_batches: int
    """Those of a data-parallel rank in a step of the run, of which some are rehearsed."""
    row: Row

    @classmethod
    def of(cls, config: RunConfig, layout: PipelineLayout, row: Row, world_size: int) -> Rehearsal:
        """Choose what to rehearse of a run whose mean row is ``row``.

        Raises:
            ConfigError: if ranks or rows do not divide.
        """
        # A machine without a GPU cannot build other layers, and these have no FP8.
        config = replace(
            config,
            parallel=replace(config.parallel, backend="local"),
            training=replace(config.training, fp8_format=None),
        )
        config = with_rows(config, row.samples, world_size)
        grid = Grid.of(config, world_size)
        micro_batches = num_microbatches(config.training, grid.data)
        images = count_images(config, row, micro_batches)
        steps = {grid.data - 1: Step(config, layout, (0,) * len(images)), 0: Step(config, layout, images)}
        return cls(grid, steps, micro_batches, row)

    @property
    def config(self) -> RunConfig:
        """The run, with its batch in rows."""
        return self.steps[0].config

    @property
    def places(self) -> list[Place]:
        """The ranks whose programs differ."""
        return self.grid.distinct(all_tensor_ranks=self.config.parallel.vision_parallel == "data")

    def judge(self, everyone: Sequence[Membership], reports: Sequence[Rehearsed]) -> Outcome:
        """Compare what ranks reported, with each other and with the plan."""
        comparisons = [item for one in reports for item in Comparer(self.steps[one.place.data], self.grid).compare(one)]
        differences = [str(item) for item in comparisons if not item.agrees]
        num_groups = len({name for one in everyone for name in one.groups})
        images = self.steps[0].images
        lines = [
            f"rehearsed: {num_groups} process groups of {self.grid.world_size} ranks, and a step of the "
            f"{len(reports)} ranks that differ, with {len(images)} of its {self.micro_batches} micro-batches",
            f"their images: {' '.join(map(str, images))}"
            + (f", on data rank {self.grid.data - 1} none" if self.grid.data > 1 else "")
            + f"; rows {self.row.source}",
            "",
            *describe(reports, self.steps, self.grid),
            "",
            f"{len(comparisons)} numbers compared with the plan: {len(differences)} differ",
        ]
        faults = [*group_faults(self.grid, everyone), *find_faults(reports)]
        if not faults:
            lines.append("every message and every collective finds its other side, and no rank waits for ever")
        return Outcome(tuple(lines), (*faults, *differences))


@dataclass(frozen=True)
class Outcome:
    """The outcome of a rehearsal."""

    lines: tuple[str, ...]
    """What each rank holds, sends and waits for, for people."""
    faults: tuple[str, ...]
    """What would make the run hang or fail, and where it is not what was planned; empty if all is well."""


def rehearse(config: RunConfig, layout: PipelineLayout, row: Row, world_size: int) -> Outcome:
    """Rehearse a run whose mean row is ``row``.

    Raises:
        ConfigError: if the trainer refuses the run, or a process of the rehearsal dies.
    """
    rehearsal = Rehearsal.of(config, layout, row, world_size)
    return rehearsal.judge(*_in_processes(rehearsal))


def _in_processes(rehearsal: Rehearsal) -> tuple[list[Membership], list[Rehearsed]]:
    """Make the groups of every rank, and rehearse the step of those that differ."""
    grid = rehearsal.grid
    some = [
        range(first, min(first + _RANKS_AT_ONCE, grid.world_size))
        for first in range(0, grid.world_size, _RANKS_AT_ONCE)
    ]
    with _pool(len(some) + len(rehearsal.places)) as pool:
        said = pool.submit(_ask_all, rehearsal.config)
        groups = [pool.submit(_make_groups, rehearsal.config, grid, ranks) for ranks in some]
        try:
            programs = [
                pool.submit(_rehearse, rehearsal.steps[place.data], grid, place, said.result())
                for place in rehearsal.places
            ]
            reports = [future.result() for future in programs]
            return [one for future in groups for one in future.result()], reports
        except BrokenProcessPool as error:
            raise ConfigError(
                "a process of the rehearsal died, perhaps for lack of memory: each needs about 1 GB; use a machine "
                "with more, or fewer of its cores (taskset)"
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextmanager
def _pool(num_tasks: int) -> Iterator[ProcessPoolExecutor]:
    workers = min(num_tasks, len(os.sched_getaffinity(0)))
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin) as pool:
        yield pool


def _begin() -> None:
    """Prepare a process; torch is imported here for the first time."""
    silence_dependency_warnings()
    import torch

    torch.set_num_threads(1)
    from megatron_vl.backends.platform import prepare_process

    prepare_process()


def _ask_all(config: RunConfig) -> list[bytes]:
    from megatron_vl.rehearsal.rank import said_by_all

    return said_by_all(config)


def _rehearse(step: Step, grid: Grid, place: Place, objects: Sequence[bytes]) -> Rehearsed:
    from megatron_vl.rehearsal.rank import rehearse_rank

    return rehearse_rank(step, grid, place, objects)


def _make_groups(config: RunConfig, grid: Grid, ranks: range) -> list[Membership]:
    from megatron_vl.rehearsal.rank import memberships

    return memberships(config, grid, ranks)
