"""Captions whose phrases have boxes: Kosmos-2's GRIT after img2dataset.

The json of each record holds ``caption`` and two lists, ``noun_chunks`` and ``ref_exps`` (the chunks expanded
to whole expressions). An entry is ``[start, end, x1, y1, x2, y2, score]``: characters of the caption, end
exclusive, and a box in fractions of the image. A phrase with several boxes is several entries with the same
span, and expressions nest. Qwen-VL kept a largest set of phrases without nesting (paper, A.3);
``largest_disjoint`` is that choice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_vl.data.sample import Region, Sample
from megatron_vl.data.sources.base import Shard, Skipped, Source, field, skipped
from megatron_vl.data.sources.boxes import Box, box_from_corners
from megatron_vl.data.sources.img2dataset import record_image, record_json, record_key
from megatron_vl.data.sources.tars import TarRecord, read_tar, tar_shards
from megatron_vl.errors import SkipSample

Span = tuple[int, int]


@dataclass(frozen=True)
class GroundedCaption(Source):
    """Grounded captions from GRIT's tars."""

    path: Path
    """A folder of .tar files, or one of them."""
    phrases: Literal["ref_exps", "noun_chunks"] = "ref_exps"
    """Which of the two lists names the phrases."""
    min_score: float = 0.0
    """Drop boxes below this confidence."""
    language: Literal["en", "zh"] = "en"
    """Language of the captions."""

    def shards(self) -> list[Shard]:
        return tar_shards(self.path)

    def read(self, shard: Shard) -> Iterator[Sample | Skipped]:
        for record in read_tar(shard.path):
            key = record_key(shard, record)
            try:
                yield self._sample(record, key)
            except SkipSample as error:
                yield skipped(key, error)

    def _sample(self, record: TarRecord, key: str) -> Sample:
        image = record_image(record, key)
        meta = record_json(record)
        caption = field(meta, "caption", str)
        boxes = self._boxes(field(meta, self.phrases, list), caption)
        spans = largest_disjoint(list(boxes))
        if not spans:
            raise SkipSample("no_regions", f"{self.phrases} is empty")
        regions = tuple(Region(caption[a:b], tuple(boxes[a, b]), span=(a, b)) for a, b in spans)
        return Sample(key, self.name, "grounded_caption", self.language, (image,), text=caption, regions=regions)

    def _boxes(self, entries: list[Any], caption: str) -> dict[Span, list[Box]]:
        boxes: dict[Span, list[Box]] = {}
        for entry in entries:
            if not isinstance(entry, Sequence) or len(entry) != 7:
                raise SkipSample("bad_region", f"expected 7 numbers in {self.phrases}, found {entry!r:.80}")
            box = box_from_corners(entry[2:6])
            try:
                start, end, score = int(entry[0]), int(entry[1]), float(entry[6])
            except (TypeError, ValueError) as error:
                raise SkipSample("bad_region", f"{self.phrases}: {entry!r:.80}") from error
            if not 0 <= start < end <= len(caption):
                raise SkipSample("bad_span", f"[{start}, {end}) in a caption of {len(caption)} characters")
            if score >= self.min_score:
                boxes.setdefault((start, end), []).append(box)
        return boxes


def largest_disjoint(spans: Sequence[Span]) -> list[Span]:
    """A largest set of spans that do not overlap, in order: always take the one that ends first."""
    chosen: list[Span] = []
    for start, end in sorted(set(spans), key=lambda span: (span[1], -span[0])):
        if not chosen or start >= chosen[-1][1]:
            chosen.append((start, end))
    return chosen
