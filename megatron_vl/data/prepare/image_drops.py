"""Samples that are dropped because of their images: images of benchmarks, and repeated images.

This is decided when the parts are merged, in the order of the samples. So neither workers nor timing decide which of
two equal samples stays. A sample with several images is never a duplicate.

There may be more images than memory holds. Images of benchmarks are few, so the images of some parts at a time are
compared with them. Repeated images are found by sorting in runs on disk (sorted_runs.py, similar_images.py). Memory
holds one byte for each sample: its fate.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_vl.data.file_kinds import is_clutter
from megatron_vl.data.filters.duplicates import dhash, matches_any
from megatron_vl.data.filters.options import FilterOptions
from megatron_vl.data.images.decode import decode_image
from megatron_vl.data.images.stored import upright
from megatron_vl.data.prepare.part_files import PartIndex
from megatron_vl.data.prepare.similar_images import mark_similar
from megatron_vl.data.prepare.sorted_runs import FirstUses
from megatron_vl.errors import DataError, SkipSample

IntArray = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Dropped:
    """A reason for which a sample that was kept so far is left out when the parts are merged."""

    reason: str


DROPS = (Dropped("benchmark_image"), Dropped("duplicate_image"), Dropped("similar_image"))
_BENCHMARK, _SAME, _SIMILAR = range(1, 4)
"""Fates: 1 more than the index in DROPS. Fate 0: the sample stays."""


class Fates:
    """One byte for each sample of all parts: 0 if it stays, else 1 more than the index of the reason in DROPS."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def __len__(self) -> int:
        return len(self._bytes)

    def extend(self, count: int) -> None:
        """Add samples that stay."""
        self._bytes += bytes(count)

    def mark(self, numbers: IntArray, fate: int) -> None:
        """Set the fate of some samples, int64[n]."""
        np.frombuffer(self._bytes, dtype=np.uint8)[numbers] = fate

    def of(self, first: int, count: int) -> npt.NDArray[np.uint8]:
        """Return the fates of consecutive samples, uint8[count]."""
        return np.frombuffer(self._bytes[first : first + count], dtype=np.uint8)


@dataclass(frozen=True)
class Looks:
    """Which images consecutive samples have, and what is known of them."""

    source: npt.NDArray[np.int16]
    """int16[samples]."""
    image_splits: IntArray
    """int64[samples + 1]: sample s has the images image_ids[image_splits[s] : image_splits[s + 1]]."""
    image_ids: IntArray
    """int64[images of all samples]: index into the images."""
    digests: npt.NDArray[np.uint8]
    """uint8[images, 32]: SHA-256."""
    dhashes: npt.NDArray[np.uint64]
    """uint64[images]: perceptual hash; 0 if no filter needs it."""

    @classmethod
    def of(cls, parts: Sequence[tuple[int, PartIndex]]) -> Looks:
        """Join parts, given as source and index. There must be at least one."""
        stored = np.array([len(index.image_sizes) for _, index in parts], dtype=np.int64)
        uses = np.array([len(index.image_ids) for _, index in parts], dtype=np.int64)
        ids = np.concatenate([index.image_ids for _, index in parts]).astype(np.int64)
        counts = np.concatenate([index.image_counts for _, index in parts])
        sizes = [index.num_samples for _, index in parts]
        return cls(
            source=np.repeat(np.array([source for source, _ in parts], dtype=np.int16), sizes),
            image_splits=np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)]),
            image_ids=ids + np.repeat(np.cumsum(stored) - stored, uses),
            digests=np.concatenate([index.digests for _, index in parts]),
            dhashes=np.concatenate([index.dhashes for _, index in parts]),
        )


