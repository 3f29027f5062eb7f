"""Regions of Visual Genome: ``region_descriptions.json`` and ``image_data.json``, as published.

A record is a region: a phrase, and x, y, width, height in pixels. The images are in two folders, VG_100K and VG_100K_2.
Only the image's url tells which one. Regions overlap heavily and repeat. So a region is dropped if an earlier one of
its image has the same phrase and nearly the same box. Half of the images come from COCO, including images of RefCOCO's
validation and test splits. These can be excluded by their ids.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import NoneType
from typing import Any, Literal
from urllib.parse import urlsplit

from megatron_vl.data.formats.image_files import read_first_image, require_images
from megatron_vl.data.formats.json_stream import array_shards, iter_array, read_array
from megatron_vl.data.formats.shard import Shard, Skipped, skipped
from megatron_vl.data.formats.values import Json, clean_text, field, size_of, words_in
from megatron_vl.data.sample import ImageRef, Region, Sample
from megatron_vl.data.sources.base import Source
from megatron_vl.data.sources.boxes import Box, about_region, box_from_xywh, overlap
from megatron_vl.data.sources.refcoco import evaluation_images, reference_files
from megatron_vl.errors import DataError, SkipSample

ZIPS = {"VG_100K": "images.zip", "VG_100K_2": "images2.zip"}
"""The archives in which the two folders are published."""


@dataclass(frozen=True)
class Picture:
    """Facts about an image from image_data.json."""

    name: str
    """Folder and file name."""
    width: int
    height: int
    coco_id: int | None

    @property
    def names(self) -> list[str]:
        """Possible paths of the image: in its folder, or in the zip of the folder."""
        return [self.name, f"{ZIPS.get(self.name.partition('/')[0], 'images.zip')}/{self.name}"]


@dataclass(frozen=True)
class VisualGenome(Source):
    """Regions from Visual Genome's files."""

    regions: Path
    """region_descriptions.json."""
    images: Path
    """image_data.json."""
    image_root: Path
    """Folder that holds VG_100K and VG_100K_2, or the zips of them."""
    task: Literal["referring", "region_caption"] = "referring"
    """Task: the box of a phrase, or the phrase of a box."""
    duplicate_iou: float = 0.5
    """Drop a region if an earlier one has the same phrase and a box with a greater overlap than this (1: drop none)."""
    refcoco_root: Path | None = None
    """Folder with refcoco, refcoco+ and refcocog. Images of their splits other than train are left out."""
    records_per_shard: int = 2_000
    """Images in a shard."""

    def shards(self) -> list[Shard]:
        require_images(self.image_root)
        if not 0 <= self.duplicate_iou <= 1:
            raise DataError(f"{self.name}: duplicate_iou is {self.duplicate_iou}, expected 0 to 1")
        return array_shards(self.regions, self.records_per_shard)

    def files(self) -> list[Path]:
        return [*super().files(), *(reference_files(self.refcoco_root) if self.refcoco_root else ())]

    def read(self, shard: Shard) -> Iterator[Sample | Skipped]:
        pictures = self._pictures()
        excluded = evaluation_images(self.refcoco_root) if self.refcoco_root else frozenset()
        for element in read_array(shard):
            key = f"{shard.path.name}#{element.index}"
            try:
                records = field(element.value, "regions", list)
            except SkipSample as error:
                yield skipped(key, error)
                continue
            yield from self._regions(key, records, self._image(element.value, pictures, excluded))

    def _pictures(self) -> dict[int, Picture]:
        pictures = {}
        for element in iter_array(self.images):
            try:
                number = _image_id(element.value)
                name = "/".join(PurePosixPath(urlsplit(field(element.value, "url", str)).path).parts[-2:])
                width, height = field(element.value, "width", object), field(element.value, "height", object)
                size = size_of(width, height, "width and height")
                coco_id = field({"coco_id": None, **element.value}, "coco_id", (int, NoneType))
            except SkipSample as error:
                raise DataError(f"{self.images}: element {element.index}: {error.detail}") from error
            pictures[number] = Picture(name, *size, coco_id)
        return pictures

    def _image(
        self, record: Json, pictures: dict[int, Picture], excluded: frozenset[int]
    ) -> tuple[Picture, ImageRef] | SkipSample:
        """Return the image of all regions of a record, or the reason why there is none."""
        try:
            number = _image_id(record)
            if number not in pictures:
                raise SkipSample("missing_image", f"image {number} is not in {self.images.name}")
            picture = pictures[number]
            if picture.coco_id in excluded:
                raise SkipSample("evaluation_image", f"image {number} is COCO's {picture.coco_id}")
            return picture, read_first_image(self.image_root, picture.names, (picture.width, picture.height))
        except SkipSample as error:
            return error

    def _regions(
        self, key: str, records: list[Any], found: tuple[Picture, ImageRef] | SkipSample
    ) -> Iterator[Sample | Skipped]:
        if isinstance(found, SkipSample):
            yield from (skipped(f"{key}.{number}", found) for number in range(len(records)))
            return
        picture, image = found
        earlier: dict[str, list[Box]] = {}
        for number, record in enumerate(records):
            try:
                region = _region(record, picture)
                boxes = earlier.setdefault(region.text.lower(), [])
                if any(overlap(box, region.boxes[0]) > self.duplicate_iou for box in boxes):
                    raise SkipSample("duplicate_region", f"{region.text!r:.60} was said of this place before")
                boxes.append(region.boxes[0])
                yield about_region(Sample(f"{key}.{number}", self.name, self.task, "en", (image,)), region)
            except SkipSample as error:
                yield skipped(f"{key}.{number}", error)


def _image_id(record: Json) -> int:
    """Return the image id, which has different names in different versions of the file."""
    return int(field(record, "image_id" if isinstance(record, dict) and "image_id" in record else "id", int))


def _region(record: Json, picture: Picture) -> Region:
    phrase = clean_text(" ".join(words_in(record, "phrase").split()), "phrase")
    xywh = [field(record, side, (int, float)) for side in ("x", "y", "width", "height")]
    return Region(phrase, (box_from_xywh(xywh, picture.width, picture.height),))
