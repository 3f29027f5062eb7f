"""Captions of photographs in Karpathy's splits: ``dataset_coco.json`` (and ``dataset_flickr30k.json``).

``images`` is a list of images, each with its ``sentences`` and its ``split``. A record is a sentence. Sentences of
other splits are counted as ``other_split``. The field ``raw`` holds the text as people wrote it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_vl.data.formats.image_files import check_patterns, image_names, read_first_image, require_images
from megatron_vl.data.formats.json_stream import array_shards, read_array
from megatron_vl.data.formats.shard import Shard, Skipped, skipped
from megatron_vl.data.formats.values import Json, field
from megatron_vl.data.sample import Sample
from megatron_vl.data.sources.base import Source
from megatron_vl.data.sources.captions import Choice, caption_samples, skip_captions
from megatron_vl.errors import SkipSample


@dataclass(frozen=True)
class Karpathy(Source):
    """Captions from one of Karpathy's JSON files."""

    path: Path
    """dataset_coco.json; it may lie in a zip."""
    image_root: Path
    """Folder, or zip, of the images."""
    image_pattern: tuple[str, ...] = ("{filename}",)
    """Name of an image from the fields of its record; with several, the first that exists."""
    splits: tuple[str, ...] = ("train",)
    """Splits to read."""
    captions: Choice = "all"
    """Choice among the captions of an image."""
    language: Literal["en", "zh"] = "en"
    """Language of the captions."""
    records_per_shard: int = 20_000
    """Images in a shard."""

    def shards(self) -> list[Shard]:
        require_images(self.image_root)
        check_patterns(self.image_pattern, self.name)
        return array_shards(self.path, self.records_per_shard, "images")

    def read(self, shard: Shard) -> Iterator[Sample | Skipped]:
        for element in read_array(shard):
            key = f"{self.path.name}#{element.index}"
            try:
                sentences = field(element.value, "sentences", list)
            except SkipSample as error:
                yield skipped(key, error)
            else:
                yield from self._samples(element.value, sentences, key)

    def _samples(self, record: Json, sentences: list[Json], key: str) -> Iterator[Sample | Skipped]:
        try:
            split = field(record, "split", str)
            if split not in self.splits:
                raise SkipSample("other_split", split)
            image = read_first_image(self.image_root, image_names(self.image_pattern, record))
        except SkipSample as error:
            yield from skip_captions(key, sentences, error)
            return
        captions = [sentence.get("raw") if isinstance(sentence, dict) else None for sentence in sentences]
        sample = Sample(image.key, self.name, "caption", self.language, (image,))
        yield from caption_samples(sample, captions, self.captions)
