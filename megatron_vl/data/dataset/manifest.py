"""``<prefix>.json``: what a prepared data set is, how it was made, and what was left out.

The manifest is written last and read first: a prefix without one is not a data set. It pins everything that a
run must agree with (tokenizer, slots per image, row length), the sizes and hashes of the files, and the
figures that recipes compute with (samples per row). Nothing in it depends on the machine, the time or the
number of workers, so that two preparations of the same recipe are equal byte by byte.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_vl.config.records import Builder
from megatron_vl.config.validate import unfinished_data_set
from megatron_vl.data.dataset.indexed import FileRange
from megatron_vl.errors import DataError
from megatron_vl.files import sha256_of_next, write_whole

FORMAT_VERSION = 4
HASHES = ".sha256"
NUM_EXAMPLES = 5
"""Keys of skipped samples that the manifest names for each source and reason."""


@dataclass(frozen=True)
class FileEntry:
    """One file beside the manifest."""

    suffix: str
    """What follows the prefix, for example ``.tokens.bin``."""
    size: int


@dataclass(frozen=True)
class CountEntry:
    """What one source gave for one task."""

    source: str
    task: str
    samples: int
    tokens: int
    images: int


@dataclass(frozen=True)
class SourceTotals:
    """What became of all records of one source."""

    source: str
    read: int
    """Records that were read; each was kept, or left out for a reason."""
    kept: int
    """Different samples in the rows."""


@dataclass(frozen=True)
class SkipEntry:
    """Samples of one source that were left out for one reason."""

    source: str
    reason: str
    count: int
    examples: tuple[str, ...]
    """The first few, as 'key: detail'."""


@dataclass(frozen=True)
class Manifest:
    """The content of ``<prefix>.json``."""

    format_version: int
    tokenizer_sha256: str
    num_bpe_tokens: int
    num_queries: int
    """Slots of an image."""
    seq_length: int
    """Longest row in tokens."""
    max_sample_length: int
    packing: str
    """``mixed``, ``task`` (rows of one task) or ``none`` (one sample a row)."""
    num_rows: int
    num_samples: int
    """Samples in the rows; a text document that lies in several rows counts once."""
    num_segments: int
    """Pieces in the rows."""
    num_tokens: int
    num_images: int
    """Images in the rows; each is stored once, however often it is used."""
    num_stored_images: int
    images_per_row: tuple[int, ...]
    """Histogram: rows with 0, 1, 2, ... images."""
    sources: tuple[SourceTotals, ...]
    counts: tuple[CountEntry, ...]
    skips: tuple[SkipEntry, ...]
    files: tuple[FileEntry, ...]
    amounts_factor: float
    """What the mixture's amounts were multiplied by: 1, or less where there are too few samples."""
    scarcest_group: str
    """The group, or source, that has too few; empty if none has."""
    hashes_sha256: str
    """SHA-256 of ``<prefix>.sha256``, which holds those of the other files: see ``hash_lines``."""
    largest_token: int = -1
    """Largest id of all samples; -1 where it is not known."""

    def __post_init__(self) -> None:
        """Nothing is lost without a reason: kept + left out = read, for every source. Raises ValueError."""
        for totals in self.sources:
            left_out = sum(skip.count for skip in self.skips if skip.source == totals.source)
            if totals.kept + left_out != totals.read:
                raise ValueError(
                    f"source {totals.source!r}: {totals.read} records were read, but {totals.kept} kept and {left_out} "
                    "left out"
                )

    @property
    def packed(self) -> bool:
        return self.packing != "none"

    @property
    def samples_per_row(self) -> float:
        """Mean number of samples in a row: global batch in rows = samples / this."""
        return self.num_samples / max(self.num_rows, 1)

    @property
    def fill(self) -> float:
        """Share of the rows' tokens that is not padding."""
        return self.num_tokens / max(self.num_rows * self.seq_length, 1)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the content; equal fingerprints mean equal rows."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """The file's content; derived figures are written for readers and ignored when read back."""
        derived = {"samples_per_row": round(self.samples_per_row, 6), "fill": round(self.fill, 6)}
        return json.dumps({**dataclasses.asdict(self), "derived": derived}, indent=2) + "\n"


def manifest_path(prefix: str | Path) -> Path:
    """``<prefix>.json``."""
    return Path(f"{prefix}.json")


def read_manifest(prefix: str | Path) -> Manifest:
    """Read and check ``<prefix>.json``.

    Raises DataError if it is missing, not a manifest of this format version, or disagrees with the files
    beside it.
    """
    path = manifest_path(prefix)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        if isinstance(error, FileNotFoundError) and (unfinished := unfinished_data_set(prefix)):
            raise DataError(unfinished) from error
        raise DataError(
            f"{path}: cannot be read ({error.strerror}). A data set is given by its prefix (the path "
            "without .json); "
            "make one with tools/prepare_data.py."
        ) from error
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}); prepare the data again.") from error
    version = values.get("format_version") if isinstance(values, dict) else None
    if version != FORMAT_VERSION:
        raise DataError(
            f"{path}: format_version is {version}, expected {FORMAT_VERSION}; prepare the data again."
        )
    try:
        manifest = Builder(DataError, ours=True).build(Manifest, values, str(path))
    except DataError as error:
        raise DataError(f"{error}. The manifest is damaged; prepare the data again.") from error
    _check_sizes(prefix, manifest)
    return manifest


def write_manifest(prefix: str | Path, manifest: Manifest) -> None:
    """Write ``<prefix>.json`` in one step: it is there in full or not at all."""
    write_whole(manifest_path(prefix), manifest.to_json(), durable=True)


def hash_lines(suffix: str, ranges: Iterable[FileRange]) -> Iterator[str]:
    """A line for each range of a file: SHA-256, suffix, first byte, number of bytes.

    Ranges, because a file is written by many; and not in the manifest, which everyone reads.
    """
    begin = 0
    for range in ranges:
        yield f"{range.sha256} {suffix} {begin} {range.size}\n"
        begin += range.size


def verify_files(prefix: str | Path) -> None:
    """Read every file of a data set and compare its hashes with the stored ones.

    Raises DataError naming the first wrong bytes.
    """
    manifest = read_manifest(prefix)
    path = Path(f"{prefix}{HASHES}")
    text = path.read_bytes()
    _compare(path, 0, len(text), found=hashlib.sha256(text).hexdigest(), expected=manifest.hashes_sha256)
    for line in text.decode().splitlines():
        sha256, suffix, begin, size = line.split()
        path = Path(f"{prefix}{suffix}")
        with path.open("rb") as file:
            file.seek(int(begin))
            _compare(path, int(begin), int(size), found=sha256_of_next(file, int(size)), expected=sha256)


def _compare(path: Path, begin: int, size: int, *, found: str, expected: str) -> None:
    if found != expected:
        raise DataError(
            f"{path}: SHA-256 of bytes {begin} to {begin + size} is {found}, expected {expected}. The file is damaged; "
            "copy it anew."
        )


def _check_sizes(prefix: str | Path, manifest: Manifest) -> None:
    for entry in manifest.files:
        path = Path(f"{prefix}{entry.suffix}")
        found = path.stat().st_size if path.is_file() else None
        if found != entry.size:
            state = "is missing" if found is None else f"has {found} bytes"
            raise DataError(
                f"{path} {state}, the manifest says {entry.size} bytes. Copy the data set anew or prepare "
                "it again."
            )
