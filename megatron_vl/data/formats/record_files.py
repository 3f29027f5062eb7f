"""Files of JSON records in the two forms in which people keep them: a list (or a dictionary), and an object a line.

Which one it is is seen from the content, since names mislead: ``data.json`` is often JSON Lines, and ``data.jsonl``
a list. A file whose first character is ``[`` is a list; one whose first line is a whole object, with another behind it,
is JSON Lines, and so is any other file of that name.
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
    """File and number, or line, or key in a dictionary: for messages."""
    index: int
    """Counted from 0; of lines the number of the line."""
    value: Any
    name: str = ""
    """Its key in a dictionary."""


def record_shards(path: Path, records_per_shard: int, key: str | None = None) -> list[Shard]:
    """Shards of the records of a file, which may lie in a zip; with ``key``, of the list under it.

    Raises DataError if the file is missing, broken or of another form.
    """
    if is_lines(path):
        if key is not None:
            hint = "('records: \"\"' takes lines)"
            raise DataError(f"{path}: holds an object a line; expected a list under {key!r} {hint}")
        return line_shards(path, records_per_shard)
    return array_shards(path, records_per_shard, key)


def folder_shards(path: Path, records_per_shard: int) -> list[Shard]:
    """The shards of a file, or of all .jsonl files in a folder; raises DataError."""
    files = [path]
    if path.is_dir():
        files = plain_files(path, LINES_SUFFIXES)
    if not files:
        raise DataError(f"{path}: no .jsonl file in this folder{holds(path)}")
    return [shard for file in files for shard in record_shards(file, records_per_shard)]


def read_records(shard: Shard, key: str | None = None) -> Iterator[Record | Skipped]:
    """The records of a shard, with ``Skipped`` for lines that hold none; ``key`` as for the shards."""
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
    """The sample that ``sample_of`` makes of each record and its key; what raises SkipSample is skipped."""
    for record in read_records(shard):
        if isinstance(record, Skipped):
            yield record
            continue
        try:
            yield sample_of(record.value, record.key)
        except SkipSample as error:
            yield skipped(record.key, error)


def is_lines(path: Path) -> bool:
    """Whether a file is JSON Lines; raises DataError if there is none, or for an object over several lines."""
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
    """Raise DataError if the file is a list of JSON."""
    if not is_lines(path):
        raise DataError(f"{path}: is a JSON document; expected an object a line: jq -c '.[]' OLD > NEW")


def _next_line(stream: IO[bytes]) -> bytes:
    """The next line that is not blank, without blanks at its ends and at most as long as a line may be."""
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
