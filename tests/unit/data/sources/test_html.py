"""HTML pages: lines lie where Chromium draws them, nothing is loaded and nothing runs; crawls in WARC files.

What needs the browser is skipped where none is installed (Debian: apt-get install chromium).
"""

from __future__ import annotations

import gzip
import http.server
import io
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from megatron_vl.data.formats import documents
from megatron_vl.data.formats.chromium import NAMES, Browser, BrowserGone, find_browser
from megatron_vl.data.formats.documents import Document
from megatron_vl.data.formats.shard import Skipped
from megatron_vl.data.formats.warc import read_warc
from megatron_vl.data.sample import Sample
from megatron_vl.data.sources.html import HTML
from megatron_vl.errors import DataError
from tests.helpers.data.reading import kept, read_all, reasons

needs_browser = pytest.mark.skipif(
    not any(map(shutil.which, NAMES)), reason="no Chromium on this machine (Debian: apt-get install chromium)"
)

PAGE = """<!doctype html><html><head><meta charset="utf-8"><style>body {font: 20px serif; width: 500px}</style></head>
<body><h1>Annual Report</h1>
<p>The survey covered <b>twelve</b> villages, and this paragraph is long enough to need a second line.</p>
<table><tr><td>left cell</td><td style="padding-left: 80px">right cell</td></tr></table>
<p style="text-transform: uppercase">upper case</p><pre>two
lines</pre><p>été 1987</p></body></html>"""


def pages(folder: Path, *texts: str | bytes) -> HTML:
    for number, text in enumerate(texts):
        (folder / f"{number:02d}.html").write_bytes(text if isinstance(text, bytes) else text.encode())
    return HTML("html", folder, min_characters=4)


def lines(sample: Sample) -> list[str]:
    return [region.text for region in sample.regions]


def check_ink(sample: Sample) -> None:
    """Every box holds ink, and no ink is outside of them."""
    image = Image.open(io.BytesIO(sample.images[0].data)).convert("L")
    outside = np.asarray(image) < 128
    for region in sample.regions:
        mask = Image.new("1", image.size)
        quad = np.array(region.quads[0]).reshape(4, 2) * image.size
        ImageDraw.Draw(mask).polygon([tuple(point) for point in quad], fill=1)
        assert (np.asarray(image)[np.asarray(mask)] < 128).mean() > 0.02, region.text
        outside &= np.asarray(mask.convert("L").filter(ImageFilter.MaxFilter(5))) == 0  # rounded to whole pixels
    assert outside.sum() == 0


@needs_browser
def test_a_page_gives_its_lines_where_they_are_drawn(tmp_path: Path) -> None:
    (sample,) = kept(read_all(pages(tmp_path, PAGE)))
    found = lines(sample)
    assert found[0] == "Annual Report" and found[-6:] == [
        "left cell", "right cell", "UPPER CASE", "two", "lines", "été 1987"
    ]  # fmt: skip
    paragraph = found[1:-6]
    assert len(paragraph) == 2 and paragraph[0].startswith("The survey covered twelve villages, and")
    assert " ".join(paragraph).endswith("long enough to need a second line.")
    assert (sample.task, sample.key, sample.images[0].key) == ("ocr", "00.html", "00.html")
    image = Image.open(io.BytesIO(sample.images[0].data))
    assert image.width == 1024 and 500 < image.height < 700
    check_ink(sample)
    assert read_all(HTML("html", tmp_path, min_characters=4)) == [sample], "another browser draws the same bytes"


@needs_browser
def test_text_that_is_not_seen_is_not_read(tmp_path: Path) -> None:
    body = """<body style="margin: 0"><p>visible</p><p style="display: none">gone</p>
    <p style="visibility: hidden">no</p><p style="pointer-events: none">no <i style="display: contents">mouse</i></p>
    <p style="opacity: 0">ghost</p><p style="position: absolute; left: -9999px">off</p>
    <p style="position: absolute; top: 1435px">cut by the edge</p>
    <div style="height: 20px; overflow: hidden"><p style="margin: 40px">clipped</p></div>
    <p style="position: absolute; top: 300px">under the banner</p>
    <div style="position: absolute; top: 250px; height: 200px; width: 900px; background: #fff">banner</div>
    <script>document.write("<p>script</p>")</script><noscript>no script</noscript>
    <p style="position: absolute; top: 3000px">below the picture</p></body>"""
    (sample,) = kept(read_all(pages(tmp_path, body)))
    assert sorted(lines(sample)) == ["banner", "no mouse", "no script", "visible"]
    assert Image.open(io.BytesIO(sample.images[0].data)).height == 1448


class _Counter(http.server.BaseHTTPRequestHandler):
    asked: list[str] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<p>loaded from outside</p>")

    def log_message(self, *arguments: object) -> None:
        """Quiet."""


@pytest.fixture
def server() -> Iterator[str]:
    _Counter.asked.clear()
    with http.server.HTTPServer(("127.0.0.1", 0), _Counter) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


