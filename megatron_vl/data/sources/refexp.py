"""Referring expressions in MDETR's JSON: RefCOCO, RefCOCO+ and RefCOCOg after its conversion.

The file is a COCO dictionary with one "image" per expression (``caption``, ``file_name``, ``width``, ``height``,
``id``). The box is an annotation (``image_id``, ``bbox`` as x, y, width, height in pixels). The same file serves both
directions: ``referring`` learns the box of an expression, ``region_caption`` the expression of a box.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_vl.data.formats.image_files import read_first_image, require_images
from megatron_vl.data.formats.json_stream import array_shards, iter_array, read_array
from megatron_vl.data.formats.shard import Shard, Skipped, skipped
from megatron_vl.data.formats.values import Json, clean_text, field, size_of, words_in
from megatron_vl.data.sample import Region, Sample
from megatron_vl.data.sources.base import Source
from megatron_vl.data.sources.boxes import about_region, box_from_xywh
from megatron_vl.errors import SkipSample


@dataclass(frozen=True)
class RefExp(Source):
    """Referring expressions from MDETR's JSON."""

    path: Path
    """The JSON file."""
    image_root: Path
    """Folder of the images, or the one that holds train2014 or train2014.zip."""
    task: Literal["referring", "region_caption"] = "referring"
    """Task: the box of an expression, or the expression of a box."""
    language: Literal["en", "zh"] = "en"
    """Language of the expressions."""
    records_per_shard: int = 50_000
    """Expressions in a shard. Each shard reads the file."""

    def shards(self) -> list[Shard]:
        require_images(self.image_root)
        return array_shards(self.path, self.records_per_shard, "images")

    def read(self, shard: Shard) -> Iterator[Sample | Skipped]:
        chosen = list(read_array(shard))
        boxes = self._annotations({identity(element.value) for element in chosen})
        for element in chosen:
            key = f"{self.path.name}#{element.index}"
            try:
                yield self._sample(element.value, boxes, key)
            except SkipSample as error:
                yield skipped(key, error)

    def _annotations(self, wanted: set[Any]) -> dict[Any, list[Json]]:
        """Return the annotations of the wanted images, in the order of the file."""
        found: dict[Any, list[Json]] = {}
        for element in iter_array(self.path, "annotations"):
            number = identity(element.value, "image_id")
            if number in wanted:
                found.setdefault(number, []).append(element.value)
        return found

    def _sample(self, record: Json, boxes: dict[Any, list[Json]], key: str) -> Sample:
        expression = clean_text(words_in(record, "caption"), "caption")
        size = size_of(field(record, "width", object), field(record, "height", object), "width and height")
        annotations = boxes.get(field(record, "id", (int, str)), [])
        if not annotations:
            raise SkipSample("no_annotation", f"no annotation has image_id {record['id']}")
        if any(item.get("tokens_positive") != annotations[0].get("tokens_positive") for item in annotations):
            raise SkipSample("several_phrases", f"boxes of different words of {expression!r:.60}; expected one phrase")
        corners = tuple(box_from_xywh(field(item, "bbox", list), *size) for item in annotations)
        image = read_first_image(self.image_root, train_images(field(record, "file_name", str)), size)
        sample = Sample(key, self.name, self.task, self.language, (image,))
        return about_region(sample, Region(expression, corners))


def identity(record: Any, name: str = "id") -> int | str | None:
    """Return the number or name that identifies a record, if it has one."""
    value = record.get(name) if isinstance(record, dict) else None
    return value if isinstance(value, (int, str)) else None


def train_images(name: str) -> list[str]:
    """Return possible paths of an image of COCO's train2014: in the folder, or in train2014 or train2014.zip there."""
    return [name, f"train2014/{name}", f"train2014.zip/train2014/{name}"]
