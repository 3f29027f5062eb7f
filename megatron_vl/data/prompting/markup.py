"""Qwen-VL's markup in a text: ``<img>PATH</img>`` is an image; ``<ref>``, ``<box>`` and ``<quad>`` are grounding.

Only a complete ``<img>PATH</img>``, without other marks in its path, is an image. A single ``<img>``, ``</img>`` or
``<imgpad>`` has no meaning. So no text can open an image span without closing it, or use a slot. Grounding marks count
individually, closed or not, as in the original, whose prompts may end in an open ``<box>``. The surface form of any
other special token is ordinary text. A text is split in its NFC form, as in the original, because a character after
``>`` can compose with it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_vl.data.prompting.coordinates import GRID
from megatron_vl.data.prompting.tasks import Piece
from megatron_vl.errors import DataError

GROUNDING = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>")
IMAGE_TAGS = ("<img>", "</img>", "<imgpad>")
_IN_PATH = rf"(?!{'|'.join(GROUNDING + IMAGE_TAGS)})."
_IMAGE = re.compile(rf"<img>((?:{_IN_PATH})*)</img>", re.DOTALL)
_GROUNDING = re.compile("|".join(GROUNDING))
_IMAGE_OR_GROUNDING = re.compile(f"{_IMAGE.pattern}|{_GROUNDING.pattern}", re.DOTALL)
_MARK = re.compile("</?(?:img|ref|box|quad)>")
_FIRST_PICTURE = re.compile(f"Picture 1: {_IMAGE.pattern}\n", re.DOTALL)
_BOX_SIZE = 4
_PARTS = ({"image"}, {"text"}, {"box"}, {"box", "ref"})


def parse_markup(text: str, *, images: bool = True) -> list[Piece]:
    """Split a text into unsupervised pieces: images with their paths, grounding marks, and plain text between them.

    Without ``images``, an image is plain text too.
    """
    text = unicodedata.normalize("NFC", text)
    pieces: list[Piece] = []
    done = 0
    for match in (_IMAGE_OR_GROUNDING if images else _GROUNDING).finditer(text):
        pieces += _plain(text[done : match.start()])
        pieces.append(Piece("special", match[0]) if match[0] in GROUNDING else Piece("image", match[1]))
        done = match.end()
    return pieces + _plain(text[done:])


def count_images(text: str) -> int:
    """Return the number of images that a text names."""
    return sum(piece.kind == "image" for piece in parse_markup(text))


def stray_image_tag(text: str) -> str | None:
    """Return the first <img>, </img> or <imgpad> that does not belong to an image, or None."""
    between = _IMAGE.split(unicodedata.normalize("NFC", text))[::2]
    return next((tag for words in between for tag in IMAGE_TAGS if tag in words), None)


def find_mark(text: str) -> str | None:
    """Return the first tag of an image or of grounding in a text, complete or not."""
    found = _MARK.search(text)
    return found and found[0]


def in_tags(text: str, tag: str) -> list[str] | None:
    """Return what stands between each ``<tag>`` and ``</tag>``; None if they do not match."""
    found: list[str] = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    return found if text.count(f"<{tag}>") == text.count(f"</{tag}>") == len(found) else None


def without_picture(text: str) -> str | None:
    """Return a text without the picture that it begins with, in the form of :func:`write_picture`.

    None if it does not begin so, or has other pictures.
    """
    first = _FIRST_PICTURE.match(text)
    rest = text[first.end() :] if first else text
    return rest if first and not count_images(rest) else None


def tagged(tag: str, text: str) -> str:
    """Write a text in tags."""
    return f"<{tag}>{text}</{tag}>"


def write_picture(number: int, path: str) -> str:
    """Write an image of a dialogue, which has ``number`` of them so far."""
    return f"Picture {number}: {tagged('img', path)}\n"


def join_parts(parts: Sequence[Any], *, images_before: int = 0) -> str:
    """Join Qwen-VL's list of parts into one text.

    A part is ``{"image": path}``, ``{"text": words}``, or ``{"box": boxes}`` with or without a ``"ref"``. A box is four
    cells from 0 to 999. An image becomes ``Picture k: <img>path</img>`` and a line end. Here k counts the images of the
    dialogue, after ``images_before`` earlier ones.

    Raises:
        DataError: A part is something else, or a path holds a mark; the message names the part.
    """
    text = ""
    for number, part in enumerate(parts, 1):
        where = f"part {number} of the text, {str(part)[:80]}"
        if not isinstance(part, Mapping) or part.keys() not in _PARTS:
            raise DataError(f"{where}: expected an object with 'image', with 'text', or with 'box' and perhaps 'ref'")
        if isinstance(part.get("image"), str):
            images_before += 1
            _check_path(part["image"], where)
            text += write_picture(images_before, part["image"])
        elif isinstance(part.get("text"), str):
            images_before += count_images(part["text"])
            text += part["text"]
        elif isinstance(part.get("box"), Sequence) and isinstance(part.get("ref", ""), str):
            text += tagged("ref", part["ref"]) if "ref" in part else ""
            text += "".join(_box(box, where) for box in part["box"])
        else:
            raise DataError(f"{where}: expected 'image' or 'text', a text, or 'box', a list, with 'ref', a text")
    return text


def _check_path(path: str, where: str) -> None:
    if not _IMAGE.fullmatch(unicodedata.normalize("NFC", tagged("img", path))):
        raise DataError(f"{where}: the path holds one of {', '.join(GROUNDING + IMAGE_TAGS)}; rename the file")


def _box(box: Any, where: str) -> str:
    cells = list(box) if isinstance(box, Sequence) else []
    if len(cells) != _BOX_SIZE or not all(type(cell) is int and 0 <= cell < GRID for cell in cells):
        raise DataError(f"{where}: a box is four integers from 0 to {GRID - 1}: x1, y1, x2, y2")
    x1, y1, x2, y2 = cells
    return tagged("box", f"({x1},{y1}),({x2},{y2})")


def _plain(text: str) -> list[Piece]:
    return [Piece("text", text)] if text else []
