"""Pages of text: an image and lines with quadrilaterals become an OCR sample, by the rules of the paper's A.4.

Images that are too small and pages with too few or too many characters are left out. So are pages with characters of
Latin Extended-A and -B or of the Private Use Areas. In text that was extracted from files, such characters usually come
from fonts that map them to something else. The paper published no thresholds; here they are options. Lines that are
entirely outside the page are ignored.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from PIL import Image

from megatron_vl.data.file_kinds import BYTE_ORDER_MARK
from megatron_vl.data.formats.values import clean_text
from megatron_vl.data.images.decode import encode_jpeg
from megatron_vl.data.sample import ImageRef, Region, Sample
from megatron_vl.data.sources.base import Source
from megatron_vl.data.sources.boxes import clipped_quad, shows_in_image
from megatron_vl.errors import SkipSample

Point = tuple[float, float]

LATIN_EXTENDED = re.compile("[\u0100-\u024f]")
PRIVATE_USE = re.compile("[\ue000-\uf8ff\U000f0000-\U0010ffff]")
UNMAPPED = re.compile("[\x00-\x08\x0e-\x1f\ufffd-\uffff]")
"""Characters that extraction returns if it does not know the character."""
JPEG_QUALITY = 90


@dataclass(frozen=True)
class TextLine:
    """A line of text and its quadrilateral in pixels, clockwise from the top-left corner of the text."""

    text: str
    quad: tuple[Point, Point, Point, Point]


@dataclass(frozen=True, kw_only=True)
class PageSource(Source):
    """Options of every reader of pages."""

    min_side: int = 224
    """Leave out pages whose shorter side has fewer pixels."""
    min_characters: int = 20
    """Leave out pages with fewer characters."""
    max_characters: int = 2000
    """Leave out pages with more characters."""
    latin_extended: bool = False
    """Keep pages with letters of Latin Extended-A and -B."""
    private_use: bool = False
    """Keep pages with characters of the Private Use Areas."""
    language: Literal["en", "zh"] = "en"
    """Language of the pages."""

    def page_sample(self, key: str, image: Image.Image, lines: Iterable[TextLine]) -> Sample:
        """Return the sample of a page. Raises SkipSample if a rule excludes it."""
        self.check_size(*image.size)
        regions = [region for line in lines if (region := _region(line, image.size)) is not None]
        self.check_text("".join(region.text for region in regions))
        if not regions:
            raise SkipSample("no_lines", "no line of text is on the page")
        ref = ImageRef(key, encode_jpeg(image.convert("RGB"), JPEG_QUALITY))
        text = " ".join(region.text for region in regions)
        return Sample(key, self.name, "ocr", self.language, (ref,), text=text, regions=tuple(regions))

    def check_size(self, width: float, height: float) -> None:
        """Raise SkipSample if a page of this size in pixels is too small."""
        if min(width, height) < self.min_side:
            raise SkipSample("image_too_small", f"{width:g} x {height:g} pixels, the least side is {self.min_side}")

    def check_text(self, text: str) -> None:
        """Raise SkipSample if the text of a page breaks a rule."""
        if len(text) < self.min_characters:
            raise SkipSample("too_few_characters", f"{len(text)}, at least {self.min_characters}")
        if len(text) > self.max_characters:
            raise SkipSample("too_many_characters", f"{len(text)}, at most {self.max_characters}")
        if match := UNMAPPED.search(text):
            raise SkipSample("unmapped_characters", f"U+{ord(match[0]):04X}")
        if not self.latin_extended and (match := LATIN_EXTENDED.search(text)):
            raise SkipSample("latin_extended", f"{match[0]} (U+{ord(match[0]):04X})")
        if not self.private_use and (match := PRIVATE_USE.search(text)):
            raise SkipSample("private_use", f"U+{ord(match[0]):04X}")


def _region(line: TextLine, size: tuple[int, int]) -> Region | None:
    """Return the line in fractions of the page, or None if it has no text or is not on the page."""
    text = " ".join(line.text.replace(BYTE_ORDER_MARK, "").split())
    if not text:
        return None
    if not shows_in_image(line.quad, *size):
        return None
    return Region(clean_text(text, "text of a line"), quads=(clipped_quad(line.quad, *size),))
