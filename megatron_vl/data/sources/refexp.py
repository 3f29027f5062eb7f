"""Referring expressions in MDETR's JSON: RefCOCO, RefCOCO+ and RefCOCOg after its conversion.

A COCO dictionary with one "image" per expression (``caption``, ``file_name``, ``width``, ``height``, ``id``)
and the box as an annotation (``image_id``, ``bbox`` as x, y, width, height in pixels). The same file serves
both directions: ``referring`` learns the box of an expression, ``region_caption`` the expression of a box.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_vl.data.sample import Region, Sample
from megatron_vl.data.sources.base import (
    Json,
    Shard,
    Skipped,
    Source,
    clean_text,
    field,
    json_list,
    load_json,
    range_shards,
    require_folder,
    skipped,
    slice_of,
)
from megatron_vl.data.sources.boxes import box_from_xywh
from megatron_vl.data.sources.images import read_image
from megatron_vl.errors import SkipSample


@dataclass(frozen=True)
class RefExp(Source):
    """Referring expressions from MDETR's JSON."""

    path: Path
    """The JSON file."""
    image_root: Path
    """Folder of the images."""
    task: Literal["referring", "region_caption"] = "referring"
    """Learn the box of an expression, or the expression of a box."""
    language: Literal["en", "zh"] = "en"
    """Language of the expressions."""
    records_per_shard: int = 100_000
    """Expressions in a unit of work; each unit parses the file."""

    def shards(self) -> list[Shard]:
        require_folder(self.image_root, "the folder of the images (image_root)")
        images = json_list(load_json(self.path, dict), "images", self.path)
        return range_shards(self.path, len(images), self.records_per_shard)

    def read(self, shard: Shard) -> Iterator[Sample | Skipped]:
        document = load_json(self.path, dict)
        boxes: dict[Any, list[Json]] = {}
        for annotation in json_list(document, "annotations", self.path):
            boxes.setdefault(annotation.get("image_id"), []).append(annotation)
        for index, record in slice_of(json_list(document, "images", self.path), shard):
            key = f"{self.path.name}#{index}"
            try:
                yield self._sample(record, boxes, key)
            except SkipSample as error:
                yield skipped(key, error)

    def _sample(self, record: Json, boxes: dict[Any, list[Json]], key: str) -> Sample:
        expression = clean_text(field(record, "caption", str), "caption")
        width, height = field(record, "width", int), field(record, "height", int)
        annotations = boxes.get(field(record, "id", (int, str)), [])
        if not annotations:
            raise SkipSample("no_annotation", f"no annotation has image_id {record['id']}")
        corners = tuple(box_from_xywh(field(item, "bbox", list), width, height) for item in annotations)
        image = read_image(self.image_root, field(record, "file_name", str))
        region = Region(expression, corners)
        if self.task == "referring":
            return Sample(key, self.name, "referring", self.language, (image,), question=expression, regions=(region,))
        return Sample(key, self.name, "region_caption", self.language, (image,), text=expression, regions=(region,))
