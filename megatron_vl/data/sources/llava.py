"""Dialogues in LLaVA's instruction format, a JSON array of ``{"id", "image", "conversations"}``.

The speakers are ``human`` and ``gpt``. LLaVA-Instruct-150K, mix665k and other published sets have this format.

``image`` (or ``images``) is a path, a list of paths, or absent in text-only dialogues. ``<image>`` marks the place of
an image. It is replaced by Qwen-VL's ``Picture 1: <img>path</img>``. A single ``<image>`` at the end of a turn moves to
the front of the turn, as in LLaVA's own code. The referring expressions and regions of mix665k have boxes ``[0.1, 0.2,
0.3, 0.4]``, in fractions of the image padded to a square with the image in the middle. They become ``<box>`` in
thousandths of the image itself.

Four numbers in brackets are a box if all lie in [0, 1] and not all are bare digits; any notation is accepted (``0``,
``.25``, ``1e-05``). ``[0, 1, 1, 0]`` and ``[12.5, 30, 200, 100]`` are text. In uncertain cases (``[0, 0, 1, 1]``, a
number just beyond the square, several images), the dialogue is skipped as ``ambiguous_box``.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, replace

from megatron_vl.data.formats.values import NUMBER, Json
from megatron_vl.data.images.decode import check_image
from megatron_vl.data.prompting.coordinates import format_points
from megatron_vl.data.prompting.markup import find_mark, tagged, write_picture
from megatron_vl.data.sample import Sample, Turn
from megatron_vl.data.sources.boxes import box_from_corners
from megatron_vl.data.sources.dialogues import Dialogues, dialogue_turns, media_of
from megatron_vl.errors import SkipSample

PLACE = "<image>"
BOX = re.compile(rf"\[\s*({NUMBER})\s*,\s*({NUMBER})\s*,\s*({NUMBER})\s*,\s*({NUMBER})\s*\]")


@dataclass(frozen=True)
class LLaVA(Dialogues):
    """Dialogues in LLaVA's JSON."""

    convert_boxes: bool = True
    """Convert boxes of the padded square to ``<box>`` of the image."""

    def _sample(self, record: Json, key: str) -> Sample:
        turns = dialogue_turns(record, {"human": "user", "gpt": "assistant"})
        if mark := find_mark("".join(turn.text for turn in turns)):
            raise SkipSample("markup_in_text", f"{mark} would be taken for markup of ours")
        names = _image_names(record)
        places = sum(turn.text.count(PLACE) for turn in turns)
        if places != len(names):
            raise SkipSample("image_mismatch", f"{places} times {PLACE}, but {len(names)} images")
        images = self._images(record, names)
        if self.convert_boxes and images and any(_is_box(match) for turn in turns for match in BOX.finditer(turn.text)):
            if len(images) > 1:
                raise SkipSample("ambiguous_box", f"a box, but {len(images)} images")
            size = check_image(self.settle(images[0]).data)
            turns = [replace(turn, text=_with_boxes(turn.text, size)) for turn in turns]
        return Sample(key, self.name, "chat", self.language, images, turns=_with_pictures(turns, names))


def _image_names(record: Json) -> list[str]:
    names = media_of(record)
    if not all(isinstance(name, str) for name in names):
        raise SkipSample("wrong_field", f"'image' is {names!r:.60}, expected a path or a list of paths")
    return names


def _with_pictures(turns: list[Turn], names: list[str]) -> tuple[Turn, ...]:
    """Replace the marks by Qwen-VL's picture lines, numbered through the dialogue."""
    pictures = itertools.starmap(write_picture, enumerate(names, start=1))
    found = []
    for turn in turns:
        text = turn.text
        if text.endswith(PLACE) and len(names) == 1:
            text = PLACE + "\n" + text.removesuffix(PLACE).rstrip()
        text = re.sub(rf"{PLACE}\n?", lambda mark: next(pictures), text)
        found.append(replace(turn, text=text))
    return tuple(found)


def _is_box(match: re.Match[str]) -> bool:
    """Return whether four numbers are a box of the padded square. Raises SkipSample('ambiguous_box') in doubt."""
    numbers = [float(number) for number in match.groups()]
    if all(number.isdecimal() for number in match.groups()):
        if numbers == [0, 0, 1, 1]:
            raise SkipSample("ambiguous_box", f"{match[0]}: the whole image, or a list? write [0.0, 0.0, 1.0, 1.0]")
        return False
    if all(0 <= number <= 1 for number in numbers):
        return True
    if all(-1 <= number <= 2 for number in numbers):
        raise SkipSample("ambiguous_box", f"{match[0]}: a box beyond the padded square, or no box?")
    return False


def _with_boxes(text: str, size: tuple[int, int]) -> str:
    width, height = size
    side = max(size)
    left, top = (side - width) // 2, (side - height) // 2

    def box(match: re.Match[str]) -> str:
        if not _is_box(match):
            return match[0]
        x1, y1, x2, y2 = (float(number) * side for number in match.groups())
        corners = box_from_corners((x1 - left, y1 - top, x2 - left, y2 - top), width, height)
        return tagged("box", format_points(corners))

    return BOX.sub(box, text)
