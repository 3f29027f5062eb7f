"""Pages of PDF files: the rendered page and its lines of text, by PDFium (which has a permissive license).

Lines consist of PDFium's characters. A line ends where PDFium reports a line end, where the direction changes, and at a
gap wider than ``GAP`` times its height (columns, tables). The quadrilateral of a line encloses the boxes of its
characters, from ascender to descender, and is rotated with the text. PDFium's own map from the page to a bitmap
converts positions to pixels. So rotated pages, crop boxes and the upward axis need no special code here.

pdfplumber gives upright boxes, reverses text that is turned around, and does not know which text is invisible.

Invisible text (which scanners put behind their image) is left out unless it is requested. A document that cannot be
opened is one skipped record. Otherwise a record is a page.
"""

from __future__ import annotations

import ctypes
import importlib
import math
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_vl.data.formats.documents import Document, document_shards, read_documents
from megatron_vl.data.formats.shard import Shard, Skipped, skipped
from megatron_vl.data.images.decode import DEFAULT_LIMITS
from megatron_vl.data.sample import Sample
from megatron_vl.data.sources.pages import PageSource, Point, TextLine
from megatron_vl.errors import DataError, SkipSample

SUFFIXES = (".pdf",)
GAP = 1.5
POINTS_PER_INCH = 72
FINE = 2**20
"""Size of the bitmap in requests to PDFium, which answers in whole pixels."""
FAR = 1000
"""Distance in points of the positions in these requests."""
LIGATURES = str.maketrans(
    {"ﬀ": "ff", "ﬁ": "fi", "ﬂ": "fl", "ﬃ": "ffi", "ﬄ": "ffl", "ﬅ": "st", "ﬆ": "st", "\u00ad": "-"}
)
HYPHENS = (0x02, 0xFFFE)
"""Codes that PDFium returns for a hyphen that divides a word."""
INVISIBLE = (3, 7)
"""Text rendering modes that leave nothing on the page."""


@dataclass(frozen=True)
class PDF(PageSource):
    """Pages of PDF files."""

    path: Path
    """A folder of .pdf files or of zips of them, or one of these."""
    dpi: int = 96
    """Pixels per inch of the rendered pages."""
    invisible_text: bool = False
    """Include invisible text, such as that of scanned pages."""
    records_per_shard: int = 100
    """Documents in a shard."""

    def shards(self) -> list[Shard]:
        _load_pdfium()
        if self.dpi < 1:
            raise DataError(f"{self.name}: dpi is {self.dpi}, expected at least 1")
        return document_shards(self.path, SUFFIXES, self.records_per_shard)

    def read(self, shard: Shard) -> Iterator[Sample | Skipped]:
        for document in read_documents(shard, SUFFIXES):
            if isinstance(document, Skipped):
                yield document
            else:
                yield from self._pages(document)

    def _pages(self, document: Document) -> Iterator[Sample | Skipped]:
        pdfium = _load_pdfium()
        try:
            opened = pdfium.PdfDocument(document.data)
        except pdfium.PdfiumError as error:
            # PDFium's own error number may be that of an earlier document.
            if b"/Encrypt" in document.data:
                yield Skipped(document.key, "encrypted_pdf", str(error))
            else:
                yield Skipped(document.key, "unreadable_pdf", str(error))
            return
        with closing(opened):
            if not len(opened):
                yield Skipped(document.key, "unreadable_pdf", "no page")
            for number in range(len(opened)):
                key = f"{document.key}#{number + 1}"
                try:
                    yield self._page(opened, number, key)
                except pdfium.PdfiumError as error:
                    yield Skipped(key, "unreadable_pdf", str(error))
                except SkipSample as error:
                    yield skipped(key, error)

    def _page(self, opened: Any, number: int, key: str) -> Sample:
        with closing(opened[number]) as page:
            scale = self.dpi / POINTS_PER_INCH
            width, height = (max(1, math.ceil(side * scale)) for side in page.get_size())
            self.check_size(width, height)
            if width * height > DEFAULT_LIMITS.max_pixels:
                raise SkipSample("image_too_large", f"{width} x {height} pixels at {self.dpi} dpi")
            with closing(page.get_textpage()) as text:
                lines = _Lines(page, text, (width, height), self.invisible_text).read(self.max_characters)
            self.check_text("".join(line.text for line in lines))
            with closing(page.render(scale=scale, draw_annots=False)) as bitmap:
                return self.page_sample(key, bitmap.to_pil(), lines)


