"""The second half of preparation: from parts to packed rows and one data set.

The samples are numbered in the order of the parts (gather.py), and some are dropped because of their images
(image_drops.py). The others are used as often as the mixture says (mixture.py), and are packed. These steps use numbers
only and run in one process. Then the position of every row is known (row_plan.py). Workers write slices of rows in any
order (row_slices.py). The files become the data set when all slices are written (row_files.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_vl.data.dataset.manifest import (
    FORMAT_VERSION,
    NUM_EXAMPLES,
    CountEntry,
    Manifest,
    SkipEntry,
    SourceTotals,
)
from megatron_vl.data.prepare.gather import Gathered, Samples, gather
from megatron_vl.data.prepare.image_drops import image_drops
from megatron_vl.data.prepare.mixture import Draw, Supply, copies_of, draw_samples
from megatron_vl.data.prepare.outcome import check_drawn, check_outcome
from megatron_vl.data.prepare.packing import Items, Packing, PackLimits, one_per_row, pack, pack_by_group
from megatron_vl.data.prepare.part_files import PartIndex, data_path
from megatron_vl.data.prepare.part_reader import PartReader
from megatron_vl.data.prepare.recipe import DataRecipe
from megatron_vl.data.prepare.row_files import Progress, file_entries, write_rows
from megatron_vl.data.prepare.row_plan import Origins, RowPlan, plan_rows
from megatron_vl.data.prepare.workers import Pool
from megatron_vl.data.prompting.tokenizer import QWEN_SHA256
from megatron_vl.data.sample import TASKS

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class FinishedPart:
    """A part that takes part in the merge."""

    source: int
    prefix: Path
    index: PartIndex


@dataclass(frozen=True)
class _Chosen:
    """The samples that go into rows."""

    samples: IntArray
    """int64[n]: numbers of samples in order, each as often as it is used."""
    draw: Draw


def merge_parts(
    recipe: DataRecipe,
    parts: Iterable[FinishedPart],
    folder: Path,
    *,
    pool: Pool,
    report: Progress = lambda done, total: None,
) -> tuple[Path, Manifest]:
    """Pack the samples of all parts and write the rows into ``folder``.

    Return the path prefix of the written files, and the manifest of the new data set. ``parts`` are in the order of the
    units.

    Raises:
        DataError: As for ``check_outcome``.
    """
    paths: list[Path] = []

    def indices() -> Iterable[tuple[int, PartIndex]]:
        for part in parts:
            paths.append(data_path(part.prefix))
            yield part.source, part.index

    gathered = gather(indices(), len(recipe.sources))
    chosen = _choose(recipe, gathered, paths)
    packing = _pack(recipe, gathered.samples, chosen.samples)
    plan = plan_rows(packing, chosen.samples, gathered.samples, gathered.images)
    origins = Origins(tuple(paths), tuple(entry.source.name for entry in recipe.sources))
    stem = write_rows(plan, origins, folder, pool=pool, report=report)
    return stem, _manifest(recipe, gathered, chosen, plan=plan, stem=stem)


def _choose(recipe: DataRecipe, gathered: Gathered, paths: Sequence[Path]) -> _Chosen:
    """Choose the samples that go into rows, and count those that are left out."""
    samples = gathered.samples
    left = np.ones(len(samples), dtype=np.bool_)

    def leave_out(reason: str, dropped: npt.NDArray[np.bool_]) -> None:
        for source, counts in enumerate(gathered.all_counts):
            mine = np.flatnonzero(dropped & (samples.source == source))
            counts.skip(reason, len(mine), _keys(samples, mine[:NUM_EXAMPLES], paths))
        left[dropped] = False

    for dropped in image_drops(samples, gathered.images, [entry.filters for entry in recipe.sources]):
        leave_out(dropped.reason, dropped.samples)
    members = [np.flatnonzero(left & (samples.source == source)) for source in range(len(recipe.sources))]
    check_outcome(recipe, gathered.all_counts)
    supplies = [
        Supply(len(mine), entry.weight, entry.group) for mine, entry in zip(members, recipe.sources, strict=True)
    ]
    draw = draw_samples(supplies, recipe.mixture.groups, recipe.mixture.max_repeats)
    copies = np.zeros(len(samples), dtype=np.int64)
    for mine, count in zip(members, draw.counts, strict=True):
        copies[mine] = copies_of(len(mine), count)
    check_drawn(gathered.all_counts, int(copies.sum()))
    leave_out("not_drawn", left & (copies == 0))
    return _Chosen(np.repeat(np.arange(len(samples)), copies), draw)


def _keys(samples: Samples, chosen: IntArray, paths: Sequence[Path]) -> list[str]:
    """Read the keys of the samples ``chosen``, int64[n]."""
    reader = PartReader(paths)
    begins = samples.offset[chosen] + 4 * samples.length[chosen].astype(np.int64)
    columns = (samples.part[chosen], begins, samples.key_size[chosen])
    try:
        found = [reader.read(*place) for place in zip(*(column.tolist() for column in columns), strict=True)]
    finally:
        reader.close()
    return [key.decode("utf-8", "surrogatepass") for key in found]


def _pack(recipe: DataRecipe, samples: Samples, chosen: IntArray) -> Packing:
    options, tasks = recipe.pack, samples.task[chosen]
    limits = PackLimits(recipe.seq_length, options.max_images, options.min_piece)
    items = Items(samples.length[chosen].astype(np.int64), samples.image_counts[chosen], tasks == TASKS.index("text"))
    if options.mode == "none":
        return one_per_row(items, limits=limits)
    if options.mode == "task":
        return pack_by_group(items, tasks.astype(np.int64), limits=limits, seed=options.seed)
    return pack(items, limits=limits, seed=options.seed)


def _manifest(recipe: DataRecipe, gathered: Gathered, chosen: _Chosen, *, plan: RowPlan, stem: Path) -> Manifest:
    packing = plan.packing
    files, hashes = file_entries(stem)
    names = [entry.source.name for entry in recipe.sources]
    named = list(zip(names, gathered.all_counts, strict=True))
    return Manifest(
        format_version=FORMAT_VERSION,
        tokenizer_sha256=QWEN_SHA256,
        num_bpe_tokens=recipe.num_bpe_tokens,
        num_queries=recipe.num_queries,
        seq_length=recipe.seq_length,
        max_sample_length=recipe.longest_sample,
        packing=recipe.pack.mode,
        num_rows=packing.num_rows,
        num_samples=len(chosen.samples),
        num_segments=len(packing.samples),
        num_tokens=int((packing.stops - packing.starts).sum()),
        num_images=len(plan.image_numbers),
        num_stored_images=len(plan.stored),
        images_per_row=tuple(np.bincount(plan.images_per_row).tolist()),
        sources=tuple(
            SourceTotals(name, counts.read, int(kept))
            for (name, counts), kept in zip(named, _kept(gathered.samples, chosen.samples, len(names)), strict=True)
        ),
        counts=_counts(names, gathered.samples, chosen.samples),
        skips=tuple(
            SkipEntry(name, reason, counts.skips[reason], tuple(counts.examples[reason]))
            for name, counts in named
            for reason in sorted(counts.skips)
        ),
        files=files,
        amounts_factor=float(chosen.draw.factor),
        scarcest_group=chosen.draw.scarcest,
        hashes_sha256=hashes,
        largest_token=gathered.largest_token,
    )


def _kept(samples: Samples, chosen: IntArray, num_sources: int) -> IntArray:
    """Return int64[sources]: distinct samples in the rows, counted independently of the skip counts."""
    return np.bincount(samples.source[np.unique(chosen)], minlength=num_sources)


def _counts(names: list[str], samples: Samples, chosen: IntArray) -> tuple[CountEntry, ...]:
    group = samples.source[chosen].astype(np.int64) * len(TASKS) + samples.task[chosen]
    counts = np.bincount(group)
    tokens = np.bincount(group, weights=samples.length[chosen])
    images = np.bincount(group, weights=samples.image_counts[chosen])
    return tuple(
        CountEntry(names[i // len(TASKS)], TASKS[i % len(TASKS)], int(counts[i]), int(tokens[i]), int(images[i]))
        for i in np.flatnonzero(counts).tolist()
    )
