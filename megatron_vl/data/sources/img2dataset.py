"""Captions from img2dataset's output, in any of its containers (:mod:`megatron_vl.data.formats.img2dataset_shards`).

The fields of the caption and of a CLIP score differ by data set; see ``presets.DATA_SETS``. For example, LAION-COCO
keeps its caption in ``top_caption``, and the alt text that it replaces in the ``txt``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_vl.data.formats.img2dataset_shards import Pair, pair_shards, read_pairs
from megatron_vl.data.formats.shard import Shard, Skipped
from megatron_vl.data.sample import ImageRef, Sample
from megatron_vl.data.sources.base import Source
from megatron_vl.data.sources.captions import Choice, caption_samples, scores_of, skip_captions
from megatron_vl.errors import SkipSample


@dataclass(frozen=True)
class Img2Dataset(Source):
    """Captions from img2dataset's tars, folders or parquet."""

    path: Path
    """The folder that img2dataset wrote, or one shard of it."""
    language: Literal["en", "zh"] = "en"
    """Language of the captions."""
    caption_field: tuple[str, ...] = ("txt", "caption", "text")
    """Metadata fields of the caption, or of a list of captions; the first that is not empty is used. ``txt`` is the
    caption file, ``text`` a common name in Hugging Face's parquet."""
    score_field: tuple[str, ...] = ()
    """Fields of the CLIP score, or of a list of scores; the first that is present is used."""
    captions: Choice = "longest"
    """Choice among several captions of an image."""

    def shards(self) -> list[Shard]:
        return pair_shards(self.path)

    def score_fields(self) -> tuple[str, ...]:
        return self.score_field

    def read(self, shard: Shard) -> Iterator[Sample | Skipped]:
        for pair in read_pairs(shard):
            if isinstance(pair, Skipped):
                yield pair
            else:
                yield from self._samples(pair)

    def _samples(self, pair: Pair) -> Iterator[Sample | Skipped]:
        captions = _first(pair, self.caption_field)
        if captions is None:
            found = ", ".join(sorted(pair.fields))
            yield Skipped(pair.key, "no_caption", f"{' and '.join(self.caption_field)} empty or absent of {found:.80}")
            return
        several = captions if isinstance(captions, list) else [captions]
        try:
            scores = scores_of(_first(pair, self.score_field), len(several))
        except SkipSample as error:
            yield from skip_captions(pair.key, several, error)
            return
        image = ImageRef(pair.key, pair.image)
        sample = Sample(pair.key, self.name, "caption", self.language, (image,))
        yield from caption_samples(sample, several, self.captions, scores)


def _first(pair: Pair, names: tuple[str, ...]) -> Any:
    """Return the first of the fields that is present and not empty."""
    for name in names:
        value = pair.fields.get(name)
        if value is not None and value != [] and not (isinstance(value, str) and not value.strip()):
            return value
    return None
