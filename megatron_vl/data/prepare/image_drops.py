"""Samples that are dropped because of their images: images of benchmarks, and repeated images.

This is decided when the parts are merged, in the order of the samples. So neither workers nor timing decide which of
two equal samples stays. A sample with several images is never a duplicate.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_vl.data.file_kinds import is_clutter
from megatron_vl.data.filters.duplicates import dhash, mark_repeats, matches_any
from megatron_vl.data.filters.options import FilterOptions
from megatron_vl.data.images.decode import decode_image
from megatron_vl.data.images.stored import upright
from megatron_vl.data.prepare.gather import Images, Samples
from megatron_vl.errors import DataError, SkipSample

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Dropped:
    """Samples that are dropped for one reason."""

    reason: str
    samples: Mask
    """bool[samples]: whether each sample is dropped."""


def image_drops(samples: Samples, images: Images, filters: Sequence[FilterOptions]) -> tuple[Dropped, ...]:
    """Return the dropped samples for each reason. ``filters`` are those of the sources, in order.

    Raises:
        DataError: A list of benchmark images cannot be read.
    """
    leaked = np.zeros(len(samples), dtype=np.bool_)
    for options in dict.fromkeys(filters):
        if options.benchmark_images is not None:
            of_benchmark = _in_benchmark(images, options.benchmark_images, options.benchmark_distance)
            mine = np.array([other == options for other in filters], dtype=np.bool_)[samples.source]
            leaked |= mine & _any_image(samples, of_benchmark)
    same, similar = _duplicates(samples, images, filters, leaked)
    return Dropped("benchmark_image", leaked), Dropped("duplicate_image", same), Dropped("similar_image", similar)


def _duplicates(samples: Samples, images: Images, filters: Sequence[FilterOptions], gone: Mask) -> tuple[Mask, Mask]:
    modes = np.array([("keep", "exact", "near").index(options.duplicates) for options in filters], dtype=np.int8)
    single = (samples.image_counts == 1) & ~gone
    same, similar = np.zeros(len(samples), dtype=np.bool_), np.zeros(len(samples), dtype=np.bool_)
    scope = np.flatnonzero(single & (modes[samples.source] >= 1))
    ids = samples.image_ids[samples.image_splits[scope]]
    first = np.unique(ids, return_index=True)[1]
    same[np.delete(scope, first)] = True
    scope = np.flatnonzero(single & ~same & (modes[samples.source] == 2))
    ids = samples.image_ids[samples.image_splits[scope]]
    distance = max([0, *(options.duplicate_distance for options in filters if options.duplicates == "near")])
    similar[scope] = mark_repeats(images.dhashes[ids], distance)
    return same, similar


def _any_image(samples: Samples, marked: Mask) -> Mask:
    """Return bool[samples]: whether each sample has a marked image. ``marked`` is bool[images]."""
    hits = np.concatenate([np.zeros(1, np.int64), np.cumsum(marked[samples.image_ids], dtype=np.int64)])
    return hits[samples.image_splits[1:]] > hits[samples.image_splits[:-1]]


def _in_benchmark(images: Images, path: Path, distance: int) -> Mask:
    digests, dhashes = _benchmark_hashes(path)
    mine = np.ascontiguousarray(images.digest).view("V32").reshape(-1)
    same = np.isin(mine.view("S32"), np.array(sorted(digests), dtype="S32"))
    return same | matches_any(images.dhashes, np.array(sorted(dhashes), dtype=np.uint64), distance)


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
