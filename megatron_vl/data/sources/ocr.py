"""Pages in the format of SynthDoG: images and a metadata.jsonl, with or without the positions of the lines.

SynthDoG (of Donut) writes ``{"file_name", "ground_truth"}``. Here ``ground_truth`` is a JSON string that holds all the
text in one and drops the positions. Such a page cannot teach reading with positions. The extended format, which the
generator of this package writes, adds ``size`` ([width, height] in pixels) and ``lines``. Each line has ``text`` and
``quad`` (four points in pixels, clockwise from the top-left corner). Such a page becomes a sample of the OCR task.
Given a ``question``, a page of either format becomes a question whose answer is its text.

SynthDoG appends to its metadata. A second run into the same folder overwrites the images of the first run and leaves
their old lines in place. So a file in which a name occurs twice is refused.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from megatron_vl.data.formats.image_files import read_image
from megatron_vl.data.formats.jsonl import line_shards, parse_object
from megatron_vl.data.formats.record_files import read_samples, require_lines
from megatron_vl.data.formats.shard import Shard, Skipped, require_folder
from megatron_vl.data.formats.values import Json, clean_text, field, language_of, size_of, words_in
from megatron_vl.data.sample import Region, Sample
from megatron_vl.data.sources.base import Source
from megatron_vl.data.sources.boxes import quad_from_points
from megatron_vl.errors import DataError, SkipSample

FILE_NAME = re.compile(rb'"file_name"\s*:\s*"((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True)
class OCR(Source):
    """Pages with lines and quads."""

    path: Path
    """metadata.jsonl, or the folder that holds it."""
    image_root: Path | None = None
    """Folder of the images, by default the folder of the metadata."""
    language: Literal["en", "zh"] = "en"
    """Language of the pages. A record's own ``lang`` overrides it."""
    question: str = ""
    """Question about every page, whose answer is its text. By default a page without positions is skipped."""
    records_per_shard: int = 10_000
    """Pages in a shard."""

    def shards(self) -> list[Shard]:
        require_folder(self._root, "the folder of the pages (image_root)")
        require_lines(self._metadata)
        shards = line_shards(self._metadata, self.records_per_shard)
        _check_names(self._metadata)
        return shards

    def read(self, shard: Shard) -> Iterator[Sample | Skipped]:
        return read_samples(shard, self._sample)

    @property
    def _metadata(self) -> Path:
        return self.path / "metadata.jsonl" if self.path.is_dir() else self.path

    @property
    def _root(self) -> Path:
        return self.image_root or self._metadata.parent

    def _sample(self, record: Json, key: str) -> Sample:
        name = field(record, "file_name", str)
        language = language_of(record, self.language)
        size, regions = _lines(record, name) if "lines" in record else (None, ())
        text = " ".join(region.text for region in regions) or _whole_text(record)
        if not self.question and not regions:
            raise SkipSample("no_lines", f"{name}: no 'lines' with quads, and no 'question' to ask instead")
        sample = Sample(key, self.name, "ocr", language, (read_image(self._root, name, size),), text=text)
        if self.question:
            return replace(sample, task="vqa", question=self.question)
        return replace(sample, regions=regions)


def _lines(record: Json, name: str) -> tuple[tuple[int, int], tuple[Region, ...]]:
    """Return the size of a page and its lines. Raises SkipSample."""
    sides = field(record, "size", list)
    if len(sides) != 2:
        raise SkipSample("bad_size", f"{name}: size is {sides!r:.40}, expected [width, height]")
    size = size_of(sides[0], sides[1], "the two of 'size'")
    regions = []
    for line in field(record, "lines", list):
        text = clean_text(words_in(line, "text"), "text of a line")
        regions.append(Region(text, quads=(quad_from_points(field(line, "quad", list), *size),)))
    if not regions:
        raise SkipSample("no_lines", f"{name}: 'lines' is empty")
    return size, tuple(regions)


def _whole_text(record: Json) -> str:
    """Return the text of a page without positions. Raises SkipSample."""
    truth = _ground_truth(field(record, "ground_truth", str))
    return clean_text(words_in(field(truth, "gt_parse", dict), "text_sequence"), "text_sequence")


def _ground_truth(text: str) -> Json:
    """Return the object in SynthDoG's JSON string. Raises SkipSample."""
    try:
        return parse_object(text)
    except ValueError as error:
        raise SkipSample("bad_json", f"ground_truth: {error}") from error


def _check_names(path: Path) -> None:
    """Raise DataError if two lines name the same image. Memory holds 8 bytes per name."""
    hashes = array("q")
    with path.open("rb") as stream:
        for line in stream:
            match = FILE_NAME.search(line)
            hashes.append(hash(match[1]) if match else -1 - len(hashes))
    values, counts = np.unique(np.frombuffer(hashes, dtype=np.int64), return_counts=True)
    repeated = set(values[counts > 1].tolist())
    if not repeated:
        return
    first: dict[bytes, int] = {}
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            match = FILE_NAME.search(line)
            if match is None or hash(match[1]) not in repeated:
                continue
            if match[1] in first:
                name = match[1].decode(errors="replace")
                raise DataError(
                    f"{path}: lines {first[match[1]]} and {number} both name {name!r}; the generator appends when it "
                    "is run again, and its images are those of the last run. Keep only the lines of that, or "
                    "generate into an empty folder"
                )
            first[match[1]] = number
