"""Dialogues in Qwen-VL's own fine-tuning format: a JSON array of ``{"id", "conversations": [{"from",
"value"}]}`` between ``user`` and ``assistant``.

Images stand in the text, ``Picture 1: <img>path</img>``, boxes as ``<box>(x1,y1),(x2,y2)</box>``. The text
stays as it is; the images are read in their order.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron_vl.data.sample import Sample
from megatron_vl.data.sources.base import Json
from megatron_vl.data.sources.dialogues import Dialogues, dialogue_turns
from megatron_vl.data.sources.images import read_image
from megatron_vl.errors import SkipSample

IMAGE = re.compile(r"<img>(.*?)</img>", re.DOTALL)


@dataclass(frozen=True)
class QwenVLChat(Dialogues):
    """Dialogues in Qwen-VL's fine-tuning JSON."""

    def _sample(self, record: Json, key: str) -> Sample:
        turns = dialogue_turns(record, {"user": "user", "assistant": "assistant"})
        names: list[str] = []
        for turn in turns:
            found = IMAGE.findall(turn.text)
            if turn.text.count("<img>") != len(found) or turn.text.count("</img>") != len(found):
                raise SkipSample("unbalanced_image_tag", turn.text[:80])
            names += found
        images = tuple(read_image(self.image_root, name) for name in names)
        return Sample(key, self.name, "chat", self.language, images, turns=tuple(turns))
