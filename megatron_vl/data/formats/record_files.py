"""Files of JSON records in their two usual forms: a list (or a dictionary), and one object per line.

The content decides which form it is, because names mislead: ``data.json`` is often JSON Lines, and ``data.jsonl`` a
list. A file whose first character is ``[`` is a list. A file whose first line is a whole object, followed by another
line, is JSON Lines. Any other file with the suffix of JSON Lines is JSON Lines too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatron_vl.data.file_kinds import holds, plain_files
from megatron_vl.data.formats.json_stream import array_shards, read_array
from megatron_vl.data.formats.jsonl import BLANK, MAX_LINE_BYTES, line_shards, read_lines
from megatron_vl.data.formats.shard import Shard, Skipped, skipped
from megatron_vl.data.formats.zips import open_file
from megatron_vl.data.sample import Sample
from megatron_vl.errors import DataError, SkipSample

LINES_SUFFIXES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Record:
    """One record of a file."""

    key: str
    """File with index, line number, or dictionary key, for messages."""
    index: int
    """Index, counted from 0. For lines: the line number."""
    value: Any
    name: str = ""
    """Key in a dictionary."""


def record_shards(path: Path, records_per_shard: int, key: str | None = None) -> list[Shard]:
    """Return shards of the records of a file, which may lie in a zip; with ``key``, of the list under this key.

    Raises:
        DataError: The file is missing, invalid or of another form.
    """
    if is_lines(path):
        if key is not None:
            hint = "('records: \"\"' takes lines)"
            raise DataError(f"{path}: holds an object a line; expected a list under {key!r} {hint}")
        return line_shards(path, records_per_shard)
    return array_shards(path, records_per_shard, key)


def folder_shards(path: Path, records_per_shard: int) -> list[Shard]:
    """Return the shards of a file, or of all .jsonl files in a folder. Raises DataError."""
    files = [path]
    if path.is_dir():
        files = plain_files(path, LINES_SUFFIXES)
    if not files:
        raise DataError(f"{path}: no .jsonl file in this folder{holds(path)}")
    return [shard for file in files for shard in record_shards(file, records_per_shard)]


def read_records(shard: Shard, key: str | None = None) -> Iterator[Record | Skipped]:
    """Yield the records of a shard, with ``Skipped`` for lines without a record; ``key`` as for the shards."""
    name = shard.path.name
    if key is None and is_lines(shard.path):
        for line in read_lines(shard):
            if isinstance(line, Skipped):
                yield line
            else:
                yield Record(f"{name}:{line.number}", line.number - 1, line.record)
        return
    for element in read_array(shard):
        yield Record(f"{name}#{element.key or element.index}", element.index, element.value, element.key)


def read_samples(shard: Shard, sample_of: Callable[[Any, str], Sample]) -> Iterator[Sample | Skipped]:
    """Yield the sample that ``sample_of`` makes of each record and its key; skip records that raise SkipSample."""
    for record in read_records(shard):
        if isinstance(record, Skipped):
            yield record
            continue
        try:
            yield sample_of(record.value, record.key)
        except SkipSample as error:
            yield skipped(record.key, error)


def is_lines(path: Path) -> bool:
    """Return whether a file is JSON Lines. Raises DataError if it is missing or holds one object over several lines."""
    with open_file(path) as stream:
        first = _next_line(stream)
        if path.suffix.lower() in LINES_SUFFIXES:
            if first == b"{":
                raise DataError(
                    f"{path}: begins with an object over several lines; expected an object a line, or a list: "
                    "jq -c . OLD > NEW"
                )
            return not first.startswith(b"[")
        return first.startswith(b"{") and _next_line(stream).startswith(b"{") and _is_whole(first)


def require_lines(path: Path) -> None:
    """Raise DataError if the file is a JSON list."""
    if not is_lines(path):
        raise DataError(f"{path}: is a JSON document; expected an object a line: jq -c '.[]' OLD > NEW")


def _next_line(stream: IO[bytes]) -> bytes:
    """Return the next line that is not blank, without surrounding white space and up to the length limit of a line."""
    while line := stream.readline(MAX_LINE_BYTES):
        if stripped := line.strip(BLANK):
            return stripped
    return b""


def _is_whole(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True
