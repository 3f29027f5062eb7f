"""A small S3 server over a folder: a bucket is a folder in it, an object is a file. It can break connections.

It speaks as much of S3 as reading needs: HEAD and GET of an object, with Range and If-Match, and ListObjectsV2 with
pages. One key is right, and the bucket ``public`` needs none; signatures are not checked. (moto does all of S3, but
breaks no connection, and its boto3 asks for another botocore than s3fs.)
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

ACCESS_KEY = "reader"
PAGE = 3
"""Entries of a listing that one answer has."""


@dataclass
class ObjectStore:
    """What the server serves, and how it behaves; tests change it."""

    root: Path
    url: str = ""
    broken: int = 0
    """So many answers with bytes of objects end in the middle, and the connection with them."""
    marks: list[str] = field(default_factory=list)
    """Keys that end in a slash, of objects without bytes, as consoles make them for folders."""
    requests: list[str] = field(default_factory=list)
    """Method, path and range of every request."""

    @property
    def environment(self) -> dict[str, str]:
        """Variables by which s3fs finds it, with the right key, and looks for nothing elsewhere."""
        return {
            "AWS_ENDPOINT_URL": self.url, "AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": "secret",
            **ALONE,
        }  # fmt: skip


ALONE = {
    "AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": "/nonexistent", "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent", "AWS_MAX_ATTEMPTS": "1", "NO_PROXY": "*", "no_proxy": "*",
}  # fmt: skip
"""Neither files of this machine, nor a service of a cloud, nor attempts beside those of s3fs and of the package."""


@contextmanager
def serve(root: Path) -> Iterator[ObjectStore]:
    """Serve the folders in ``root`` as buckets while the block runs, on a free port of this machine."""
    store = ObjectStore(root)

    class Handler(_Handler):
        served = store

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    store.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield store
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    served: ObjectStore
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        parts = urlsplit(self.path)
        key, query = unquote(parts.path).strip("/"), {k: v[0] for k, v in parse_qs(parts.query).items()}
        self.served.requests.append(f"{self.command} {key} {self.headers.get('Range', '')}".strip())
        path = self.served.root / key
        is_known = f"Credential={ACCESS_KEY}/" in self.headers.get("Authorization", "")
        if not is_known and key.partition("/")[0] != "public":
            self._refuse(403, "AccessDenied", "no such key", with_body)
        elif not (self.served.root / key.partition("/")[0]).is_dir():
            self._refuse(404, "NoSuchBucket", "no such bucket", with_body)
        elif "list-type" in query:
            found = _listing(path, query, self.served.marks).encode()
            self._send(200, found, {"Content-Type": "application/xml"}, with_body)
        elif "/" not in key:
            self._send(200, b"", {}, with_body)
        elif not path.is_file():
            self._refuse(404, "NoSuchKey", "no such object", with_body)
        else:
            self._object(path.read_bytes(), path, with_body)

    def _object(self, content: bytes, path: Path, with_body: bool) -> None:
        tag = _tag(path)
        if self.headers.get("If-Match", tag) != tag:
            text = "At least one of the pre-conditions you specified did not hold"
            self._refuse(412, "PreconditionFailed", text, with_body)
            return
        fields = {"ETag": tag, "Last-Modified": "Sat, 28 Nov 2026 10:00:00 GMT", "Accept-Ranges": "bytes"}
        status, wanted = 200, re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted:
            first, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
            if first >= len(content):
                self._refuse(416, "InvalidRange", "behind the end", with_body)
                return
            fields["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            status, content = 206, content[first : last + 1]
        self._send(status, content, fields, with_body, may_break=True)

    def _refuse(self, status: int, code: str, text: str, with_body: bool) -> None:
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{text}</Message></Error>".encode()
        self._send(status, body, {"Content-Type": "application/xml"}, with_body)

    def _send(
        self, status: int, body: bytes, fields: dict[str, str], with_body: bool, *, may_break: bool = False
    ) -> None:
        self.send_response(status)
        for name, value in {**fields, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body and may_break and self.served.broken and len(body) > 1:
            self.served.broken -= 1
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
        elif with_body:
            self.wfile.write(body)


def _tag(path: Path) -> str:
    return f'"{hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()}"'


def _contents(key: str, path: Path | None) -> str:
    tag, size = (_tag(path), path.stat().st_size) if path else ('"0"', 0)
    return (
        f"<Contents><Key>{escape(key)}</Key><LastModified>2026-11-28T10:00:00.000Z</LastModified>"
        f"<ETag>{escape(tag)}</ETag><Size>{size}</Size>"
        "<StorageClass>STANDARD</StorageClass></Contents>"
    )


def _listing(bucket: Path, query: dict[str, str], marks: list[str]) -> str:
    """ListObjectsV2: keys, or with a delimiter also the folders at the next slash, a page at a time."""
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
    entries: dict[str, str] = {}
    files = {path.relative_to(bucket).as_posix(): path for path in bucket.rglob("*") if path.is_file()}
    for key in [*files, *marks]:
        folder, slash, _ = key.removeprefix(prefix).partition("/")
        if not key.startswith(prefix):
            continue
        if delimiter and slash:
            name = f"{prefix}{folder}/"
            entries[name] = f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>"
        else:
            entries[key] = _contents(key, files.get(key))
    names = sorted(entries)
    begin = int(query.get("continuation-token", "0"))
    page = names[begin : begin + min(PAGE, int(query.get("max-keys", "1000")))]
    more = begin + len(page) < len(names)
    following = f"<NextContinuationToken>{begin + len(page)}</NextContinuationToken>" if more else ""
    return (
        '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        f"<Name>{bucket.name}</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{len(page)}</KeyCount>"
        f"<IsTruncated>{str(more).lower()}</IsTruncated>{following}{''.join(entries[name] for name in page)}"
        "</ListBucketResult>"
    )
