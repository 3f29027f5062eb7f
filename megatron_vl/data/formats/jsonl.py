"""JSON Lines and other records a line, cut into shards by line numbers and byte offsets so that a shard is
found without reading the file.

Blank lines are no records. A byte-order mark at the beginning of a line is passed over, also where files were laid end
to end. A line that is no record of its kind, or longer than the cap, is a skipped record whose key is the file and the
line number (counted from 1, as editors do).
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
"""What a line without a record consists of, if of anything."""


@dataclass(frozen=True)
class Line:
    """One line that holds a record."""

    number: int
    """Counted from 1."""
    record: dict[str, Any]


Parse = Callable[[str], dict[str, Any]]
"""Text of a line -> record; raises ValueError if it holds none."""


def parse_object(text: str) -> dict[str, Any]:
    """The JSON object in a line; raises ValueError."""
    try:
        record = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(record, dict):
        raise ValueError(f"expected an object, found {type(record).__name__}")
    return record


def line_shards(path: Path, lines_per_shard: int) -> list[Shard]:
    """Shards of ``lines_per_shard`` lines each (blank ones included in the count); raises DataError."""
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
    """The byte behind each line, whatever its length."""
    position, ended = 0, True
    while piece := stream.readline(MAX_LINE_BYTES):
        position += len(piece)
        ended = piece.endswith(b"\n")
        if ended:
            yield position
    if not ended:
        yield position


def read_lines(shard: Shard, parse: Parse = parse_object) -> Iterator[Line | Skipped]:
    """The records of a shard's lines, with ``Skipped`` for lines that hold none."""
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
