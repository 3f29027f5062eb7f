"""The second half of preparation: parts -> packed rows -> one data set.

Samples are numbered in the order of the parts, repeated by the weight of their source, packed (numbers only),
and then written row by row. An image is stored when a row first uses it, so the images of neighbouring rows
lie together, and once, whoever else uses it. All files are written under temporary names; an old manifest
goes before the files are renamed, the new one comes last. So whatever happens, there is a whole data set
under the prefix, or none.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_vl.data.indexed import IndexedWriter, WrittenFile, paths_of
from megatron_vl.data.manifest import (
    FORMAT_VERSION,
    NUM_EXAMPLES,
    CountEntry,
    FileEntry,
    Manifest,
    SkipEntry,
    manifest_path,
    write_manifest,
)
from megatron_vl.data.packing import IntArray, Items, Packing, PackLimits, one_per_row, pack, pack_by_group
from megatron_vl.data.parts import TASKS, Part
from megatron_vl.data.recipe import DataRecipe
from megatron_vl.data.rows import SegmentKey, encode_keys, encode_row
from megatron_vl.data.sample import PackedRow
from megatron_vl.data.tokenizer import QWEN_SHA256
from megatron_vl.errors import DataError

Progress = Callable[[int, int], None]
"""Called with the number of rows done and the number of all rows."""


@dataclass(frozen=True)
class _Samples:
    """All samples of all parts as arrays, one entry each, repeated by weight."""

    part: IntArray
    """int64[n]: part of the sample."""
    index: IntArray
    """int64[n]: index within the part."""
    length: IntArray
    images: IntArray
    task: IntArray
    """int64[n]: index into TASKS."""

    @property
    def is_text(self) -> npt.NDArray[np.bool_]:
        return self.task == TASKS.index("text")


def merge_parts(recipe: DataRecipe, parts: Sequence[Part], prefix: Path, progress: Progress | None = None) -> Manifest:
    """Pack the samples of all parts into the data set at ``prefix`` and return its manifest.

    ``parts`` are in the order of the units. Raises DataError if no sample is left.
    """
    samples = _gather(recipe, parts)
    if not len(samples.part):
        reasons = sorted({reason for part in parts for reason in part.index.skips})
        raise DataError(
            f"{prefix}: no sample is left to write; skipped for "
            f"{', '.join(reasons) or 'no reason: the sources are empty'}"
        )
    packing = _pack(recipe, samples)
    writer = _RowWriter(prefix, parts, samples)
    try:
        for row in range(packing.num_rows):
            writer.add_row(packing, row)
            if progress is not None:
                progress(row + 1, packing.num_rows)
        writer.finish()
    except BaseException:
        writer.discard()
        raise
    manifest = _manifest(recipe, parts, samples, packing=packing, writer=writer)
    _commit(prefix, manifest)
    return manifest


def _gather(recipe: DataRecipe, parts: Sequence[Part]) -> _Samples:
    """Number the samples; within a source, sample i occurs floor((i + 1) weight) - floor(i weight) times."""
    weights = {entry.source.name: entry.weight for entry in recipe.sources}
    sizes = np.array([len(part.index.keys) for part in parts], dtype=np.int64)
    copies = []
    seen: Counter[str] = Counter()
    for part, size in zip(parts, sizes.tolist(), strict=True):
        source = part.index.source
        steps = np.floor(np.arange(seen[source], seen[source] + size + 1) * weights[source])
        copies.append(np.diff(steps).astype(np.int64))
        seen[source] += size
    repeat = np.repeat(np.arange(sizes.sum()), np.concatenate([*copies, np.zeros(0, dtype=np.int64)]))
    task_ids = {task: i for i, task in enumerate(TASKS)}

    def column(values: Callable[[Part], list[int]]) -> IntArray:
        return np.array([value for part in parts for value in values(part)], dtype=np.int64)[repeat]

    return _Samples(
        part=np.repeat(np.arange(len(parts)), sizes)[repeat],
        index=column(lambda part: list(range(len(part.index.keys)))),
        length=column(lambda part: part.index.lengths),
        images=column(lambda part: [len(images) for images in part.index.images]),
        task=column(lambda part: [task_ids[task] for task in part.index.tasks]),
    )


def _pack(recipe: DataRecipe, samples: _Samples) -> Packing:
    options = recipe.pack
    limits = PackLimits(recipe.seq_length, options.max_images, options.min_piece)
    items = Items(samples.length, samples.images, samples.is_text)
    if options.mode == "none":
        return one_per_row(items, limits=limits)
    if options.mode == "task":
        return pack_by_group(items, samples.task, limits=limits, seed=options.seed)
    return pack(items, limits=limits, seed=options.seed)


class _RowWriter:
    """Writes rows, their images and their keys under temporary names."""

    def __init__(self, prefix: Path, parts: Sequence[Part], samples: _Samples) -> None:
        self._prefix = prefix
        self._parts = parts
        self._samples = samples
        prefix.parent.mkdir(parents=True, exist_ok=True)
        self._writers = {
            ".tokens": IndexedWriter(_temporary(prefix, ".tokens"), "int32", with_modes=True),
            ".images": IndexedWriter(_temporary(prefix, ".images"), "uint8"),
            ".keys": IndexedWriter(_temporary(prefix, ".keys"), "uint8"),
        }
        self._image_by_hash: dict[str, int] = {}
        self.images_per_row: Counter[int] = Counter()
        self.files: tuple[FileEntry, ...] = ()

    @property
    def num_stored_images(self) -> int:
        return len(self._image_by_hash)

    def add_row(self, packing: Packing, row: int) -> None:
        """Write one row of the packing."""
        tokens: list[npt.NDArray[np.int32]] = []
        image_ids: list[int] = []
        keys: list[SegmentKey] = []
        for piece in range(int(packing.row_splits[row]), int(packing.row_splits[row + 1])):
            sample = int(packing.samples[piece])
            start, stop = int(packing.starts[piece]), int(packing.stops[piece])
            part, index = self._parts[int(self._samples.part[sample])], int(self._samples.index[sample])
            tokens.append(_read_piece(part, index, start=start, stop=stop))
            image_ids += [self._image_id(part, image) for image in part.index.images[index]]
            keys.append(SegmentKey(part.index.source, part.index.tasks[index], part.index.keys[index], start, stop))
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

    def _image_id(self, part: Part, image: int) -> int:
        digest = part.index.hashes[image]
        if digest not in self._image_by_hash:
            self._image_by_hash[digest] = self._writers[".images"].add(part.images.read_bytes(image))
        return self._image_by_hash[digest]


def _read_piece(part: Part, index: int, *, start: int, stop: int) -> npt.NDArray[np.int32]:
    """Stored tokens [start, stop) of a sample; a text document's continuation does not predict its own first
    token, since what stands before it in the row is another segment."""
    piece = np.frombuffer(part.tokens.read_bytes(index, start=start, stop=stop), dtype=np.int32).copy()
    if start > 0:
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
    recipe: DataRecipe,
    parts: Sequence[Part],
    samples: _Samples,
    *,
    packing: Packing,
    writer: _RowWriter,
) -> Manifest:
    histogram = writer.images_per_row
    return Manifest(
        format_version=FORMAT_VERSION,
        tokenizer_sha256=QWEN_SHA256,
        num_ranks=recipe.num_ranks,
        num_queries=recipe.num_queries,
        seq_length=recipe.seq_length,
        max_sample_length=recipe.longest_sample,
        packing=recipe.pack.mode,
        num_rows=packing.num_rows,
        num_samples=len(samples.part),
        num_segments=len(packing.samples),
        num_tokens=int((packing.stops - packing.starts).sum()),
        num_images=sum(images * rows for images, rows in histogram.items()),
        num_stored_images=writer.num_stored_images,
        images_per_row=tuple(histogram[images] for images in range(max(histogram) + 1)),
        counts=_counts(recipe, parts, samples),
        skips=_skips(recipe, parts),
        files=writer.files,
    )


def _counts(recipe: DataRecipe, parts: Sequence[Part], samples: _Samples) -> tuple[CountEntry, ...]:
    names = [entry.source.name for entry in recipe.sources]
    source = np.array([names.index(part.index.source) for part in parts], dtype=np.int64)[samples.part]
    entries = []
    for group in np.unique(source * len(TASKS) + samples.task).tolist():
        source_id, task_id = divmod(group, len(TASKS))
        mine = (source == source_id) & (samples.task == task_id)
        length, images = int(samples.length[mine].sum()), int(samples.images[mine].sum())
        entries.append(CountEntry(names[source_id], TASKS[task_id], int(mine.sum()), length, images))
    return tuple(entries)


def _skips(recipe: DataRecipe, parts: Sequence[Part]) -> tuple[SkipEntry, ...]:
    entries = []
    for name in (entry.source.name for entry in recipe.sources):
        mine = [part.index for part in parts if part.index.source == name]
        for reason in sorted({reason for index in mine for reason in index.skips}):
            count = sum(index.skips.get(reason, 0) for index in mine)
            examples = [example for index in mine for example in index.examples.get(reason, ())]
            entries.append(SkipEntry(name, reason, count, tuple(examples[:NUM_EXAMPLES])))
    return tuple(entries)
