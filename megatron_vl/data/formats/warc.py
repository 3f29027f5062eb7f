"""Responses of a web crawl in WARC files, as Common Crawl publishes them (.warc.gz: one gzip member a record).

Of a file's records only responses of HTML are pages; requests, metadata and crawl information are none. A
response of another status or type is a skipped record. A file that is cut off or damaged gives the pages
before the damage and one more skipped record that says so.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

from megatron_vl.data.formats.documents import MAX_DOCUMENT_BYTES, Document
from megatron_vl.data.formats.shard import Skipped, require_file

WARC_SUFFIXES = (".warc", ".warc.gz")
MAX_HEADER_BYTES = 2**16
BLANK_LINES = (b"\r\n", b"\n")


def read_warc(path: Path) -> Iterator[Document | Skipped]:
    """The HTML pages of a WARC file by their address, with ``Skipped`` for other responses; raises DataError."""
    number = 0
    with require_file(path, "a WARC file").open("rb") as file:
        stream = cast(IO[bytes], gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file)
        try:
            while (headers := _headers(stream)) is not None:
                number += 1
                size = int(headers.get("content-length", ""))
                if headers.get("warc-type") == "response":
                    key = f"{path.name}#{number} {headers.get('warc-target-uri', '')[:200]}".rstrip()
                    yield _response(key, stream, size)
                else:
                    _pass_over(stream, size)
        except (EOFError, OSError, ValueError, zlib.error) as error:
            yield Skipped(path.name, "truncated_warc", f"{path}: after {number} records: {error}")


def _headers(stream: IO[bytes]) -> dict[str, str] | None:
    """The header of the next record, or none at the end of the file; raises ValueError."""
    line = stream.readline(MAX_HEADER_BYTES)
    while line in BLANK_LINES:
        line = stream.readline(MAX_HEADER_BYTES)
    if not line:
        return None
    if not line.startswith(b"WARC/"):
        raise ValueError(f"found {line[:20]!r}, expected the header of a record")
    return _fields(stream)


def _fields(stream: IO[bytes]) -> dict[str, str]:
    """Header fields up to the blank line, names in lower case."""
    fields: dict[str, str] = {}
    total = 0
    while (line := stream.readline(MAX_HEADER_BYTES)) not in BLANK_LINES:
        total += len(line)
        if not line or total > MAX_HEADER_BYTES:
            raise ValueError("a header without end")
        name, _, value = line.decode("utf-8", "replace").partition(":")
        fields[name.strip().lower()] = value.strip()
    return fields


def _response(key: str, stream: IO[bytes], size: int) -> Document | Skipped:
    if not 0 <= size <= MAX_DOCUMENT_BYTES:
        _pass_over(stream, size)
        return Skipped(key, "document_too_large", f"{size} bytes, at most {MAX_DOCUMENT_BYTES}")
    data = stream.read(size)
    if len(data) < size:
        raise EOFError(f"{size - len(data)} bytes are missing")
    head, _, body = data.partition(b"\r\n\r\n")
    status, *lines = head.decode("latin-1").split("\r\n")
    fields = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    content_type = fields.get("content-type", "")
    if status.split()[1:2] != ["200"] or "html" not in content_type.lower():
        return Skipped(key, "no_html", f"{status[:40]}, {content_type[:40] or 'no type'}")
    _, semicolon, options = content_type.partition(";")
    return Document(key, body, f"text/html{semicolon}{options}")  # XHTML too: few pages are well-formed


def _pass_over(stream: IO[bytes], size: int) -> None:
    while size > 0:
        data = stream.read(min(size, 2**20))
        if not data:
            raise EOFError(f"{size} bytes are missing")
        size -= len(data)
