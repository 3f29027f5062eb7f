"""What all readers share: shards, skipped records, and strict access to fields.

A record that cannot be used is *data*, not an exception: ``read`` yields ``Skipped`` in its place, with the
reason that groups it in the manifest. Exceptions are for what makes the whole source useless (a missing
folder, a file of another format): ``DataError`` names the file, what was found and what was expected.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

from megatron_vl.data.sample import Sample
from megatron_vl.data.sources.file_kinds import BYTE_ORDER_MARK, what_is
from megatron_vl.errors import DataError, SkipSample

Json = Mapping[str, Any]

_LARGEST = 1e300
NUMBER = r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
"""Pattern of a number as a text has it."""
NOTHING: tuple[Any, ...] = (None, "", [], {})
"""Values of a field that say nothing; a number 0 says something."""
_FAULTS_OF_FILES = frozenset({
    errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.ENOENT, errno.EINVAL,
})  # fmt: skip


@dataclass(frozen=True)
class Shard:
    """A unit of work: a file, or some of its records."""

    name: str
    """Unique within the source and stable over runs."""
    path: Path
    first: int = 0
    """Index of the first record (lines: number counted from 0)."""
    count: int | None = None
    """Number of records; none for all that follow."""
    offset: int = 0
    """Byte at which the first record begins (lines and JSON documents)."""
    contents: str = ""
    """Where records are files below ``path``: a hash that changes with them, see ``hash_of_files``."""


@dataclass(frozen=True)
class Skipped:
    """A record that gave no sample."""

    key: str
    reason: str
    """Short and stable: groups records in the manifest."""
    detail: str = ""


@dataclass(frozen=True)
class Source(ABC):
    """Options that every reader has, and what a reader does."""

    name: str
    """Name of the source in the recipe; becomes ``Sample.source``."""
    exif_orientation: Literal["ignore", "apply"] = dataclasses.field(default="ignore", kw_only=True)
    """Take the pixels as they are stored, or turned as EXIF says."""
    scaled_images: bool = dataclasses.field(default=False, kw_only=True)
    """Images were scaled as a whole after they were annotated: compare the proportions of declared sizes only."""

    @abstractmethod
    def shards(self) -> list[Shard]:
        """Units of work in a fixed order. Raises DataError if the source's files are missing."""

    def files(self) -> list[Path]:
        """Files beside the shards from which samples are made: finished work counts only as long as they are unchanged.

        By default all options that are paths. Images that records name are not among them.
        """
        values = [getattr(self, item.name) for item in dataclasses.fields(self)]
        return [value for value in values if isinstance(value, Path)]

    def score_fields(self) -> tuple[str, ...]:
        """Fields of a record of which one may hold the score of the sample; none if the format has no scores."""
        return ()

    @abstractmethod
    def read(self, shard: Shard) -> Iterator[Sample | Skipped]:
        """One item for each record of ``shard``, in the order of the file."""


def unreadable(what: str, error: Exception) -> SkipSample:
    """The SkipSample for a file that cannot be read.

    An error of the disk or the network is raised again: it says nothing of the file, and the sample would be lost for
    good, since a finished shard is not read a second time.
    """
    if isinstance(error, OSError) and error.errno is not None and error.errno not in _FAULTS_OF_FILES:
        raise error
    return SkipSample("unreadable_file", f"{what}: {getattr(error, 'strerror', None) or error}")


def skipped(key: str, error: SkipSample) -> Skipped:
    """The record for a ``SkipSample`` that was raised while ``key`` was read."""
    return Skipped(key, error.reason, error.detail)


def field(record: Json, name: str, kind: type | tuple[type, ...]) -> Any:
    """``record[name]``, checked to be a ``kind``; otherwise SkipSample('missing_field' or 'wrong_field')."""
    if not isinstance(record, Mapping):
        raise SkipSample("wrong_field", f"expected an object, found {type(record).__name__}")
    if name not in record:
        raise SkipSample("missing_field", f"no {name!r}; found {sorted(record)[:8]}")
    value = record[name]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise SkipSample("wrong_field", f"{name!r} is {type(value).__name__}")
    return value