@dataclass
class _Line:
    """A line while its characters are collected, with coordinates ``along`` and ``across`` it in pixels."""

    direction: Point
    text: str = ""
    along: list[float] = field(default_factory=list)
    across: list[float] = field(default_factory=list)

    def place(self, corners: list[Point]) -> tuple[list[float], list[float]]:
        """Return the coordinates of the corners along and across the line."""
        u, v = self.direction
        return [x * u + y * v for x, y in corners], [y * u - x * v for x, y in corners]

    def goes_on(self, direction: Point, corners: list[Point]) -> bool:
        """Return whether a character with these corners belongs to the line."""
        if direction[0] * self.direction[0] + direction[1] * self.direction[1] < 0.99:
            return False
        along, across = self.place(corners)
        height = max(self.across) - min(self.across)
        middle = (max(across) + min(across)) / 2
        gap = min(along) - max(self.along)
        return -height <= gap <= GAP * height and min(self.across) <= middle <= max(self.across)

    def add(self, text: str, corners: list[Point]) -> None:
        """Append a character."""
        along, across = self.place(corners)
        self.text += text
        self.along += [min(along), max(along)]
        self.across += [min(across), max(across)]

    def finish(self) -> TextLine:
        """Return the line with its quadrilateral."""
        u, v = self.direction

        def point(along: float, across: float) -> Point:
            return along * u - across * v, along * v + across * u

        left, right, top, bottom = min(self.along), max(self.along), min(self.across), max(self.across)
        quad = point(left, top), point(right, top), point(right, bottom), point(left, bottom)
        text = self.text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        return TextLine(text.translate(LIGATURES), quad)


class _Lines:
    """Reader of the lines of one page."""

    def __init__(self, page: Any, text: Any, size: tuple[int, int], invisible: bool) -> None:
        self._raw = importlib.import_module("pypdfium2.raw")
        self._text, self._size, self._invisible = text, size, invisible
        origin, right, up = (self._device(page, *point) for point in ((0, 0), (FAR, 0), (0, FAR)))
        self._origin = origin
        self._right = ((right[0] - origin[0]) / FAR, (right[1] - origin[1]) / FAR)
        self._up = ((up[0] - origin[0]) / FAR, (up[1] - origin[1]) / FAR)

    def read(self, max_characters: int) -> list[TextLine]:
        """Return all lines, or the lines found so far as soon as they have more than ``max_characters``."""
        lines: list[_Line] = []
        current: _Line | None = None
        num_characters = 0
        for index in range(self._text.count_chars()):
            text = self._character(index)
            if text in ("\r", "\n"):
                current = None
            elif text.isspace():
                if current is not None:
                    current.text += " "
            elif text:
                corners, direction = self._corners(index), self._direction(index)
                if current is None or not current.goes_on(direction, corners):
                    current = _Line(direction)
                    lines.append(current)
                current.add(text, corners)
                num_characters += 1
                if num_characters > max_characters:
                    break
        return [line.finish() for line in lines]

    def _character(self, index: int) -> str:
        """Return the character, or '' if it must not be read."""
        code = self._raw.FPDFText_GetUnicode(self._text, index)
        if self._raw.FPDFText_IsGenerated(self._text, index) == 1:
            return chr(code)
        if not self._invisible:
            drawn = self._raw.FPDFText_GetTextObject(self._text, index)
            if drawn and self._raw.FPDFTextObj_GetTextRenderMode(drawn) in INVISIBLE:
                return ""
        if code in HYPHENS or self._raw.FPDFText_IsHyphen(self._text, index) == 1:
            return "-"
        unknown = code == 0 or self._raw.FPDFText_HasUnicodeMapError(self._text, index) == 1
        return "\ufffd" if unknown else chr(code)

    def _corners(self, index: int) -> list[Point]:
        """Return the corners of the character's box in pixels."""
        left, bottom, right, top = self._text.get_charbox(index, loose=True)
        return [self._pixel(x, y) for x in (left, right) for y in (bottom, top)]

    def _direction(self, index: int) -> Point:
        """Return the unit vector of the character's reading direction, in pixels."""
        matrix = self._raw.FS_MATRIX()
        if not self._raw.FPDFText_GetMatrix(self._text, index, matrix):
            return 1.0, 0.0
        x = matrix.a * self._right[0] + matrix.b * self._up[0]
        y = matrix.a * self._right[1] + matrix.b * self._up[1]
        length = math.hypot(x, y)
        return (x / length, y / length) if length else (1.0, 0.0)

    def _pixel(self, x: float, y: float) -> Point:
        return (
            self._origin[0] + x * self._right[0] + y * self._up[0],
            self._origin[1] + x * self._right[1] + y * self._up[1],
        )

    def _device(self, page: Any, x: float, y: float) -> Point:
        u, v = ctypes.c_int(), ctypes.c_int()
        self._raw.FPDF_PageToDevice(page, 0, 0, FINE, FINE, 0, x, y, u, v)
        return u.value * self._size[0] / FINE, v.value * self._size[1] / FINE


def _load_pdfium() -> Any:
    try:
        return importlib.import_module("pypdfium2")
    except ImportError as error:
        raise DataError("PDF files need pypdfium2: pip install 'megatron_vl[data]' (or pypdfium2)") from error
