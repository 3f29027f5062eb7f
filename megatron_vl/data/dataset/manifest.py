"""``<prefix>.json``: the description of a prepared data set, how it was made, and what was left out.

The manifest is written last and read first. A prefix without a manifest is not a data set. The manifest fixes
everything that a run must agree with (tokenizer, slots per image, row length), the sizes and hashes of the files, and
the figures that recipes compute with (samples per row). Nothing in it depends on the machine, the time or the number of
workers. So two preparations of the same recipe are equal byte by byte.

A large data set has several blocks. Each block has its rows, its images and its keys in files of its own, whose names
have ``.00003-of-00084`` after the prefix. Rows and images are numbered through all blocks. The manifest of one block is
that of version 4, byte by byte, and the names have no number.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_vl.addresses import require_local
from megatron_vl.config.data_files import unfinished_data_set
from megatron_vl.config.records import Builder
from megatron_vl.data.dataset.indexed import FileRange
from megatron_vl.errors import DataError
from megatron_vl.files import sha256_of_next, write_whole

FORMAT_VERSION = 4
"""Version of a data set of one block."""
BLOCKS_VERSION = 5
"""Version of a data set of several blocks, which earlier readers do not know."""
HASHES = ".sha256"
NUM_EXAMPLES = 5
"""Number of skipped samples whose keys the manifest lists for each source and reason."""


@dataclass(frozen=True)
class FileEntry:
    """One file of the data set besides the manifest."""

    suffix: str
    """Part of the name after the prefix, for example ``.tokens.bin``."""
    size: int


@dataclass(frozen=True)
class BlockEntry:
    """One of several blocks."""

    num_rows: int
    num_stored_images: int


@dataclass(frozen=True)
class CountEntry:
    """Numbers of samples, tokens and images from one source for one task."""

    source: str
    task: str
    samples: int
    tokens: int
    images: int


@dataclass(frozen=True)
class SourceTotals:
    """Numbers of records of one source."""

    source: str
    read: int
    """Records that were read. Each was kept, or was left out for a reason."""
    kept: int
    """Distinct samples in the rows."""


@dataclass(frozen=True)
class SkipEntry:
    """Samples of one source that were left out for one reason."""

    source: str
    reason: str
    count: int
    examples: tuple[str, ...]
    """The first few samples, each as 'key: detail'."""


@dataclass(frozen=True)
class Manifest:
    """The content of ``<prefix>.json``."""

    format_version: int
    tokenizer_sha256: str
    num_bpe_tokens: int
    num_queries: int
    """Slots per image."""
    seq_length: int
    """Greatest length of a row in tokens."""
    max_sample_length: int
    packing: str
    """``mixed``, ``task`` (each row has samples of one task) or ``none`` (one sample per row)."""
    num_rows: int
    num_samples: int
    """Samples in the rows. A text document in several rows counts once."""
    num_segments: int
    """Segments in the rows."""
    num_tokens: int
    num_images: int
    """Images in the rows. Each is stored once in a block, even if several samples use it."""
    num_stored_images: int
    """Images in the files of all blocks."""
    images_per_row: tuple[int, ...]
    """Histogram: numbers of rows with 0, 1, 2, ... images."""
    sources: tuple[SourceTotals, ...]
    counts: tuple[CountEntry, ...]
    skips: tuple[SkipEntry, ...]
    files: tuple[FileEntry, ...]
    amounts_factor: float
    """Factor that scaled the amounts of the mixture: 1, or less if there are too few samples."""
    scarcest_group: str
    """The group or source that has too few samples; empty if none has."""
    hashes_sha256: str
    """SHA-256 of ``<prefix>.sha256``, which holds the hashes of the other files; see ``hash_lines``."""
    largest_token: int = -1
    """Largest id of all samples; -1 if it is unknown."""
    blocks: tuple[BlockEntry, ...] = ()
    """The blocks in order, at least two. Empty: there is only one."""

    def __post_init__(self) -> None:
        """Check that kept + left out = read for every source, and that the blocks have all rows and images.

        Raises:
            ValueError: Records, rows or images are unaccounted for.
        """
        if (self.format_version == BLOCKS_VERSION) != bool(self.blocks) or len(self.blocks) == 1:
            raise ValueError(f"format_version is {self.format_version}, but there are {len(self.blocks)} blocks")
        for name in ("num_rows", "num_stored_images"):
            found = sum(getattr(block, name) for block in self.blocks)
            if self.blocks and found != getattr(self, name):
                raise ValueError(f"{name} is {getattr(self, name)}, but the blocks have {found}")
        for totals in self.sources:
            left_out = sum(skip.count for skip in self.skips if skip.source == totals.source)
            if totals.kept + left_out != totals.read:
                raise ValueError(
                    f"source {totals.source!r}: {totals.read} records were read, but {totals.kept} kept and {left_out} "
                    "left out"
                )

    @property
    def packed(self) -> bool:
        """Whether rows may hold several samples."""
        return self.packing != "none"

    @property
    def samples_per_row(self) -> float:
        """Mean number of samples per row. Global batch in rows = samples / this."""
        return self.num_samples / max(self.num_rows, 1)

    @property
    def fill(self) -> float:
        """Share of the rows' tokens that are not padding."""
        return self.num_tokens / max(self.num_rows * self.seq_length, 1)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the content. Equal fingerprints mean equal rows."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """Return the content of the file. Derived figures are written for human readers and ignored when read back."""
        values = dataclasses.asdict(self)
        if not self.blocks:
            del values["blocks"]
        derived = {"samples_per_row": round(self.samples_per_row, 6), "fill": round(self.fill, 6)}
        return json.dumps({**values, "derived": derived}, indent=2) + "\n"

    def block_prefixes(self, prefix: str | Path) -> list[str]:
        """Return the path prefixes of the files of each block of the data set at ``prefix``."""
        total = max(len(self.blocks), 1)
        return [f"{prefix}{block_name(number, total)}" for number in range(total)]


def block_name(number: int, total: int) -> str:
    """Return what follows the prefix in the names of the files of a block: nothing if it is the only one."""
    return f".{number:05d}-of-{total:05d}" if total > 1 else ""


def manifest_path(prefix: str | Path) -> Path:
    """Return the path ``<prefix>.json``."""
    return Path(f"{prefix}.json")


def read_manifest(prefix: str | Path) -> Manifest:
    """Read and check ``<prefix>.json``.

    Raises:
        DataError: The file is missing, is not a manifest of this format version, or disagrees with the other files.
    """
    require_local(prefix, "the data set", "copy its files to one", error=DataError)
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
    if version not in (FORMAT_VERSION, BLOCKS_VERSION):
        raise DataError(
            f"{path}: format_version is {version}, expected {FORMAT_VERSION} or {BLOCKS_VERSION}; prepare the data "
            "again."
        )
    try:
        manifest = Builder(DataError, ours=True).build(Manifest, values, str(path))
    except DataError as error:
        raise DataError(f"{error}. The manifest is damaged; prepare the data again.") from error
    _check_sizes(prefix, manifest)
    return manifest


def write_manifest(prefix: str | Path, manifest: Manifest) -> None:
    """Write ``<prefix>.json`` atomically: it is either complete or absent."""
    write_whole(manifest_path(prefix), manifest.to_json(), durable=True)


def hash_lines(suffix: str, ranges: Iterable[FileRange]) -> Iterator[str]:
    """Yield a line for each range of a file: SHA-256, suffix, first byte, number of bytes.

    A file has several ranges because several workers write it. The lines are not in the manifest because every process
    reads the manifest.
    """
    begin = 0
    for range in ranges:
        yield f"{range.sha256} {suffix} {begin} {range.size}\n"
        begin += range.size


def verify_files(prefix: str | Path) -> None:
    """Read every file of a data set and compare its hashes with the stored ones.

    Raises:
        DataError: A range of a file has another hash; the message names the first such range.
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
                f"{path} {state}, the manifest says {entry.size} bytes. Copy the data set anew or prepare it again."
            )
