"""Convert bytes of a row to text in which every character is visible.

Bytes that are no UTF-8 (a character cut by packing, a broken document) become marks of their own. So do characters that
do not show, reorder their neighbors or only resemble a blank. ``printable`` does the same for names and keys, where a
plain string is needed.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from dataclasses import dataclass
from typing import Literal

Kind = Literal["plain", "space", "newline", "tab", "control", "byte"]

_HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs")
"""Unicode categories of characters that are invisible, or cannot be told from a blank."""
_ODD_SPACES = re.compile(r"^ +| +$| {2,}")
_MAX_NAME = 200


@dataclass(frozen=True)
class Mark:
    """Consecutive visible characters, or one character that needs a sign to be seen."""

    kind: Kind
    text: str
    """The text of the row; for ``control`` its code point and for ``byte`` its hexadecimal value instead."""


def make_marks(data: bytes) -> tuple[Mark, ...]:
    """Split bytes into marks. Blanks count as ``space`` only at either end and where there are several."""
    text = data.decode("utf-8", errors="surrogateescape")
    odd = {position for match in _ODD_SPACES.finditer(text) for position in range(*match.span())}
    kinds = ["space" if position in odd else _kind(character) for position, character in enumerate(text)]
    marks: list[Mark] = []
    for kind, group in itertools.groupby(zip(kinds, text, strict=True), key=lambda pair: pair[0]):
        characters = [character for _, character in group]
        marks += [Mark("plain", "".join(characters))] if kind == "plain" else [_mark(kind, c) for c in characters]
    return tuple(marks)


def printable(text: str) -> str:
    """Return a name or key on one line, with escapes for invisible or unencodable characters; cut very long ones."""
    shown = "".join(c if _kind(c) == "plain" else f"\\u{ord(c):04x}" for c in text[: _MAX_NAME + 1])
    return shown if len(text) <= _MAX_NAME else f"{shown[:_MAX_NAME]}…"


def _kind(character: str) -> Kind:
    if " " <= character <= "~":
        return "plain"
    if character == "\n":
        return "newline"
    if character == "\t":
        return "tab"
    if "\udc80" <= character <= "\udcff":
        return "byte"
    return "control" if unicodedata.category(character) in _HIDDEN else "plain"


def _mark(kind: Kind, character: str) -> Mark:
    if kind == "control":
        return Mark(kind, f"U+{ord(character):04X}")
    return Mark(kind, f"{ord(character) - 0xDC00:02X}") if kind == "byte" else Mark(kind, character)
