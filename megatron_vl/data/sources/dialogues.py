"""Common code of the dialogue formats: a JSON array (or JSON Lines) of ``{"conversations": [{"from", "value"}]}``.

As in Qwen-VL's script, a first turn that is not the user's is dropped. An unknown role makes the record invalid. If a
dialogue ends with a user turn, it is kept up to the last answer. The system turn is before the others (``"from":
"system"``) or in a field ``system`` or ``system_prompt``. Null means no system turn, and "" an empty one. Sizes of the
images are in ``width`` and ``height``, if given; for several images these are lists.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_vl.data.formats.image_files import read_image, require_images
from megatron_vl.data.formats.record_files import read_samples, record_shards
from megatron_vl.data.formats.shard import Shard, Skipped
from megatron_vl.data.formats.values import NOTHING, Json, clean_text, field, size_of, words_in
from megatron_vl.data.sample import ImageRef, Sample, Turn
from megatron_vl.data.sources.base import Source
from megatron_vl.errors import SkipSample


@dataclass(frozen=True)
class Dialogues(Source):
    """Dialogues in a JSON array."""

    path: Path
    """The JSON file."""
    image_root: Path
    """Folder that the paths of images are relative to."""
    language: Literal["en", "zh"] = "en"
    """Language of the dialogues."""
    records_per_shard: int = 10_000
    """Dialogues in a shard."""

    def shards(self) -> list[Shard]:
        require_images(self.image_root)
        return record_shards(self.path, self.records_per_shard)

    def read(self, shard: Shard) -> Iterator[Sample | Skipped]:
        return read_samples(shard, self._sample)

    @abstractmethod
    def _sample(self, record: Json, key: str) -> Sample:
        """Return the dialogue of a record. Raises SkipSample."""

    def _images(self, record: Json, names: Sequence[str]) -> tuple[ImageRef, ...]:
        """Return the images of these names, each with the size that the record declares. Raises SkipSample."""
        sizes = _declared_sizes(record, len(names))
        return tuple(read_image(self.image_root, name, size) for name, size in zip(names, sizes, strict=True))


def dialogue_turns(record: Json, roles: Mapping[str, Literal["user", "assistant"]]) -> list[Turn]:
    """Return the turns from the first of the user to the last of the assistant; ``roles`` maps names to roles.

    The system turn, if there is one, comes first.

    Raises:
        SkipSample: The record is not a valid dialogue.
    """
    items = field(record, "conversations", list)
    told = bool(items) and isinstance(items[0], Mapping) and items[0].get("from") == "system"
    system = _system_turn([record.get("system"), record.get("system_prompt"), items[0].get("value") if told else None])
    turns: list[Turn] = []
    for item in items[told:]:
        speaker = field(item, "from", str)
        if speaker not in roles:
            raise SkipSample("unknown_role", f"{speaker!r}, expected {' or '.join(map(repr, roles))}")
        role = roles[speaker]
        if role == "assistant" and 0 in (item.get("loss"), item.get("weight")):
            raise SkipSample("masked_turn", "an answer is not to be learned ('loss' or 'weight' is 0); every answer is")
        if role == "user" or turns:
            turns.append(Turn(role, clean_text(words_in(item, "value"), f"value of a {role} turn")))
    while turns and turns[-1].role == "user":
        turns.pop()
    if not turns:
        raise SkipSample("no_answer", "no turn of the assistant follows one of the user")
    if any(mark in turn.text for turn in turns for mark in ("<video>", "<audio>")):
        raise SkipSample("unsupported_media", "<video> or <audio> in a turn")
    for before, after in itertools.pairwise(turns):
        if before.role == after.role:
            raise SkipSample("turns_out_of_order", f"two turns of {after.role!r} in a row")
    return [*system, *turns]


def _system_turn(found: Sequence[Any]) -> list[Turn]:
    """Return the system turn of a record from any of its possible places, or an empty list."""
    texts = {value for value in found if isinstance(value, str)}
    if len(texts) > 1 or not all(value is None or isinstance(value, str) for value in found):
        raise SkipSample("wrong_field", f"the system turn is {found!r:.80}, expected one text")
    return [Turn("system", clean_text(text, "system turn") if text.strip() else "") for text in texts]


def media_of(record: Json) -> list[Any]:
    """Return the paths of the images beside the turns. Raises SkipSample if there is a video or a sound."""
    for name in ("video", "videos", "audio", "audios"):
        if record.get(name) not in NOTHING:
            raise SkipSample("unsupported_media", f"{name!r} is {record[name]!r:.60}")
    found = [record[name] for name in ("image", "images") if record.get(name) not in NOTHING]
    if len(found) > 1:
        raise SkipSample("contradiction", "both 'image' and 'images'")
    return found[0] if found and isinstance(found[0], list) else found


def _declared_sizes(record: Json, count: int) -> list[tuple[int, int] | None]:
    """Return width and height of each image of a record, if declared. Raises SkipSample('bad_size')."""
    width, height = record.get("width"), record.get("height")
    if count == 0 or width is None or height is None:
        return [None] * count
    widths, heights = (value if isinstance(value, list) else [value] for value in (width, height))
    if not len(widths) == len(heights) == count:
        raise SkipSample("bad_size", f"width is {width!r:.40} and height {height!r:.40}, for {count} images")
    return [size_of(*pair, "width and height") for pair in zip(widths, heights, strict=True)]
