"""Captions whose phrases have boxes: Kosmos-2's GRIT after img2dataset.

The json of each record holds ``caption`` and two lists, ``noun_chunks`` and ``ref_exps`` (the chunks expanded to whole
expressions). An entry is ``[start, end, x1, y1, x2, y2, score]``: characters of the caption, end exclusive, and a box
in fractions of the image. A phrase with several boxes has several entries with the same span. Expressions may be
nested. Qwen-VL kept a largest set of phrases without nesting (paper, A.3); ``largest_disjoint`` makes this choice. The
same phrases serve three tasks: the whole caption with its boxes, a phrase's boxes, a box's phrase. In the last two
tasks, a record is a phrase.

Fractions stay correct when img2dataset resizes an image, but not when it pads or crops it, which is its default. So an
image whose aspect ratio has changed is refused.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from megatron_vl.data.file_kinds import BYTE_ORDER_MARK
from megatron_vl.data.formats.img2dataset_shards import Pair, pair_shards, read_pairs
from megatron_vl.data.formats.shard import Shard, Skipped, skipped
from megatron_vl.data.formats.values import Json, as_number, clean_text, field, size_of
from megatron_vl.data.sample import ImageRef, Region, Sample
from megatron_vl.data.sources.base import Source
from megatron_vl.data.sources.boxes import about_region, box_from_corners
from megatron_vl.data.sources.captions import as_score
from megatron_vl.errors import SkipSample

Span = tuple[int, int]
SCORE_FIELD = "clip_similarity_vitb32"


@dataclass(frozen=True)
class GroundedCaption(Source):
    """Grounded captions from GRIT after img2dataset, or their phrases."""

    path: Path
    """The folder that img2dataset wrote, or one shard of it."""
    task: Literal["grounded_caption", "referring", "region_caption"] = "grounded_caption"
    """Task: the caption with its boxes, the boxes of a phrase, or the phrase of a box."""
    phrases: Literal["ref_exps", "noun_chunks"] = "ref_exps"
    """List that the phrases are taken from."""
    min_score: float = 0.0
    """Drop boxes below this confidence."""
    language: Literal["en", "zh"] = "en"
    """Language of the captions."""
    scaled_images: bool = dataclasses.field(default=True, kw_only=True)
    """Compare only the proportions of declared sizes, because boxes are fractions."""

    def shards(self) -> list[Shard]:
        return pair_shards(self.path)

    def score_fields(self) -> tuple[str, ...]:
        return (SCORE_FIELD,)

    def read(self, shard: Shard) -> Iterator[Sample | Skipped]:
        for pair in read_pairs(shard):
            if isinstance(pair, Skipped):
                yield pair
                continue
            try:
                sample, nested = self._caption(pair)
            except SkipSample as error:
                yield skipped(pair.key, error)
                continue
            if self.task == "grounded_caption":
                yield sample
            else:
                yield from self._phrases(sample)
                yield from (Skipped(f"{pair.key}#{a}-{b}", "nested_phrase", sample.text[a:b]) for a, b in nested)

    def _caption(self, pair: Pair) -> tuple[Sample, list[Span]]:
        """Return the caption with the chosen phrases, and the spans of the others."""
        _check_aspect(pair.fields)
        caption = field(pair.fields, "caption", str)
        if BYTE_ORDER_MARK in caption:
            raise SkipSample("unclean_text", "a byte-order mark, which the places of the phrases may count or not")
        clean_text(caption, "caption")  # the caption keeps its white space: spans count it
        boxes = self._boxes(field(pair.fields, self.phrases, list), caption)
        for span in boxes:
            _check_words(caption, span)
        if self.task == "grounded_caption":  # a blank phrase is ignored here, and is a record in other tasks
            boxes = {(a, b): places for (a, b), places in boxes.items() if caption[a:b].strip()}
        spans = largest_disjoint(list(boxes))
        if not spans:
            raise SkipSample("no_regions", f"{self.phrases} has no box with a score of {self.min_score:g} or more")
        regions = tuple(Region(caption[a:b], boxes[a, b], span=(a, b)) for a, b in spans)
        score = as_score(pair.fields.get(SCORE_FIELD))
        image = ImageRef(pair.key, pair.image, _stored_size(pair.fields))
        base = Sample(pair.key, self.name, "grounded_caption", self.language, (image,))
        sample = replace(base, text=caption, regions=regions, score=score)
        return sample, sorted(set(boxes) - set(spans))

    def _phrases(self, sample: Sample) -> Iterator[Sample | Skipped]:
        for region in sample.regions:
            start, end = region.span or (0, 0)
            base = replace(sample, key=f"{sample.key}#{start}-{end}", task=self.task, text="", regions=())
            if region.text.strip():
                yield about_region(base, Region(region.text.strip(), region.boxes))
            else:
                yield Skipped(base.key, "empty_text", "the phrase is blank")

    def _boxes(self, entries: list[Any], caption: str) -> dict[Span, tuple[tuple[float, float, float, float], ...]]:
        boxes: dict[Span, tuple[tuple[float, float, float, float], ...]] = {}
        for entry in entries:
            if not isinstance(entry, list) or len(entry) != 7:
                raise SkipSample("bad_region", f"expected 7 numbers in {self.phrases}, found {entry!r:.80}")
            start, end, *corners, score = (as_number(value) for value in entry)
            if start is None or end is None or score is None:
                raise SkipSample("bad_region", f"{self.phrases}: {entry!r:.80}")
            if not (0 <= start < end <= len(caption) and start.is_integer() and end.is_integer()):
                raise SkipSample("bad_span", f"[{start:g}, {end:g}) in a caption of {len(caption)} characters")
            box = box_from_corners([math.nan if value is None else value for value in corners])
            if score >= self.min_score:
                span = int(start), int(end)
                boxes[span] = (*boxes.get(span, ()), box)
        return boxes


def _check_words(caption: str, span: Span) -> None:
    """Raise SkipSample('bad_span') for a phrase that begins or ends inside a word.

    Its positions refer to another text, or count bytes.
    """
    for edge in span:
        if re.fullmatch("[A-Za-z]{2}", caption[max(edge - 1, 0) : edge + 1]):
            phrase = caption[span[0] : span[1]]
            raise SkipSample("bad_span", f"[{span[0]}, {span[1]}), {phrase!r:.40}, cuts a word of the caption")


def largest_disjoint(spans: Sequence[Span]) -> list[Span]:
    """Return a largest set of spans that do not overlap, in order: repeatedly take the span that ends first."""
    chosen: list[Span] = []
    for start, end in sorted(set(spans), key=lambda span: (span[1], -span[0])):
        if not chosen or start >= chosen[-1][1]:
            chosen.append((start, end))
    return chosen


def _stored_size(meta: Json) -> tuple[int, int] | None:
    """Return the size of the stored image according to the metadata, if given."""
    width, height = meta.get("width"), meta.get("height")
    return None if width is None or height is None else size_of(width, height, "width and height")


def _check_aspect(meta: Json) -> None:
    """Raise SkipSample for an image that was padded or cropped. Images of unknown size are accepted."""
    sides = [meta.get(name) for name in ("width", "height", "original_width", "original_height")]
    width, height, old_width, old_height = (as_number(side) or 0 for side in sides)
    if old_width and old_height and abs(width * old_height - height * old_width) > old_width + old_height:
        raise SkipSample(
            "aspect_changed",
            f"{old_width:g} x {old_height:g} became {width:g} x {height:g}, so the boxes do not fit; "
            "download with img2dataset --resize_mode no or keep_ratio",
        )