@needs_browser
def test_nothing_is_loaded_and_nothing_runs(tmp_path: Path, server: str) -> None:
    secret = tmp_path / "secret.html"
    secret.write_text("<p>secret words</p>")
    body = f"""<head><base href="{server}/"><link rel="preconnect" href="{server}"><link rel=stylesheet href="a.css">
    <link rel="prefetch" href="{server}/b"><link rel="icon" href="{server}/c.ico">
    <meta http-equiv="refresh" content="0; url={server}/d"><script src="{server}/e.js"></script>
    <style>@import url("{server}/f.css"); @font-face {{font-family: x; src: url("{server}/g.woff")}}
    p {{font-family: x, serif; background: url("{server}/h.png")}}</style></head>
    <body onload="fetch('{server}/i')"><p>only this</p><img src="j.png"><iframe src="{server}/k"></iframe>
    <iframe src="file://{secret}"></iframe><object data="file://{secret}"></object><video src="l.mp4" autoplay></video>
    <script>fetch("{server}/m"); new WebSocket("{server.replace("http", "ws")}/n"); document.body.append("ran")</script>
    </body>"""
    sample, other = read_all(pages(_folder(tmp_path), body, PAGE))
    assert isinstance(sample, Sample) and lines(sample) == ["only this"]
    assert isinstance(other, Sample) and lines(other)[0] == "Annual Report"
    assert _Counter.asked == []


def _folder(parent: Path) -> Path:
    (parent / "pages").mkdir()
    return parent / "pages"


@needs_browser
def test_the_rules_of_pages_and_odd_pages(tmp_path: Path) -> None:
    utf8 = "<meta charset=utf-8>"
    odd = {
        b"": "too_few_characters",
        b"<p>\xe9t\xe9 latin</p>": "été latin",
        "<p>café</p>".encode("utf-8-sig"): "café",
        b"<p>" * 5000 + b"deep": "deep",
        b"<frameset><frame src=x></frameset>": "too_few_characters",
        b"<svg><text y=20>picture</text></svg>": "picture",
        b'<meta http-equiv=refresh content="0; url=https://page.invalid/"><p>again': "again",
        f"{utf8}<p>Łódź city</p>".encode(): "latin_extended",
        f"{utf8}<p>\ue000 private</p>".encode(): "private_use",
        f"{utf8}<p>\ufffd unknown</p>".encode(): "unmapped_characters",
        b"<p>" + b"word " * 2000: "too_many_characters",
    }
    items = read_all(pages(tmp_path, *odd))
    assert [item.text if isinstance(item, Sample) else item.reason for item in items] == list(odd.values())
    assert reasons(read_all(HTML("h", tmp_path, min_side=2000))) == {"image_too_small": len(odd)}


@needs_browser
def test_text_without_a_font_is_named(tmp_path: Path) -> None:
    (item,) = read_all(pages(tmp_path, "<meta charset=utf-8><p>private tofu: \U000e0f00\U0003fff0</p>"))
    assert isinstance(item, Skipped) and item.reason == "missing_font"


@needs_browser
def test_a_page_that_does_not_end_costs_one_record(tmp_path: Path) -> None:
    source = pages(tmp_path, PAGE, PAGE)
    slow = HTML("h", tmp_path, page_seconds=0.001)
    assert reasons(read_all(slow)) == {"unrendered_page": 2}
    assert len(kept(read_all(source))) == 2


@needs_browser
def test_a_browser_that_is_killed_is_named_and_ended(tmp_path: Path) -> None:
    with Browser(find_browser()) as browser:
        assert browser.call("Browser.getVersion")["product"]
        assert [*Path(browser._profile).glob("*/SingletonSocket")], "its temporary files go with its profile"
        os.killpg(browser._pid, signal.SIGKILL)
        with pytest.raises(BrowserGone, match="the browser ended"):
            browser.call("Browser.getVersion")
    assert not Path(browser._profile).exists()


@needs_browser
def test_a_browser_starts_where_paths_are_too_long_for_sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ("long" * 20)).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("long" * 20)))
    with Browser(find_browser()) as browser:
        assert browser.call("Browser.getVersion")["product"]


def test_without_a_browser_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="no-such-program was not found: install it .Debian: apt-get install chromium"):
        HTML("h", tmp_path, browser="no-such-program").shards()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(DataError, match="chromium, chromium-browser, google-chrome"):
        HTML("h", tmp_path).shards()


def test_a_program_that_is_no_browser_is_refused(tmp_path: Path) -> None:
    pages(tmp_path, PAGE)
    with pytest.raises(DataError, match=r"does not start \(the browser ended\)"):
        read_all(HTML("h", tmp_path, browser="/bin/true"))


# WARC files


def record(kind: str, body: bytes, uri: str = "https://s.ex/a", size: int | None = None) -> bytes:
    length = len(body) if size is None else size
    head = f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: {uri}\r\nContent-Length: {length}\r\n\r\n"
    return gzip.compress(head.encode() + body + b"\r\n\r\n", mtime=0)


def response(body: bytes, status: str = "200 OK", kind: str = "text/html; charset=ISO-8859-1") -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nX-Crawl-Content-Encoding: gzip\r\n\r\n".encode()
    return record("response", head + body)


