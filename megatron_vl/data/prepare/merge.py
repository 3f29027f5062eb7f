"""From parts to the positions of packed rows: the numbers of a data set, before any of its bytes.

The samples are numbered in the order of the parts (gather.py), and some are dropped because of their images
(image_drops.py). The others are used as often as the mixture says (mixture.py). They are packed block by block
(blocks.py), so that memory holds the numbers of one block. These steps use numbers only and run in one process. Then
the position of every row is known (row_plan.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_vl.data.dataset.manifest import (
    BLOCKS_VERSION,
    FORMAT_VERSION,
    NUM_EXAMPLES,
    Manifest,
    SkipEntry,
    SourceTotals,
    block_name,
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
from megatron_vl.data.prepare.row_plan import Origins, plan_rows, plan_slices
from megatron_vl.data.prepare.row_slices import RowSlice
from megatron_vl.data.prepare.sorted_runs import scratch_folder
from megatron_vl.data.prepare.totals import Totals
from megatron_vl.data.prompting.tokenizer import QWEN_SHA256
from megatron_vl.data.sample import TASKS

IntArray = npt.NDArray[np.int64]
Progress = Callable[[int, int], None]
"""Callback with how much is finished and how much there is."""
_NOT_DRAWN = Dropped("not_drawn")


@dataclass(frozen=True)
class FinishedPart:
    """A part that takes part in the merge."""

    source: int
    prefix: Path
    index: PartIndex


class MergedParts:
    """The samples of all parts, drawn, which are packed block by block."""

    def __init__(self, recipe: DataRecipe, gathered: Gathered) -> None:
        """Draw the samples. Raises DataError as ``check_outcome``."""
        self._recipe = recipe
        self._gathered = gathered
        self._draw, self._blocks = _draw(recipe, gathered)
        self._totals = Totals(len(recipe.sources))
        self._names = tuple(entry.source.name for entry in recipe.sources)

    @property
    def num_blocks(self) -> int:
        """Number of blocks."""
        return self._blocks.number

    def slices(self, report: Progress = lambda done, total: None) -> Iterator[RowSlice]:
        """Pack block after block, and yield the slices of the rows. ``report`` gets numbers of finished blocks."""
        for block in range(self.num_blocks):
            report(block, self.num_blocks)
            yield from self._slices(block)
        report(self.num_blocks, self.num_blocks)

    def manifest(self) -> Manifest:
        """Return the manifest of the data set without its files, after all slices."""
        assert len(self._totals.blocks) == self.num_blocks, "not all blocks are planned"
        recipe, totals = self._recipe, self._totals
        named = list(zip(self._names, self._gathered.all_counts, strict=True))
        return Manifest(
            format_version=BLOCKS_VERSION if self.num_blocks > 1 else FORMAT_VERSION,
            tokenizer_sha256=QWEN_SHA256,
            num_bpe_tokens=recipe.num_bpe_tokens,
            num_queries=recipe.num_queries,
            seq_length=recipe.seq_length,
            max_sample_length=recipe.longest_sample,
            packing=recipe.pack.mode,
            num_rows=sum(block.num_rows for block in totals.blocks),
            num_samples=totals.num_samples,
            num_segments=totals.num_segments,
            num_tokens=totals.num_tokens,
            num_images=totals.num_images,
            num_stored_images=sum(block.num_stored_images for block in totals.blocks),
            images_per_row=tuple(totals.images_per_row),
            sources=tuple(
                SourceTotals(name, counts.read, totals.kept.get(source, 0))
                for source, (name, counts) in enumerate(named)
            ),
            counts=totals.entries(list(self._names)),
            skips=tuple(
                SkipEntry(name, reason, counts.skips[reason], tuple(counts.examples[reason]))
                for name, counts in named
                for reason in sorted(counts.skips)
            ),
            files=(),
            amounts_factor=float(self._draw.factor),
            scarcest_group=self._draw.scarcest,
            hashes_sha256="",
            largest_token=self._gathered.largest_token,
            blocks=tuple(totals.blocks) if self.num_blocks > 1 else (),
        )

    def _slices(self, number: int) -> Iterator[RowSlice]:
        block = join_pieces(self._blocks.pieces(number))
        # Blocks with equal numbers of equal samples should not have them in the same random order.
        plan = plan_rows(_pack(self._recipe, block, seed=self._recipe.pack.seed + (number << 64)), block)
        self._totals.add(plan)
        origins = Origins(self._gathered.parts.paths, self._names)
        yield from plan_slices(plan, origins, block_name(number, self.num_blocks))


def merge_parts(recipe: DataRecipe, parts: Iterable[FinishedPart], folder: Path) -> MergedParts:
    """Read the samples of all parts, given in the order of the units, and draw those that go into rows.

    ``folder``: the folder of parts, for temporary files.

    Raises:
        DataError: As for ``check_outcome``.
    """
    filters = [entry.filters for entry in recipe.sources]
    with scratch_folder(folder / "sorting") as scratch:
        gathered = gather(((part.source, part.prefix, part.index) for part in parts), filters, scratch)
    return MergedParts(recipe, gathered)


def _draw(recipe: DataRecipe, gathered: Gathered) -> tuple[Draw, Blocks]:
    """Draw the samples that go into rows, count those that are left out, and divide the others into blocks."""
    staying = count_drops(gathered)
    check_outcome(recipe, gathered.all_counts)
    available = np.bincount(gathered.parts.source, weights=staying, minlength=len(recipe.sources)).astype(np.int64)
    sources = zip(available.tolist(), recipe.sources, strict=True)
    supplies = [Supply(count, entry.weight, entry.group) for count, entry in sources]
    draw = draw_samples(supplies, recipe.mixture.groups, recipe.mixture.max_repeats)
    check_drawn(gathered.all_counts, sum(draw.counts))
    blocks = Blocks(gathered, staying, draw.counts, recipe.pack.block_samples)
    for source, counts in enumerate(gathered.all_counts):
        examples = gathered.parts.keys(list(islice(blocks.unused(source), NUM_EXAMPLES)))
        counts.skip(_NOT_DRAWN.reason, max(supplies[source].available - draw.counts[source], 0), examples)
    return draw, blocks


def _pack(recipe: DataRecipe, block: Block, *, seed: int) -> Packing:
    options, samples, chosen = recipe.pack, block.samples, block.chosen
    tasks = samples.task[chosen]
    limits = PackLimits(recipe.seq_length, options.max_images, options.min_piece)
    items = Items(samples.length[chosen].astype(np.int64), samples.image_counts[chosen], tasks == TASKS.index("text"))
    if options.mode == "none":
        return one_per_row(items, limits=limits)
    if options.mode == "task":
        return pack_by_group(items, tasks.astype(np.int64), limits=limits, seed=seed)
    return pack(items, limits=limits, seed=seed)