class ImageDrops:
    """Decides which samples are dropped because of their images. Samples are added in their order."""

    def __init__(self, filters: Sequence[FilterOptions], fates: Fates, scratch: Path) -> None:
        """``filters`` are those of the sources, in order. ``scratch``: folder for temporary files.

        Raises:
            DataError: A list of benchmark images cannot be read.
        """
        self._filters = filters
        self._fates = fates
        self._scratch = scratch
        self._modes = np.array([("keep", "exact", "near").index(item.duplicates) for item in filters], dtype=np.int8)
        self._benchmarks = {
            item: _Benchmark(item.benchmark_images, item.benchmark_distance)
            for item in dict.fromkeys(filters)
            if item.benchmark_images is not None
        }
        repeated = partial(fates.mark, fate=_SAME)
        self._first_files = FirstUses(scratch / "files", key_width=4, width=6, repeated=repeated)

    @property
    def needs_images(self) -> bool:
        """Whether any filter compares images."""
        return bool(self._benchmarks) or bool(self._modes.any())

    def add(self, looks: Looks, first: int) -> None:
        """Judge consecutive samples, the first of which has the number ``first``."""
        leaked = self._leaked(looks)
        self._fates.mark(first + np.flatnonzero(leaked), _BENCHMARK)
        modes = self._modes[looks.source]
        scope = np.flatnonzero((np.diff(looks.image_splits) == 1) & ~leaked & (modes >= 1))
        ids = looks.image_ids[looks.image_splits[scope]]
        rows = np.empty((len(scope), 6), dtype=np.uint64)
        rows[:, :4] = np.ascontiguousarray(looks.digests[ids]).view(np.uint64)
        rows[:, 4] = first + scope
        rows[:, 5] = np.where(modes[scope] == 2, looks.dhashes[ids], 0)
        self._first_files.add(rows)

    def finish(self) -> None:
        """Set the fates of all samples that were added."""
        first_looks = FirstUses(
            self._scratch / "looks", key_width=1, width=2, repeated=partial(self._fates.mark, fate=_SIMILAR)
        )
        for rows in self._first_files.firsts():
            comparable = rows[rows[:, 5] != 0]
            first_looks.add(comparable[:, [5, 4]])
        distance = max([0, *(item.duplicate_distance for item in self._filters if item.duplicates == "near")])
        mark = partial(self._fates.mark, fate=_SIMILAR)
        mark_similar(first_looks.firsts(), distance, scratch=self._scratch, mark=mark)

    def _leaked(self, looks: Looks) -> Mask:
        """Return bool[samples]: whether each sample has an image of a benchmark that its source excludes."""
        leaked = np.zeros(len(looks.source), dtype=np.bool_)
        for options, benchmark in self._benchmarks.items():
            marked = benchmark.holds(looks)
            hits = np.concatenate([np.zeros(1, np.int64), np.cumsum(marked[looks.image_ids], dtype=np.int64)])
            mine = np.array([other == options for other in self._filters], dtype=np.bool_)[looks.source]
            leaked |= mine & (hits[looks.image_splits[1:]] > hits[looks.image_splits[:-1]])
        return leaked


class _Benchmark:
    """The images of benchmarks."""

    def __init__(self, path: Path, distance: int) -> None:
        digests, dhashes = _benchmark_hashes(path)
        self._digests = np.array(sorted(digests), dtype="S32")
        self._dhashes = np.array(sorted(dhashes), dtype=np.uint64)
        self._distance = distance

    def holds(self, looks: Looks) -> Mask:
        """Return bool[images]: whether each image is one of the benchmarks'."""
        mine = np.ascontiguousarray(looks.digests).view("S32").reshape(-1)
        return np.isin(mine, self._digests) | matches_any(looks.dhashes, self._dhashes, self._distance)


def _benchmark_hashes(path: Path) -> tuple[set[bytes], set[int]]:
    """Return the SHA-256 and perceptual hashes of benchmark images, from a folder of images or a file of hashes.

    Raises:
        DataError: A file of the folder is not an image, or a line of the file is not a hash.
    """
    digests: set[bytes] = set()
    dhashes: set[int] = set()
    if path.is_dir():
        for file in sorted(item for item in path.rglob("*") if item.is_file()):
            if is_clutter(file.relative_to(path).as_posix()):
                continue
            data = file.read_bytes()
            try:
                forms = {data, upright(data)}  # a source may store it rotated
                dhashes |= {dhash(decode_image(form)) for form in forms}
            except SkipSample as error:
                raise DataError(f"{file}: {error.reason} ({error.detail}); {path} is to hold images only") from error
            digests |= {hashlib.sha256(form).digest() for form in forms}
        return digests, dhashes
    for number, line in enumerate(path.read_text(encoding="utf-8-sig", errors="replace").splitlines(), start=1):
        word = line.strip()
        try:
            value = bytes.fromhex(word)
        except ValueError:
            value = b""
        if len(value) == 32:
            digests.add(value)
        elif len(value) == 8:
            dhashes.add(int.from_bytes(value, "big"))
        elif word:
            raise DataError(
                f"{path}, line {number}: found {word!r:.40}, expected a SHA-256 (64 hexadecimal digits) or a "
                "perceptual hash (16)"
            )
    return digests, dhashes
