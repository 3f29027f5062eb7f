"""JSON Lines and other formats with one record per line. Shards are given by line numbers and byte offsets, so a shard
is found without reading the file.

Blank lines are not records. A byte-order mark at the beginning of a line is ignored, also in the middle of concatenated
files. A line that is not a valid record, or is longer than the limit, is a skipped record. Its key is the file and the
line number (counted from 1, as in editors).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatron_vl.data.file_kinds import HEAD_BYTES, what_is
from megatron_vl.data.formats.shard import Shard, Skipped
from megatron_vl.data.formats.zips import open_file
from megatron_vl.errors import DataError

MAX_LINE_BYTES = 16 * 2**20
BLANK = b" \t\r\n\xef\xbb\xbf"
"""The only bytes that may occur in a line without a record."""


@dataclass(frozen=True)
class Line:
    """One line that holds a record."""

    number: int
    """Line number, counted from 1."""
    record: dict[str, Any]


Parse = Callable[[str], dict[str, Any]]
"""Parser from the text of a line to a record. Raises ValueError if the line holds none."""


def parse_object(text: str) -> dict[str, Any]:
    """Return the JSON object in a line. Raises ValueError if it holds none."""
    try:
        record = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(record, dict):
        raise ValueError(f"expected an object, found {type(record).__name__}")
    return record


def line_shards(path: Path, lines_per_shard: int) -> list[Shard]:
    """Return shards of ``lines_per_shard`` lines each, including blank lines. Raises DataError."""
    if lines_per_shard < 1:
        raise DataError(f"records_per_shard is {lines_per_shard}, expected at least 1")
    shards = []
    first = offset = end = number = 0
    with open_file(path) as stream:
        if foreign := what_is(stream.read(HEAD_BYTES)):
            raise DataError(f"{path}: it is {foreign}; expected a record a line, in UTF-8")
        stream.seek(0)
        for number, end in enumerate(_line_ends(stream), start=1):
            if number % lines_per_shard == 0:
                shards.append(Shard(f"{path.name}:{first}", path, first, number - first, offset))
                first, offset = number, end
    if number > first:
        shards.append(Shard(f"{path.name}:{first}", path, first, number - first, offset))
    return shards


def _line_ends(stream: IO[bytes]) -> Iterator[int]:
    """Yield the offset of the byte after each line, for lines of any length."""
    position, ended = 0, True
    while piece := stream.readline(MAX_LINE_BYTES):
        position += len(piece)
        ended = piece.endswith(b"\n")
        if ended:
            yield position
    if not ended:
        yield position


def read_lines(shard: Shard, parse: Parse = parse_object) -> Iterator[Line | Skipped]:
    """Yield the records of a shard's lines, with ``Skipped`` for lines without a record."""
    with open_file(shard.path) as stream:
        stream.seek(shard.offset)
        number = shard.first
        while shard.count is None or number < shard.first + shard.count:
            raw = stream.readline(MAX_LINE_BYTES + 1)
            if not raw:
                return
            number += 1
            key = f"{shard.path.name}:{number}"
            if len(raw) > MAX_LINE_BYTES and not raw.endswith(b"\n"):
                _skip_rest_of_line(stream)
                yield Skipped(key, "line_too_long", f"more than {MAX_LINE_BYTES} bytes")
            elif raw.strip(BLANK):
                yield _line(raw, number, key, parse)


def _skip_rest_of_line(stream: IO[bytes]) -> None:
    while rest := stream.readline(MAX_LINE_BYTES):
        if rest.endswith(b"\n"):
            return


def _line(raw: bytes, number: int, key: str, parse: Parse) -> Line | Skipped:
    try:
        return Line(number, parse(raw.rstrip(b"\r\n").decode("utf-8-sig")))
    except ValueError as error:
        if parse is parse_object:
            return Skipped(key, "bad_json", str(error))
        return Skipped(key, "bad_line", str(error))
