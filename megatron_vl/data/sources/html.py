"""HTML pages, laid out and rendered by a headless Chromium, with the box of every line of text.

Pages come as .html files, in folders or zips, or as the responses in Common Crawl's .warc.gz. Only the page itself is
loaded, nothing that it refers to (:mod:`megatron_vl.data.formats.chromium`). The image is its first ``max_height``
pixels. A record is a page.

Lines are found from the rectangle of each character. Characters of one block at one height, without a wide gap, form a
line. Lines that are hidden, covered, out of view or cut by the edge are left out. Pages are rendered with the installed
fonts, so the same file may give other pixels on another machine. A page with a character that no font has is left out.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from megatron_vl.data.formats.chromium import Browser, BrowserGone, Page, find_browser
from megatron_vl.data.formats.documents import Document, document_shards, read_documents
from megatron_vl.data.formats.shard import Shard, Skipped, skipped
from megatron_vl.data.formats.warc import WARC_SUFFIXES, read_warc
from megatron_vl.data.sample import Sample
from megatron_vl.data.sources.pages import PageSource, TextLine
from megatron_vl.errors import DataError, SkipSample

SUFFIXES = (".html", ".htm")
VIEW_HEIGHT = 600
"""Height of the view in which a page is loaded. A shorter page leaves the rest blank."""
LINES = """
(limit => {
  const lines = [], range = document.createRange();
  const walker = document.createTreeWalker(document.body || document.documentElement, NodeFilter.SHOW_TEXT);
  const blockOf = element => {
    while (element.parentElement && ["inline", "contents"].includes(getComputedStyle(element).display))
      element = element.parentElement;
    return element;
  };
  const written = (text, before, transform) =>
    transform === "uppercase" ? text.toUpperCase() : transform === "lowercase" ? text.toLowerCase()
    : transform === "capitalize" && !/[\\p{L}\\p{N}]/u.test(before) ? text.toUpperCase() : text;
  const boxOf = element => {
    while (element.parentElement && getComputedStyle(element).display === "contents") element = element.parentElement;
    return element;
  };
  const all = document.createElement("style");
  all.textContent = "* {pointer-events: auto !important}";
  document.documentElement.append(all);
  let line = null, count = 0;
  while (walker.nextNode() && count <= limit) {
    const node = walker.currentNode, element = node.parentElement;
    if (!node.data.trim() && !line) continue;
    const shown = boxOf(element), block = blockOf(element), style = getComputedStyle(element);
    if (!shown.checkVisibility({opacityProperty: true, visibilityProperty: true})) continue;
    let start = 0, before = "";
    for (const text of node.data) {
      range.setStart(node, start);
      range.setEnd(node, start += text.length);
      if (/\\s/.test(text)) {
        if (line) line.text += " ";
      } else {
        const box = [...range.getClientRects()].find(rect => rect.width > 0 && rect.height > 0);
        const middle = box && (box.top + box.bottom) / 2;
        if (box && shown.contains(document.elementFromPoint((box.left + box.right) / 2, middle))) {
          const goesOn = line && line.block === block && middle > line.top && middle < line.bottom
            && box.left - line.right < 1.5 * box.height && box.left > line.left;
          if (!goesOn) lines.push(line = {block, text: "", left: 1e9, top: 1e9, right: -1e9, bottom: -1e9});
          line.text += written(text, before, style.textTransform);
          line.left = Math.min(line.left, box.left);
          line.top = Math.min(line.top, box.top);
          line.right = Math.max(line.right, box.right);
          line.bottom = Math.max(line.bottom, box.bottom);
          count++;
        }
      }
      before = text;
    }
  }
  return lines.map(line => [line.text, line.left, line.top, line.right, line.bottom]);
})
"""
MISSING = """
(text => {
  const canvas = new OffscreenCanvas(24, 24).getContext("2d", {willReadFrequently: true});
  canvas.font = "16px serif";
  const drawn = letter => {
    canvas.clearRect(0, 0, 24, 24);
    canvas.fillText(letter, 2, 18);
    return canvas.getImageData(0, 0, 24, 24).data.join();
  };
  const box = drawn("\uffff");
  return [...new Set(text)].find(letter => letter > "\u02ff" && drawn(letter) === box) || "";
})
"""
HEIGHT = "Math.ceil(Math.max(document.documentElement.scrollHeight, document.body ? document.body.scrollHeight : 0))"


@dataclass(frozen=True)
class HTML(PageSource):
    """Rendered HTML pages."""

    path: Path
    """A folder of .html, .warc or .warc.gz files or of zips of .html files, or one of these."""
    width: int = 1024
    """Width of the view in pixels."""
    max_height: int = 1448
    """Greatest height of the image in pixels. The page is cut off below it."""
    browser: str = ""
    """Program to run. By default, the first Chromium or Chrome that is found."""
    page_seconds: float = 30.0
    """Time limit per page in seconds. A page that takes longer is left out."""
    records_per_shard: int = 500
    """Pages in a shard (a WARC file is one shard)."""

    def shards(self) -> list[Shard]:
        find_browser(self.browser)
        if min(self.width, self.max_height) < 1 or self.page_seconds <= 0:
            raise DataError(f"{self.name}: width, max_height and page_seconds must be above 0")
        return document_shards(self.path, SUFFIXES, self.records_per_shard, WARC_SUFFIXES)

    def read(self, shard: Shard) -> Iterator[Sample | Skipped]:
        warc = shard.path.name.endswith(WARC_SUFFIXES)
        documents = read_warc(shard.path) if warc else read_documents(shard, SUFFIXES)
        with _Renderer(find_browser(self.browser)) as renderer:
            for document in documents:
                if isinstance(document, Skipped):
                    yield document
                    continue
                try:
                    yield self._sample(document, renderer)
                except SkipSample as error:
                    yield skipped(document.key, error)

    def _sample(self, document: Document, renderer: _Renderer) -> Sample:
        png, lines = renderer.render(document, self)
        with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
            return self.page_sample(document.key, image, lines)

    def look(self, page: Page) -> tuple[bytes, list[TextLine]]:
        """Return the picture and the lines of a loaded page."""
        height = min(max(int(page.evaluate(HEIGHT)), 1), self.max_height)
        self.check_size(self.width, height)
        page.resize(self.width, height)
        found = page.evaluate(f"{LINES}({self.max_characters})")
        text = "".join(entry[0].strip() for entry in found)
        self.check_text(text)
        if missing := page.evaluate(f"{MISSING}({json.dumps(text)})"):
            raise SkipSample("missing_font", f"no font draws {missing} (Debian: fonts-noto-cjk, fonts-noto-core)")
        lines = [_line(*entry) for entry in found if _inside(entry[1:], self.width, height)]
        return page.screenshot(), lines


class _Renderer:
    """A browser that is started when it is needed, and again when it has ended."""

    def __init__(self, program: str) -> None:
        self._program = program
        self._stack = ExitStack()
        self._browser: Browser | None = None

    def __enter__(self) -> _Renderer:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def render(self, document: Document, source: HTML) -> tuple[bytes, list[TextLine]]:
        """Return the picture and the lines of a document. Raises SkipSample."""
        if self._browser is None:
            self._browser = self._stack.enter_context(Browser(self._program))
            self._check_start()
        view = source.width, min(VIEW_HEIGHT, source.max_height)
        try:
            with self._browser.page(document.data, document.content_type, view, source.page_seconds) as page:
                return source.look(page)
        except BrowserGone as error:
            self._browser = None
            self._stack.close()
            raise SkipSample("unrendered_page", str(error)) from error

    def _check_start(self) -> None:
        assert self._browser is not None
        try:
            self._browser.call("Browser.getVersion")
        except BrowserGone as error:
            raise DataError(
                f"{self._program}: does not start ({error}); try it on the command line: {self._program} --headless "
                "--dump-dom about:blank"
            ) from error


def _inside(box: list[float], width: int, height: int) -> bool:
    left, top, right, bottom = box
    return left >= -0.5 and top >= -0.5 and right <= width + 0.5 and bottom <= height + 0.5


def _line(text: str, *box: Any) -> TextLine:
    left, top, right, bottom = (float(value) for value in box)
    return TextLine(text, ((left, top), (right, top), (right, bottom), (left, bottom)))
