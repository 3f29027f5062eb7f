"""Dialogues in Qwen-VL's own fine-tuning format: a JSON array of ``{"id", "conversations": [{"from",
"value"}]}``.

Images stand in the text, ``Picture 1: <img>path</img>``, boxes as ``<box>(x1,y1),(x2,y2)</box>``. The text
stays as it is; the images are read in their order. As in the original script a first turn that is not the
user's is dropped, and an unknown role is an error (of the record); the answers of a dialogue cut in mid-turn
are kept up to the last one.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_vl.data.sample import Sample, Turn
from megatron_vl.data.sources.base import (
    Json,
    Shard,
    Skipped,
    Source,
    clean_text,
    field,
    load_json,
    range_shards,
    require_folder,
    skipped,
    slice_of,
)
from megatron_vl.data.sources.images import read_image
from megatron_vl.errors import SkipSample

IMAGE = re.compile(r"<img>(.*?)</img>", re.DOTALL)


@dataclass(frozen=True)
class QwenVLChat(Source):
    """Dialogues in Qwen-VL's fine-tuning JSON."""

    path: Path
    """The JSON file."""
    image_root: Path
    """Folder under which the paths in <img> are looked up."""
    language: Literal["en", "zh"] = "en"
    """Language of the dialogues."""
    records_per_shard: int = 100_000
    """Dialogues in a unit of work; each unit parses the file."""

    def shards(self) -> list[Shard]:
        require_folder(self.image_root, "the folder of the images (image_root)")
        return range_shards(self.path, len(load_json(self.path, list)), self.records_per_shard)

    def read(self, shard: Shard) -> Iterator[Sample | Skipped]:
        for index, record in slice_of(load_json(self.path, list), shard):
            key = f"{self.path.name}#{index}"
            try:
                yield self._sample(record, key)
            except SkipSample as error:
                yield skipped(key, error)

    def _sample(self, record: Json, key: str) -> Sample:
        turns = _turns(field(record, "conversations", list))
        names = []
        for turn in turns:
            found = IMAGE.findall(turn.text)
            if turn.text.count("<img>") != len(found) or turn.text.count("</img>") != len(found):
                raise SkipSample("unbalanced_image_tag", turn.text[:80])
            names += found
        images = tuple(read_image(self.image_root, name) for name in names)
        return Sample(key, self.name, "chat", self.language, images, turns=turns)


def _turns(conversation: list[Any]) -> tuple[Turn, ...]:
    """Turns from the first of the user to the last of the assistant; raises SkipSample."""
    turns: list[Turn] = []
    for item in conversation:
        role = field(item, "from", str)
        if role != "user" and role != "assistant":
            raise SkipSample("unknown_role", f"{role!r}, expected 'user' or 'assistant'")
        if role == "user" or turns:
            turns.append(Turn(role, clean_text(field(item, "value", str), f"value of a {role} turn")))
    while turns and turns[-1].role == "user":
        turns.pop()
    if not turns:
        raise SkipSample("no_answer", "no turn of the assistant follows one of the user")
    for before, after in itertools.pairwise(turns):
        if before.role == after.role:
            raise SkipSample("turns_out_of_order", f"two turns of {after.role!r} in a row")
    return tuple(turns)
