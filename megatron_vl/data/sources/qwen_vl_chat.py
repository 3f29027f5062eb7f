"""Dialogues in Qwen-VL's own fine-tuning format, a JSON array of ``{"id", "conversations": [{"from", "value"}]}``.

The speakers are ``user`` and ``assistant``. Images are in the text as ``Picture 1: <img>path</img>``, boxes as
``<box>(x1,y1),(x2,y2)</box>``. The text is not changed. The images are read in their order. A dialogue with an invalid
box or quad, for example one in pixels beyond the grid, is left out. The model would learn to write boxes that cannot be
parsed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_vl.data.formats.values import Json
from megatron_vl.data.prompting.coordinates import GRID, parse_points
from megatron_vl.data.prompting.markup import in_tags
from megatron_vl.data.sample import Sample
from megatron_vl.data.sources.dialogues import Dialogues, dialogue_turns, media_of
from megatron_vl.errors import SkipSample


@dataclass(frozen=True)
class QwenVLChat(Dialogues):
    """Dialogues in Qwen-VL's fine-tuning JSON."""

    def _sample(self, record: Json, key: str) -> Sample:
        turns = dialogue_turns(record, {"user": "user", "assistant": "assistant"})
        names: list[str] = []
        for turn in turns:
            found = in_tags(turn.text, "img")
            if found is None:
                raise SkipSample("unbalanced_image_tag", turn.text[:80])
            names += found
        if len(media_of(record)) not in (0, len(names)):
            raise SkipSample("image_mismatch", f"{len(media_of(record))} images beside the turns, {len(names)} in them")
        if not names and any("<image>" in turn.text for turn in turns):
            raise SkipSample("image_mismatch", "<image> in a turn, but no <img>PATH</img>; is it LLaVA's format?")
        check_boxes("".join(turn.text for turn in turns))
        return Sample(key, self.name, "chat", self.language, self._images(record, names), turns=tuple(turns))


def check_boxes(text: str) -> None:
    """Check that each <box> of a dialogue holds two corners, each <quad> four points of the grid, and each <ref> ends.

    A user's turn may end in an open ``<box>`` that the answer closes. So ``text`` is that of all turns.

    Raises:
        SkipSample: A mark is wrong.
    """
    if (problem := _misplaced(text, "box", 2)) is not None:
        raise SkipSample("bad_box", problem)
    if (problem := _misplaced(text, "quad", 4)) is not None:
        raise SkipSample("bad_quad", problem)
    if text.count("<ref>") != text.count("</ref>"):
        raise SkipSample("unbalanced_ref", "<ref> and </ref> do not match")


def _misplaced(text: str, tag: str, num_points: int) -> str | None:
    """Return the first place in a text that is not a valid <box> or <quad>, if there is one."""
    contents = in_tags(text, tag)
    if contents is None:
        return f"<{tag}> and </{tag}> do not match"
    for content in contents:
        points = parse_points(content, num_points)
        if points is None or not _has_order(points):
            return f"{content!r:.60}; expected {num_points} points of integers from 0 to {GRID - 1}" + (
                ", top left and bottom right" if num_points == 2 else ""
            )
    return None


def _has_order(points: Sequence[float]) -> bool:
    """Return whether two corners are top left and bottom right, or a quad is more than one point.

    The two corners may be in one cell.
    """
    if len(points) == 4:
        return points[0] <= points[2] and points[1] <= points[3]
    return len(set(zip(points[::2], points[1::2], strict=True))) > 1
