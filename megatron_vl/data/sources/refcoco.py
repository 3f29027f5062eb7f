"""RefCOCO, RefCOCO+ and RefCOCOg as distributed with the refer toolkit: ``refs(unc).p`` beside ``instances.json``.

The pickle lists references: an annotation, an image, a split, and some sentences, each an expression for the same box.
A record is a sentence. Boxes and sizes are in ``instances.json``, a COCO dictionary. It also has the real name of the
image: the pickle's ``file_name`` has an extra number. All splits show images of COCO train2014. For RefCOCOg, the
``umd`` split is recommended, because its images are disjoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_vl.data.formats.image_files import read_first_image, require_images
from megatron_vl.data.formats.json_stream import iter_array
from megatron_vl.data.formats.pickles import load_plain_pickle, plain_text
from megatron_vl.data.formats.shard import Shard, Skipped, range_shards, skipped, slice_of
from megatron_vl.data.formats.values import Json, clean_text, field, size_of, words_in
from megatron_vl.data.sample import Region, Sample
from megatron_vl.data.sources.base import Source
from megatron_vl.data.sources.boxes import about_region, box_from_xywh
from megatron_vl.data.sources.refexp import identity, train_images
from megatron_vl.errors import DataError, SkipSample


@dataclass(frozen=True)
class RefCOCO(Source):
    """Referring expressions from the refer toolkit's files."""

    path: Path
    """Folder with instances.json and refs(...).p, such as refer/data/refcoco+."""
    image_root: Path
    """Folder of COCO's train2014 images, or the one that holds train2014 or train2014.zip."""
    split_by: Literal["unc", "umd", "google"] = "unc"
    """Author of the division into splits, which selects the pickle."""
    split: Literal["train", "val", "test", "testA", "testB"] = "train"
    """Split to read."""
    expression: Literal["sent", "raw"] = "sent"
    """The cleaned expression (``sent``) or the typed text (``raw``)."""
    task: Literal["referring", "region_caption"] = "referring"
    """Task: the box of an expression, or the expression of a box."""
    language: Literal["en", "zh"] = "en"
    """Language of the expressions."""
    records_per_shard: int = 50_000
    """References in a shard. Each shard reads both files."""

    def shards(self) -> list[Shard]:
        require_images(self.image_root)
        references = self._references()
        if not references:
            found = sorted({str(reference["split"]) for reference in load_references(self._pickle)})
            raise DataError(f"{self._pickle}: no reference has split {self.split!r}; found {', '.join(found)}")
        return range_shards(self._pickle, len(references), self.records_per_shard)

    def files(self) -> list[Path]:
        return [*super().files(), self._pickle, self.path / "instances.json"]

    def read(self, shard: Shard) -> Iterator[Sample | Skipped]:
        chosen = list(slice_of(self._references(), shard))
        boxes = _by_id(self.path / "instances.json", "annotations", {identity(item, "ann_id") for _, item in chosen})
        images = _by_id(self.path / "instances.json", "images", {identity(item, "image_id") for _, item in chosen})
        for index, reference in chosen:
            key = f"{shard.path.name}#{self.split}{index}"
            try:
                place = _find(boxes, reference, "ann_id")
                image = _find(images, reference, "image_id")
                if place.get("image_id", image["id"]) != image["id"]:
                    raise SkipSample("contradiction", f"the box is of image {place['image_id']}, not {image['id']}")
                sentences = field(reference, "sentences", list)
                if not sentences:
                    raise SkipSample("empty_text", "'sentences' is empty")
            except SkipSample as error:
                yield skipped(key, error)
                continue
            for number, sentence in enumerate(sentences):
                try:
                    yield self._sample(f"{key}.{number}", sentence, place, image)
                except SkipSample as error:
                    yield skipped(f"{key}.{number}", error)

    @property
    def _pickle(self) -> Path:
        return self.path / f"refs({self.split_by}).p"

    def _references(self) -> list[Json]:
        held = sorted(path.name for path in self.path.glob("refs(*).p"))
        if held and self._pickle.name not in held:
            raise DataError(
                f"{self._pickle}: no such file; the folder holds {', '.join(held)}. Which is read is chosen by "
                f"split_by, here {self.split_by!r}, or by the type: refcocog takes umd, refcoco and refcoco_plus unc"
            )
        return [reference for reference in load_references(self._pickle) if reference["split"] == self.split]

    def _sample(self, key: str, sentence: Json, annotation: Json, image: Json) -> Sample:
        expression = clean_text(plain_text(words_in(sentence, self.expression)), self.expression)
        size = size_of(field(image, "width", object), field(image, "height", object), "width and height")
        box = box_from_xywh(field(annotation, "bbox", list), *size)
        picture = read_first_image(self.image_root, train_images(field(image, "file_name", str)), size)
        sample = Sample(key, self.name, self.task, self.language, (picture,))
        return about_region(sample, Region(expression, (box,)))


def load_references(path: Path) -> list[Json]:
    """Return the references of a ``refs(...).p``, each with a ``split``. Raises DataError."""
    references = load_plain_pickle(path)
    if not isinstance(references, list) or not all(isinstance(r, dict) and "split" in r for r in references):
        raise DataError(f"{path}: expected a list of references, each with a 'split'; is it the refer toolkit's file?")
    return references


def reference_files(root: Path) -> list[Path]:
    """Return all ``*/refs(*).p`` under ``root``."""
    return sorted(root.glob("*/refs(*).p"))


def evaluation_images(root: Path) -> frozenset[int]:
    """Return the COCO ids of the images in every split but ``train``, of all ``*/refs(*).p`` under ``root``."""
    files = reference_files(root)
    if not files:
        raise DataError(f"{root}: found no */refs(*).p; expected the folder with refcoco, refcoco+ and refcocog")
    return frozenset(
        reference["image_id"]
        for path in files
        for reference in load_references(path)
        if reference["split"] != "train" and isinstance(reference.get("image_id"), int)
    )


def _by_id(path: Path, key: str, wanted: set[Any]) -> dict[int, Json]:
    """Return the records of a COCO dictionary with the ids ``wanted``, without the segmentation outlines."""
    found: dict[int, Json] = {}
    for element in iter_array(path, key):
        number = identity(element.value)
        if isinstance(number, int) and number in wanted:
            found[number] = {name: value for name, value in element.value.items() if name != "segmentation"}
    return found


def _find(records: dict[int, Json], reference: Json, name: str) -> Json:
    number = field(reference, name, int)
    if number not in records:
        raise SkipSample("no_annotation", f"{name} {number} is not in instances.json")
    return records[number]