CRAWL = (
    record("warcinfo", b"isPartOf: CC-MAIN-2021-31\r\n")
    + record("request", b"GET /a HTTP/1.1\r\n\r\n")
    + response(b"<p>\xe9t\xe9 au village</p>")
    + record("metadata", b"fetchTimeMs: 5\r\n")
    + response(b"x", status="404 Not Found")
    + response(b"%PDF", kind="application/pdf")
    + response(b"<p>second page</p>", kind="application/xhtml+xml")
)


def test_a_warc_gives_its_html_responses(tmp_path: Path) -> None:
    path = tmp_path / "CC-MAIN-00000.warc.gz"
    path.write_bytes(CRAWL)
    found = list(read_warc(path))
    assert [(item.key, item.data, item.content_type) for item in found if isinstance(item, Document)] == [
        (f"{path.name}#3 https://s.ex/a", b"<p>\xe9t\xe9 au village</p>", "text/html; charset=ISO-8859-1"),
        (f"{path.name}#7 https://s.ex/a", b"<p>second page</p>", "text/html"),
    ]
    assert [(item.reason, item.detail) for item in found if isinstance(item, Skipped)] == [
        ("no_html", "HTTP/1.1 404 Not Found, text/html; charset=ISO-8859-1"),
        ("no_html", "HTTP/1.1 200 OK, application/pdf"),
    ]
    (tmp_path / "b.warc").write_bytes(gzip.decompress(CRAWL))
    assert len(list(read_warc(tmp_path / "b.warc"))) == 4


@pytest.mark.parametrize(
    ("fields", "body", "encoded"),
    [
        ("", gzip.compress(b"<p>a</p>", mtime=0), True),
        ("Content-Encoding: gzip", gzip.compress(b"<p>a</p>", mtime=0), True),
        ("Content-Encoding: gzip", b"<p>a</p>", False),
        ("Transfer-Encoding: chunked", b"8\r\n<p>a</p>\r\n0\r\n\r\n", True),
        ("Transfer-Encoding: chunked", b"<p>a</p>", False),
        ("Content-Encoding: br", b"\x8b\x03\x80\x00\x01", True),
        ("Content-Encoding: br", b"<p>a</p>", False),
    ],
)
def test_encoded_bodies_of_a_warc_are_not_pages(tmp_path: Path, fields: str, body: bytes, encoded: bool) -> None:
    head = f"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n{fields}\r\n\r\n".replace("\r\n\r\n\r\n", "\r\n\r\n")
    (tmp_path / "a.warc").write_bytes(gzip.decompress(record("response", head.encode() + body)))
    (item,) = read_warc(tmp_path / "a.warc")
    assert (isinstance(item, Skipped) and item.reason == "encoded_body") == encoded


@pytest.mark.parametrize("cut", range(1, len(CRAWL), 61))
def test_a_warc_cut_anywhere_keeps_what_came_before(tmp_path: Path, cut: int) -> None:
    (tmp_path / "a.warc.gz").write_bytes(CRAWL[:cut])
    *before, last = read_warc(tmp_path / "a.warc.gz")
    whole = [len(CRAWL) - len(rest) for rest in CRAWL.split(b"\x1f\x8b")[1:]]
    assert isinstance(last, Skipped) or cut in whole or last.data
    assert all(isinstance(item, Document) or item.reason == "no_html" for item in before)


@pytest.mark.parametrize(
    "data",
    [
        b"no gzip",
        gzip.compress(b"no warc", mtime=0),
        record("response", b"x", size=-1),
        record("response", b"x", size=99),
    ],
)
def test_other_files_are_counted_and_named(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.warc.gz").write_bytes(data)
    (item,) = [item for item in read_warc(tmp_path / "a.warc.gz") if isinstance(item, Skipped)][-1:]
    assert item.reason in ("truncated_warc", "document_too_large")


def test_a_page_above_the_cap_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_vl.data.formats.warc.MAX_DOCUMENT_BYTES", 150)
    (tmp_path / "a.warc.gz").write_bytes(response(b"y" * 200) + response(b"<p>small</p>"))
    first, second = read_warc(tmp_path / "a.warc.gz")
    assert isinstance(first, Skipped) and first.reason == "document_too_large"
    assert isinstance(second, Document) and second.data == b"<p>small</p>"
    assert documents.MAX_DOCUMENT_BYTES > 2**20


@needs_browser
def test_pages_of_a_crawl_are_rendered_in_the_servers_charset(tmp_path: Path) -> None:
    (tmp_path / "CC-MAIN-00000.warc.gz").write_bytes(CRAWL)
    for path in (tmp_path, tmp_path / "CC-MAIN-00000.warc.gz"):
        source = HTML("cc", path, min_characters=4)
        assert [shard.name for shard in source.shards()] == ["CC-MAIN-00000.warc.gz"]
        items = read_all(source)
        assert [sample.text for sample in kept(items)] == ["été au village", "second page"]
        assert reasons(items) == {"no_html": 2}
