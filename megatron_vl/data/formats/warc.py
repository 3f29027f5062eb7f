"""Responses of a web crawl in WARC files as published by Common Crawl (.warc.gz, one gzip member per record).

Only HTML responses are pages. Requests, metadata and crawl information are ignored. A response of another status or
type is a skipped record. So is one whose body is still compressed or in chunks, as crawlers other than Common Crawl
store it: shown as a page, it would be read as noise. A truncated or damaged file gives the pages before the damage, and
one more skipped record that reports it.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

from megatron_vl.data.formats.documents import MAX_DOCUMENT_BYTES, Document
from megatron_vl.data.formats.shard import Skipped, require_file

WARC_SUFFIXES = (".warc", ".warc.gz")
MAX_HEADER_BYTES = 2**16
BLANK_LINES = (b"\r\n", b"\n")
_GZIP = b"\x1f\x8b"
_CHUNK = re.compile(rb"[0-9a-fA-F]{1,8}(?:;[^\r\n]*)?\r\n")
_PROBED_BYTES = 1024


def read_warc(path: Path) -> Iterator[Document | Skipped]:
    """Yield the HTML pages of a WARC file by address, with ``Skipped`` for other responses. Raises DataError."""
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
    """Return the header of the next record, or None at the end of the file. Raises ValueError."""
    line = stream.readline(MAX_HEADER_BYTES)
    while line in BLANK_LINES:
        line = stream.readline(MAX_HEADER_BYTES)
    if not line:
        return None
    if not line.startswith(b"WARC/"):
        raise ValueError(f"found {line[:20]!r}, expected the header of a record")
    return _fields(stream)


def _fields(stream: IO[bytes]) -> dict[str, str]:
    """Return the header fields up to the blank line, with names in lower case."""
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
    if _is_encoded(body, fields):
        return Skipped(
            key, "encoded_body", "compressed, or in chunks; expected the decoded body, as Common Crawl stores it"
        )
    _, semicolon, options = content_type.partition(";")
    return Document(key, body, f"text/html{semicolon}{options}")  # also for XHTML, because few pages are well-formed


def _is_encoded(body: bytes, fields: dict[str, str]) -> bool:
    """Return whether a body is encoded. Old files of Common Crawl keep the fields of bodies that they have decoded."""
    if body.startswith(_GZIP):
        return True
    if "chunked" in fields.get("transfer-encoding", "").lower():
        return _CHUNK.match(body) is not None
    coding = fields.get("content-encoding", "identity").lower()
    return coding in ("br", "deflate", "zstd") and b"<" not in body[:_PROBED_BYTES]


def _pass_over(stream: IO[bytes], size: int) -> None:
    while size > 0:
        data = stream.read(min(size, 2**20))
        if not data:
            raise EOFError(f"{size} bytes are missing")
        size -= len(data)
