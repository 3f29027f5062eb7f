"""The second half of preparation: parts -> packed rows -> one data set.

The samples are numbered in the order of the parts (gather.py), some are dropped for their images (image_drops.py), the
rest are used as often as the mixture says (mixture.py), packed (numbers only), and then written row by row. An image is
stored when a row first uses it, so the images of neighbouring rows lie together, and once, whoever else uses it. All
files are written under temporary names; an old manifest goes before the files are renamed, the new one comes last. So
whatever happens, there is a whole data set under the prefix, or none.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_vl.data.gather import Gathered, Samples, gather
from megatron_vl.data.image_drops import image_drops
from megatron_vl.data.indexed import IndexedWriter, WrittenFile, paths_of
from megatron_vl.data.manifest import (
    FORMAT_VERSION,
    NUM_EXAMPLES,
    CountEntry,
    FileEntry,
    Manifest,
    SkipEntry,
    SourceTotals,
    manifest_path,
    write_manifest,
)
from megatron_vl.data.mixture import Supply, copies_of, drawn_samples
from megatron_vl.data.packing import Items, Packing, PackLimits, one_per_row, pack, pack_by_group
from megatron_vl.data.part_files import PartIndex
from megatron_vl.data.part_reader import PartReader
from megatron_vl.data.parts import TASKS
from megatron_vl.data.recipe import DataRecipe
from megatron_vl.data.rows import SegmentKey, encode_keys, encode_row
from megatron_vl.data.sample import PackedRow
from megatron_vl.data.tokenizer import QWEN_SHA256
from megatron_vl.errors import DataError

Progress = Callable[[int, int], None]
"""Called with the number of rows done and the number of all rows."""
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class FinishedPart:
    """A part that takes part in the merge."""

    source: int
    prefix: Path
    index: PartIndex


def merge_parts(
    recipe: DataRecipe, parts: Iterable[FinishedPart], prefix: Path, progress: Progress | None = None
) -> Manifest:
    """Pack the samples of all parts into the data set at ``prefix`` and return its manifest.

    ``parts`` are in the order of the units. Raises DataError if no sample is left.
    """
    prefixes: list[Path] = []

    def indices() -> Iterable[tuple[int, PartIndex]]:
        for part in parts:
            prefixes.append(part.prefix)
            yield part.source, part.index

    gathered = gather(indices(), len(recipe.sources))
    reader = PartReader(prefixes, gathered.samples, gathered.images)
    try:
        chosen = _choose(recipe, gathered, reader)
        if not len(chosen):
            raise DataError(f"{prefix}: no sample is left to write; {_all_reasons(gathered)}")
        packing = _pack(recipe, gathered.samples, chosen)
        writer = _RowWriter(prefix, recipe, gathered.samples, reader)
        try:
            for row in range(packing.num_rows):
                writer.add_row(packing, row, chosen)
                if progress is not None:
                    progress(row + 1, packing.num_rows)
            writer.finish()
        except BaseException:
            writer.discard()
            raise
    finally:
        reader.close()
    manifest = _manifest(recipe, gathered, chosen, packing=packing, writer=writer)
    _commit(prefix, manifest)
    return manifest


def _choose(recipe: DataRecipe, gathered: Gathered, reader: PartReader) -> IntArray:
    """The samples that go into rows, in order, as often as they are used; what is left out is tallied."""
    samples = gathered.samples
    left = np.ones(len(samples), dtype=np.bool_)

    def leave_out(reason: str, dropped: npt.NDArray[np.bool_]) -> None:
        for source, tally in enumerate(gathered.tallies):
            mine = np.flatnonzero(dropped & (samples.source == source))
            tally.skip(reason, len(mine), [reader.key(sample) for sample in mine[:NUM_EXAMPLES].tolist()])
        left[dropped] = False

    for dropped in image_drops(samples, gathered.images, [entry.filters for entry in recipe.sources]):
        leave_out(dropped.reason, dropped.samples)
    members = [np.flatnonzero(left & (samples.source == source)) for source in range(len(recipe.sources))]
    supplies = [
        Supply(len(mine), entry.weight, entry.group) for mine, entry in zip(members, recipe.sources, strict=True)
    ]
    drawn = drawn_samples(supplies, recipe.mixture.groups, recipe.mixture.max_repeats)
    copies = np.zeros(len(samples), dtype=np.int64)
    for mine, count in zip(members, drawn, strict=True):
        copies[mine] = copies_of(len(mine), count)
    leave_out("not_drawn", left & (copies == 0))
    return np.repeat(np.arange(len(samples)), copies)


def _all_reasons(gathered: Gathered) -> str:
    reasons = sorted({reason for tally in gathered.tallies for reason in tally.skips})
    return f"left out for {', '.join(reasons)}" if reasons else "the sources are empty"


def _pack(recipe: DataRecipe, samples: Samples, chosen: IntArray) -> Packing:
    options, tasks = recipe.pack, samples.task[chosen]
    limits = PackLimits(recipe.seq_length, options.max_images, options.min_piece)
    items = Items(
        samples.length[chosen].astype(np.int64), samples.image_counts[chosen], tasks == TASKS.index("text")
    )
    if options.mode == "none":
        return one_per_row(items, limits=limits)
    if options.mode == "task":
        return pack_by_group(items, tasks.astype(np.int64), limits=limits, seed=options.seed)
    return pack(items, limits=limits, seed=options.seed)


class _RowWriter:
    """Writes rows, their images and their keys under temporary names."""

    def __init__(self, prefix: Path, recipe: DataRecipe, samples: Samples, reader: PartReader) -> None:
        self._prefix = prefix
        self._samples = samples
        self._reader = reader
        self._names = [entry.source.name for entry in recipe.sources]
        prefix.parent.mkdir(parents=True, exist_ok=True)
        self._writers = {
            ".tokens": IndexedWriter(_temporary(prefix, ".tokens"), "int32", with_modes=True),
            ".images": IndexedWriter(_temporary(prefix, ".images"), "uint8"),
            ".keys": IndexedWriter(_temporary(prefix, ".keys"), "uint8"),
        }
        self._stored = np.full(int(samples.image_ids.max(initial=-1)) + 1, -1, dtype=np.int64)
        """int64[different images]: where each is stored, -1 as long as no row has used it."""
        self.images_per_row: Counter[int] = Counter()
        self.files: tuple[FileEntry, ...] = ()

    @property
    def num_stored_images(self) -> int:
        return len(self._writers[".images"])

    def add_row(self, packing: Packing, row: int, chosen: IntArray) -> None:
        """Write one row of the packing, whose samples are positions in ``chosen``."""
        tokens: list[npt.NDArray[np.int32]] = []
        image_ids: list[int] = []
        keys: list[SegmentKey] = []
        pieces = slice(int(packing.row_splits[row]), int(packing.row_splits[row + 1]))
        columns = (chosen[packing.samples[pieces]], packing.starts[pieces], packing.stops[pieces])
        for sample, start, stop in zip(*(column.tolist() for column in columns), strict=True):
            tokens.append(self._piece(sample, start=start, stop=stop))
            images = slice(int(self._samples.image_splits[sample]), int(self._samples.image_splits[sample + 1]))
            image_ids += [self._image_id(image) for image in self._samples.image_ids[images].tolist()]
            source, task = self._names[self._samples.source[sample]], TASKS[self._samples.task[sample]]
            keys.append(SegmentKey(source, task, self._reader.key(sample), start, stop))
        joined = np.concatenate(tokens)
        packed = PackedRow(
            tokens=joined ^ (joined >> 31),
            supervised=joined < 0,
            segment_lengths=np.array([len(segment) for segment in tokens], dtype=np.int32),
            image_ids=np.array(image_ids, dtype=np.int64),
        )
        self._writers[".tokens"].add(encode_row(packed), mode=len(image_ids))
        self._writers[".keys"].add(encode_keys(keys))
        self.images_per_row[len(image_ids)] += 1

    def finish(self) -> None:
        """Finish all files; ``files`` describes them then."""
        written: dict[str, WrittenFile] = {}
        for suffix, writer in self._writers.items():
            written.update({suffix + kind: file for kind, file in writer.finish().items()})
        self.files = tuple(FileEntry(suffix, file.size, file.sha256) for suffix, file in written.items())

    def discard(self) -> None:
        """Remove what was written."""
        for suffix, writer in self._writers.items():
            writer.abort()
            for path in paths_of(_temporary(self._prefix, suffix)):
                path.unlink(missing_ok=True)

    def _image_id(self, image: int) -> int:
        if self._stored[image] < 0:
            self._stored[image] = self._writers[".images"].add(self._reader.image(image))
        return int(self._stored[image])

    def _piece(self, sample: int, *, start: int, stop: int) -> npt.NDArray[np.int32]:
        """Stored tokens [start, stop) of a sample; a text document's continuation does not predict its own first
        token, since what stands before it in the row is another segment."""
        piece = self._reader.tokens(sample, start=start, stop=stop)
        if start > 0:
            piece = piece.copy()
            piece[0] ^= piece[0] >> 31
        return piece


def _temporary(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(f"{prefix.name}.unfinished{suffix}")


def _commit(prefix: Path, manifest: Manifest) -> None:
    manifest_path(prefix).unlink(missing_ok=True)
    for entry in manifest.files:
        os.replace(_temporary(prefix, entry.suffix), f"{prefix}{entry.suffix}")
    write_manifest(prefix, manifest)
    folder = os.open(prefix.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def _manifest(
    recipe: DataRecipe, gathered: Gathered, chosen: IntArray, *, packing: Packing, writer: _RowWriter
) -> Manifest:
    histogram = writer.images_per_row
    names = [entry.source.name for entry in recipe.sources]
    tallies = list(zip(names, gathered.tallies, strict=True))
    return Manifest(
        format_version=FORMAT_VERSION,
        tokenizer_sha256=QWEN_SHA256,
        num_ranks=recipe.num_ranks,
        num_queries=recipe.num_queries,
        seq_length=recipe.seq_length,
        max_sample_length=recipe.longest_sample,
        packing=recipe.pack.mode,
        num_rows=packing.num_rows,
        num_samples=len(chosen),
        num_segments=len(packing.samples),
        num_tokens=int((packing.stops - packing.starts).sum()),
        num_images=sum(images * rows for images, rows in histogram.items()),
        num_stored_images=writer.num_stored_images,
        images_per_row=tuple(histogram[images] for images in range(max(histogram) + 1)),
        sources=tuple(
            SourceTotals(name, tally.read, int(kept))
            for (name, tally), kept in zip(tallies, _kept(gathered.samples, chosen, len(names)), strict=True)
        ),
        counts=_counts(names, gathered.samples, chosen),
        skips=tuple(
            SkipEntry(name, reason, tally.skips[reason], tuple(tally.examples[reason]))
            for name, tally in tallies
            for reason in sorted(tally.skips)
        ),
        files=writer.files,
    )


def _kept(samples: Samples, chosen: IntArray, num_sources: int) -> IntArray:
    """int64[sources]: different samples in the rows, counted from the rows and not from what was left out."""
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
