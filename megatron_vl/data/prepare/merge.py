"""The second half of preparation: from parts to packed rows and one data set.

The samples are numbered in the order of the parts (gather.py), and some are dropped because of their images
(image_drops.py). The others are used as often as the mixture says (mixture.py). They are packed block by block
(blocks.py), so that memory holds the numbers of one block. These steps use numbers only and run in one process. Then
the position of every row is known (row_plan.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
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
from megatron_vl.data.prepare.block_samples import Block, join_pieces
from megatron_vl.data.prepare.blocks import Blocks
from megatron_vl.data.prepare.gather import Gathered, count_drops, gather
from megatron_vl.data.prepare.image_drops import Dropped
from megatron_vl.data.prepare.mixture import Draw, Supply, draw_samples
from megatron_vl.data.prepare.outcome import check_drawn, check_outcome
from megatron_vl.data.prepare.packing import Items, Packing, PackLimits, one_per_row, pack, pack_by_group
from megatron_vl.data.prepare.part_files import PartIndex
from megatron_vl.data.prepare.recipe import DataRecipe
from megatron_vl.data.prepare.row_plan import Origins, RowPlan, plan_rows, plan_slices
from megatron_vl.data.prepare.row_slices import RowSlice
from megatron_vl.data.prepare.sorted_runs import scratch_folder
from megatron_vl.data.prompting.tokenizer import QWEN_SHA256
from megatron_vl.data.sample import TASKS

IntArray = npt.NDArray[np.int64]
_NOT_DRAWN = Dropped("not_drawn")


@dataclass(frozen=True)
class FinishedPart:
    """A part that takes part in the merge."""

    source: int
    prefix: Path
    index: PartIndex


@dataclass(frozen=True)
class _Drawing:
    """The samples that go into rows."""

    blocks: Blocks
    draw: Draw


def merge_parts(recipe: DataRecipe, parts: Iterable[FinishedPart], folder: Path) -> tuple[Iterator[RowSlice], Manifest]:
    """Pack the samples of all parts; return the slices of the rows, and the manifest without its files.

    ``parts`` are in the order of the units. ``folder``: that of the parts, which has room for sorting.

    Raises:
        DataError: As for ``check_outcome``.
    """
    filters = [entry.filters for entry in recipe.sources]
    with scratch_folder(folder / "sorting") as scratch:
        gathered = gather(((part.source, part.prefix, part.index) for part in parts), filters, scratch)
    drawing = _draw(recipe, gathered)
    block = join_pieces(drawing.blocks.pieces(0))
    plan = plan_rows(_pack(recipe, block), block)
    origins = Origins(gathered.parts.paths, tuple(entry.source.name for entry in recipe.sources))
    return plan_slices(plan, origins), _manifest(recipe, gathered, drawing.draw, plan=plan)


def _draw(recipe: DataRecipe, gathered: Gathered) -> _Drawing:
    """Draw the samples that go into rows, and count those that are left out."""
    staying = count_drops(gathered)
    check_outcome(recipe, gathered.all_counts)
    available = np.bincount(gathered.parts.source, weights=staying, minlength=len(recipe.sources)).astype(np.int64)
    sources = zip(available.tolist(), recipe.sources, strict=True)
    supplies = [Supply(count, entry.weight, entry.group) for count, entry in sources]
    draw = draw_samples(supplies, recipe.mixture.groups, recipe.mixture.max_repeats)
    check_drawn(gathered.all_counts, sum(draw.counts))
    blocks = Blocks(gathered, staying, draw.counts, sum(draw.counts))
    for source, counts in enumerate(gathered.all_counts):
        examples = gathered.parts.keys(list(islice(blocks.unused(source), NUM_EXAMPLES)))
        counts.skip(_NOT_DRAWN.reason, max(supplies[source].available - draw.counts[source], 0), examples)
    return _Drawing(blocks, draw)


def _pack(recipe: DataRecipe, block: Block) -> Packing:
    options, samples, chosen = recipe.pack, block.samples, block.chosen
    tasks = samples.task[chosen]
    limits = PackLimits(recipe.seq_length, options.max_images, options.min_piece)
    items = Items(samples.length[chosen].astype(np.int64), samples.image_counts[chosen], tasks == TASKS.index("text"))
    if options.mode == "none":
        return one_per_row(items, limits=limits)
    if options.mode == "task":
        return pack_by_group(items, tasks.astype(np.int64), limits=limits, seed=options.seed)
    return pack(items, limits=limits, seed=options.seed)


def _manifest(recipe: DataRecipe, gathered: Gathered, draw: Draw, *, plan: RowPlan) -> Manifest:
    packing, block = plan.packing, plan.block
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
        num_samples=len(block.chosen),
        num_segments=len(packing.samples),
        num_tokens=int((packing.stops - packing.starts).sum()),
        num_images=len(plan.image_numbers),
        num_stored_images=len(plan.stored),
        images_per_row=tuple(np.bincount(plan.images_per_row).tolist()),
        sources=tuple(
            SourceTotals(name, counts.read, int(kept))
            for (name, counts), kept in zip(named, _kept(block, len(names)), strict=True)
        ),
        counts=_counts(names, block),
        skips=tuple(
            SkipEntry(name, reason, counts.skips[reason], tuple(counts.examples[reason]))
            for name, counts in named
            for reason in sorted(counts.skips)
        ),
        files=(),
        amounts_factor=float(draw.factor),
        scarcest_group=draw.scarcest,
        hashes_sha256="",
        largest_token=gathered.largest_token,
    )


def _kept(block: Block, num_sources: int) -> IntArray:
    """Return int64[sources]: distinct samples in the rows, counted independently of the skip counts."""
    return np.bincount(block.samples.source[np.unique(block.chosen)], minlength=num_sources)


def _counts(names: list[str], block: Block) -> tuple[CountEntry, ...]:
    samples, chosen = block.samples, block.chosen
    group = samples.source[chosen].astype(np.int64) * len(TASKS) + samples.task[chosen]
    counts = np.bincount(group)
    tokens = np.bincount(group, weights=samples.length[chosen])
    images = np.bincount(group, weights=samples.image_counts[chosen])
    return tuple(
        CountEntry(names[i // len(TASKS)], TASKS[i % len(TASKS)], int(counts[i]), int(tokens[i]), int(images[i]))
        for i in np.flatnonzero(counts).tolist()
    )
