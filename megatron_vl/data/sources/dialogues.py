"""What the dialogue formats share: a JSON array of ``{"conversations": [{"from", "value"}]}``, whoever speaks.

As in Qwen-VL's script a first turn that is not the user's is dropped, and an unknown role is an error (of the
record); the answers of a dialogue cut in mid-turn are kept up to the last one.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_vl.data.sample import Sample, Turn
from megatron_vl.data.sources.base import Json, Shard, Skipped, Source, clean_text, field, skipped
from megatron_vl.data.sources.images import require_images
from megatron_vl.data.sources.json_stream import array_shards, read_array
from megatron_vl.errors import SkipSample


@dataclass(frozen=True)
class Dialogues(Source):
    """Dialogues in a JSON array."""

    path: Path
    """The JSON file."""
    image_root: Path
    """Folder under which the paths of images are looked up."""
    language: Literal["en", "zh"] = "en"
    """Language of the dialogues."""
    records_per_shard: int = 10_000
    """Dialogues in a unit of work."""

    def shards(self) -> list[Shard]:
        require_images(self.image_root)
        return array_shards(self.path, self.records_per_shard)

    def read(self, shard: Shard) -> Iterator[Sample | Skipped]:
        for element in read_array(shard):
            key = f"{self.path.name}#{element.index}"
            try:
                yield self._sample(element.value, key)
            except SkipSample as error:
                yield skipped(key, error)

    @abstractmethod
    def _sample(self, record: Json, key: str) -> Sample:
        """The dialogue of a record; raises SkipSample."""


def dialogue_turns(record: Json, roles: Mapping[str, Literal["user", "assistant"]]) -> list[Turn]:
    """Turns from the first of the user to the last of the assistant; ``roles`` says who is who.

    Raises SkipSample.
    """
    turns: list[Turn] = []
    for item in field(record, "conversations", list):
        speaker = field(item, "from", str)
        if speaker not in roles:
            raise SkipSample("unknown_role", f"{speaker!r}, expected {' or '.join(map(repr, roles))}")
        role = roles[speaker]
        if role == "user" or turns:
            turns.append(Turn(role, clean_text(field(item, "value", str), f"value of a {role} turn")))
    while turns and turns[-1].role == "user":
        turns.pop()
    if not turns:
        raise SkipSample("no_answer", "no turn of the assistant follows one of the user")
    for before, after in itertools.pairwise(turns):
        if before.role == after.role:
            raise SkipSample("turns_out_of_order", f"two turns of {after.role!r} in a row")
    return turns
