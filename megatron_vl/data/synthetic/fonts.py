"""Fonts for document pages, from those on the machine. Nothing is downloaded.

English is always available: Pillow includes a font, and matplotlib's wheel (if installed) and the usual font folders
have more. Chinese needs a font of the system (Debian: fonts-noto-cjk, fonts-wqy-microhei, fonts-wqy-zenhei). Without
one there are no Chinese pages, and the generator reports it. A font is accepted only if it draws the letters of the
script, each differently and not as the box for a missing glyph.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import ImageFont

Language = Literal["en", "zh"]
LoadedFont = ImageFont.FreeTypeFont

FONT_FOLDERS = (
    "/usr/share/fonts",
    "/usr/local/share/fonts",
    "~/.fonts",
    "~/.local/share/fonts",
    "/Library/Fonts",
    "/System/Library/Fonts",
)
PREFERRED = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSansMono")
SYMBOLS = re.compile(r"^(cm[a-z]+\d+|STIX(Siz|Non)|LastResort|.*(Symbol|Math|Emoji|Icons))", re.IGNORECASE)
CHINESE = re.compile(r"CJK|wqy|Fallback|SourceHan|uming|ukai|SimSun|SimHei|PingFang|Songti|Heiti", re.IGNORECASE)
PROBE = {"en": "aegmQR38", "zh": "中文的图是"}
MISSING = "\uffff"


@dataclass(frozen=True)
class Font:
    """A font that draws a language."""

    name: str
    path: Path | None
    """Path of the font; None for the font inside Pillow."""

    def load(self, size: int) -> LoadedFont:
        """Return the font at ``size`` pixels per em."""
        if self.path is None:
            font = ImageFont.load_default(size)
            assert isinstance(font, ImageFont.FreeTypeFont), "Pillow's wheels are built with FreeType"
            return font
        return ImageFont.truetype(self.path, size, layout_engine=ImageFont.Layout.BASIC)

    def drawable(self, text: str) -> str:
        """Return ``text`` without the characters that the font lacks."""
        loaded = self.load(24)
        missing = bytes(loaded.getmask(MISSING))
        unknown = {letter for letter in set(text) if not letter.isspace() and bytes(loaded.getmask(letter)) == missing}
        return "".join(letter for letter in text if letter not in unknown)

    def load_height(self, height: int) -> LoadedFont:
        """Return the font at the size whose lines, ascender to descender, are ``height`` pixels high."""
        ascent, descent = self.load(100).getmetrics()
        return self.load(max(1, round(100 * height / (ascent + descent))))


def find_fonts(language: Language, limit: int, folders: Sequence[str] = ()) -> tuple[Font, ...]:
    """Return up to ``limit`` fonts for ``language``, in an order that depends only on the names of the fonts.

    ``folders`` are searched before the usual ones. English always gives at least one font.
    """
    found: dict[str, Font] = {"Pillow": Font("Pillow", None)} if language == "en" else {}
    files = {path.stem: path for path in reversed(list(_font_files(folders)))}
    names = [name for name in PREFERRED if name in files] if language == "en" else []
    names += sorted(set(files) - set(PREFERRED))
    for name in names:
        if len(found) >= limit:
            break
        if SYMBOLS.match(name) or bool(CHINESE.search(name)) != (language == "zh"):
            continue
        font = Font(name, files[name])
        if _draws(font, PROBE[language]):
            found[name] = font
    return tuple(found.values())[:limit]


def _font_files(folders: Sequence[str]) -> Iterator[Path]:
    """Yield font files, those of the most specific folders first."""
    places = [Path(folder).expanduser() for folder in folders]
    matplotlib = importlib.util.find_spec("matplotlib")
    if matplotlib is not None and matplotlib.origin is not None:
        places.append(Path(matplotlib.origin).parent / "mpl-data" / "fonts" / "ttf")
    places += [Path(folder).expanduser() for folder in FONT_FOLDERS]
    for place in places:
        if place.is_dir():
            yield from sorted(path for path in place.rglob("*") if path.suffix.lower() in (".ttf", ".otf", ".ttc"))


def _draws(font: Font, text: str) -> bool:
    try:
        loaded = font.load(24)
        glyphs = [bytes(loaded.getmask(letter)) for letter in [*text, MISSING]]
    except (OSError, ValueError):
        return False
    return len(set(glyphs)) == len(glyphs) and all(glyphs[:-1])
