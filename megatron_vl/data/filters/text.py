"""Characters, tags and irregular patterns in texts from the web."""

from __future__ import annotations

import html
import re

_LATIN = "A-Za-zªºÀ-ÖØ-öø-ÿ"
_HAN = "々〇㐀-䶿一-鿿豈-﫿\U00020000-\U0003fffd"
_FOREIGN = {
    "latin": re.compile(rf"[^\W\d_{_LATIN}]"),
    "han": re.compile(rf"[^\W\d_{_HAN}]"),
    "latin_han": re.compile(rf"[^\W\d_{_LATIN}{_HAN}Ａ-Ｚａ-ｚ]"),
}
_CHINESE = re.compile(f"[{_HAN}]")

# Characters that are emoji by default (Emoji_Presentation), and other symbols if U+FE0F follows.
_EMOJI = re.compile(
    "[\u231a\u231b\u23e9-\u23ec\u23f0\u23f3\u25fd\u25fe\u2614\u2615\u2648-\u2653\u267f\u2693\u26a1\u26aa\u26ab\u26bd"
    "\u26be\u26c4\u26c5\u26ce\u26d4\u26ea\u26f2\u26f3\u26f5\u26fa\u26fd\u2705\u270a\u270b\u2728\u274c\u274e\u2753-\u2755"
    "\u2757\u2795-\u2797\u27b0\u27bf\u2b1b\u2b1c\u2b50\u2b55"
    "\U0001f004\U0001f0cf\U0001f18e\U0001f191-\U0001f19a\U0001f1e6-\U0001f202\U0001f21a\U0001f22f\U0001f232-\U0001f23a"
    "\U0001f250\U0001f251\U0001f300-\U0001faff]|\ufe0f|\u20e3"
)

_SPECIAL_TAG = re.compile(
    r"<[A-Z][A-Z_]*>"  # Conceptual 12M writes <PERSON> for names
    r"|\[(?:UNK|CLS|SEP|PAD|MASK|BOS|EOS)\]"
    r"|<\|[^<>|]{1,40}\|>"
    r"|</?(?:img|imgpad|ref|box|quad|image|s|unk|pad)>"
)

_HTML_BLOCK = re.compile(r"<!--.*?-->|<(script|style)\b.*?</\1\s*>", re.DOTALL | re.IGNORECASE)
_HTML_TAG = re.compile(r"</?[a-zA-Z][a-zA-Z0-9:-]*(?:\s[^<>]*)?/?>|<!DOCTYPE[^<>]*>", re.IGNORECASE)

_ADDRESS = re.compile(r"(?:https?://|www\.)[^\s<>一-鿿，。）】]+")
_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u200b-\u200f\u2028-\u202e\u2060-\u2064\ufeff\ufffd]")
_REPEATED_MARK = re.compile(r"([^\w\s])\1{3,}")
_BLANKS = re.compile(r"[^\S\n]+")


def foreign_letters(text: str, letters: str) -> int:
    """Return the number of letters in scripts other than ``letters`` names ("latin", "han", "latin_han")."""
    return sum(character.isalpha() for character in _FOREIGN[letters].findall(text))


def has_chinese(text: str) -> bool:
    """Return whether there is a Chinese character."""
    return _CHINESE.search(text) is not None


def first_emoji(text: str) -> str | None:
    """Return the first emoji, or the selector that turns the character before it into one; None if there is none."""
    found = _EMOJI.search(text)
    return found[0] if found else None


def first_special_tag(text: str) -> str | None:
    """Return the first tag that replaces omitted text, or that has a meaning for a model; None if there is none."""
    found = _SPECIAL_TAG.search(text)
    return found[0] if found else None


def strip_html(text: str) -> str:
    """Return the text without tags, comments, scripts and styles. Entities are resolved twice (``&amp;lt;``)."""
    for _ in range(2):
        text = html.unescape(_HTML_TAG.sub(" ", _HTML_BLOCK.sub(" ", text)))
    return _BLANKS.sub(" ", text).strip()


def strip_irregular(text: str) -> str:
    """Return the text without URLs, control and invisible characters; reduce runs of a mark or white space to one."""
    text = _INVISIBLE.sub("", _ADDRESS.sub(" ", text))
    return _BLANKS.sub(" ", _REPEATED_MARK.sub(r"\1", text)).strip()
