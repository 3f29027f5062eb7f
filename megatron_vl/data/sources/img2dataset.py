"""Image-text pairs in img2dataset's webdataset layout: the container of LAION, DataComp, COYO, CC and SBU.

``NAME/00000.tar`` holds ``KEY.jpg KEY.txt KEY.json`` for every picture that was downloaded; keys have gaps
and are not sorted, ``txt`` and ``json`` may be missing. The caption is the ``txt``, then the json's
``caption``; or, where ``caption_field`` names one, that field of the json (LAION-COCO keeps its caption in
``top_caption``).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_vl.data.sample import ImageRef, Sample
from megatron_vl.data.sources.base import Shard, Skipped, Source, clean_text, field, skipped
from megatron_vl.data.sources.tars import TarRecord, read_tar, tar_shards
from megatron_vl.errors import SkipSample


@dataclass(frozen=True)
class Img2Dataset(Source):
    """Captions from img2dataset's tars."""

    path: Path
    """A folder of .tar files, or one of them."""
    language: Literal["en", "zh"] = "en"
    """Language of the captions."""
    caption_field: str = ""
    """Field of the json that holds the caption; by default the .txt, then ``caption``."""

    def shards(self) -> list[Shard]:
        return tar_shards(self.path)

    def read(self, shard: Shard) -> Iterator[Sample | Skipped]:
        for record in read_tar(shard.path):
            key = record_key(shard, record)
            try:
                image = record_image(record, key)
                caption = clean_text(self._caption(record), "caption")
                yield Sample(key, self.name, "caption", self.language, (image,), text=caption)
            except SkipSample as error:
                yield skipped(key, error)

    def _caption(self, record: TarRecord) -> str:
        if self.caption_field:
            return str(field(record_json(record), self.caption_field, str))
        if "txt" in record.members:
            return decode_text(record.members["txt"], "txt")
        if "json" not in record.members:
            raise SkipSample("no_caption", "neither .txt nor .json")
        return str(field(record_json(record), "caption", str))


def record_key(shard: Shard, record: TarRecord) -> str:
    """Key of a tar's record: the shard's name and its own, since bare keys repeat between data sets."""
    return f"{shard.name}/{record.key}"


def record_image(record: TarRecord, key: str) -> ImageRef:
    """The record's image; SkipSample if the record has a problem, or no image, or an empty one."""
    if record.problem:
        raise SkipSample(record.problem, record.detail)
    data = record.image
    if data is None:
        raise SkipSample("no_image", f"members: {sorted(record.members)}")
    if not data:
        raise SkipSample("empty_image", "zero bytes")
    return ImageRef(key, data)


def record_json(record: TarRecord) -> dict[str, Any]:
    """The record's .json as an object; raises SkipSample."""
    if "json" not in record.members:
        raise SkipSample("no_json", f"members: {sorted(record.members)}")
    try:
        value = json.loads(decode_text(record.members["json"], "json"))
    except (ValueError, RecursionError) as error:
        raise SkipSample("bad_json", str(error)) from error
    if not isinstance(value, dict):
        raise SkipSample("bad_json", f"expected an object, found {type(value).__name__}")
    return value


def decode_text(data: bytes, what: str) -> str:
    """UTF-8 text; raises SkipSample('bad_unicode')."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SkipSample("bad_unicode", f"{what}: {error.reason} at byte {error.start}") from error