def language_of(record: Json, default: Literal["en", "zh"]) -> Literal["en", "zh"]:
    """The language that a record names under ``lang`` (``zh``, ``zh-CN``, ``en_US``); ``default`` if it is neither."""
    named = record.get("lang")
    start = re.split("[-_]", named.strip().lower())[0] if isinstance(named, str) else ""
    return "zh" if start == "zh" else "en" if start == "en" else default


def is_finite(value: Any) -> bool:
    """Whether a value of a record is a number with which to reckon: no bool, no NaN, not beyond what a float can be (an
    integer of JSON can)."""
    return type(value) in (float, int) and -_LARGEST < value < _LARGEST


def size_of(width: Any, height: Any, what: str) -> tuple[int, int]:
    """Width and height in pixels that a record declares, ``640.0`` among them; raises SkipSample('bad_size')."""
    sides = [int(side) for side in (width, height) if is_finite(side) and side > 0 and side == int(side)]
    if len(sides) != 2:
        raise SkipSample("bad_size", f"{what} are {width!r:.40} and {height!r:.40}, expected pixels")
    return sides[0], sides[1]


def words_of(value: Any, what: str) -> str:
    """What is to be learned of a value: a text, or a finite number as decimals; SkipSample('wrong_field') otherwise.

    Whether ``true`` is to be learned as "true" or as "yes" is not for us to say.
    """
    if isinstance(value, str):
        return value
    if not is_finite(value):
        raise SkipSample("wrong_field", f"{what} is {value!r:.40}, expected a text or a number")
    return format(Decimal(repr(value)), "f")


def words_in(record: Json, name: str) -> str:
    """``record[name]`` as ``words_of`` gives it; raises SkipSample as ``field`` does."""
    return words_of(field(record, name, object), repr(name))


def as_number(value: Any) -> float | None:
    """A finite number in whatever form a record has it: also as text (``"0.31"``), and as parquet's decimal."""
    if isinstance(value, (str, Decimal)):
        text = str(value).strip()
        value = float(text) if re.fullmatch(NUMBER, text) else None
    return float(value) if is_finite(value) else None


def decode_text(data: bytes, what: str) -> str:
    """The text in some bytes, without the byte-order mark; SkipSample('bad_unicode') if it is no UTF-8."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        said = what_is(data)
        raise SkipSample("bad_unicode", f"{what}: {said or f'{error.reason} at byte {error.start}'}") from error


def clean_text(text: str, what: str) -> str:
    """``text`` without surrounding blanks and byte-order marks; SkipSample if it is empty or has lone surrogates."""
    text = text.replace(BYTE_ORDER_MARK, "").strip()
    if not text:
        raise SkipSample("empty_text", f"{what} is empty")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise SkipSample("bad_unicode", f"{what}: {error.reason}") from error
    return text


def require_file(path: Path, what: str) -> Path:
    """``path``, or DataError if it is no regular file."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; expected {what}")
    return path


def require_folder(path: Path, what: str) -> Path:
    """``path``, or DataError if it is no folder."""
    if not path.is_dir():
        raise DataError(f"{path}: no such folder; expected {what}")
    return path


def range_shards(path: Path, num_records: int, records_per_shard: int) -> list[Shard]:
    """Shards of consecutive records of one file."""
    if records_per_shard < 1:
        raise DataError(f"records_per_shard is {records_per_shard}, expected at least 1")
    firsts = range(0, num_records, records_per_shard)
    return [Shard(f"{path.name}:{first}", path, first, min(records_per_shard, num_records - first)) for first in firsts]


def slice_of(records: list[Any], shard: Shard) -> Iterator[tuple[int, Any]]:
    """The records of ``shard`` with their indices."""
    stop = len(records) if shard.count is None else shard.first + shard.count
    for index in range(shard.first, min(stop, len(records))):
        yield index, records[index]


def hash_of_files(files: Iterable[tuple[str, Path]]) -> str:
    """A hash of names, sizes and times of files; of one that is not there, of its name."""
    digest = hashlib.sha256()
    for name, path in files:
        state = path.stat() if path.exists() else None
        digest.update(f"{name!r} {state and (state.st_size, state.st_mtime_ns)}\n".encode())
    return digest.hexdigest()[:32]
