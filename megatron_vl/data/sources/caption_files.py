"""Pairs of an image path and a caption, in the usual file formats.

    *.jsonl    {"image": "a/1.jpg", "caption": "..."}, one object per line: in-house pairs (or a list, as *.json)
    *.tsv      caption<TAB>url, or url<TAB>caption: CC3M and CC12M as published; nothing is quoted
    *.json     a list of objects, or of captions alone (SBU's ``captions``), at the top or under a key

Sets that are published as addresses can be read in this way if the images were stored under the number of their line
(``image_pattern: "GCC_train_{line:09d}.jpg"``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_vl.data.file_kinds import holds, plain_files
from megatron_vl.data.formats.image_files import check_patterns, image_names, read_first_image, require_images
from megatron_vl.data.formats.jsonl import Line, line_shards, read_lines
from megatron_vl.data.formats.record_files import read_records, record_shards
from megatron_vl.data.formats.shard import Shard, Skipped
from megatron_vl.data.formats.values import language_of
from megatron_vl.data.sample import Sample
from megatron_vl.data.sources.base import Source
from megatron_vl.data.sources.captions import Choice, caption_samples, scores_of, skip_captions
from megatron_vl.errors import DataError, SkipSample

FORMS = (".jsonl", ".tsv", ".json")
_ADDRESS = re.compile(r"(?:[a-z][a-z0-9+.-]*:)?//\S+|data:\S+|[^\s/]+\.[^\s/]+/\S*", re.IGNORECASE)
Record = dict[str, Any]


@dataclass(frozen=True)
class CaptionFiles(Source):
    """Captions of images that are named by path."""

    path: Path
    """A .jsonl, .tsv or .json file, or a folder of .jsonl or .tsv files."""
    image_root: Path
    """Folder, or zip, of the images."""
    image_pattern: tuple[str, ...] = ("{image}",)
    """Name of an image from the fields of its record; with several, the first that exists. ``line`` is the record
    number, from 0."""
    caption_field: str = "caption"
    """Field that holds the caption, or a list of captions."""
    score_field: str = ""
    """Field that holds the CLIP score."""
    columns: tuple[str, ...] = ()
    """Names of the columns of a .tsv, for example [caption, url]."""
    header: bool | None = None
    """Whether the first line of a .tsv is a header. By default it is if it holds the names of the columns."""
    records: str = ""
    """Key of the list in a .json. Empty: the document is the list."""
    captions: Choice = "longest"
    """Choice among several captions of an image."""
    language: Literal["en", "zh"] = "en"
    """Language of the captions. A record's own ``lang`` overrides it."""
    records_per_shard: int = 20_000
    """Pairs in a shard."""

    def shards(self) -> list[Shard]:
        require_images(self.image_root)
        check_patterns(self.image_pattern, self.name)
        return [shard for file in self._files() for shard in self._shards_of(file)]

    def score_fields(self) -> tuple[str, ...]:
        return (self.score_field,) if self.score_field else ()

    def read(self, shard: Shard) -> Iterator[Sample | Skipped]:
        for record in self._records(shard):
            if isinstance(record, Skipped):
                yield record
            else:
                yield from self._samples(*record)

    def _files(self) -> list[Path]:
        if not self.path.is_dir():
            return [self.path]
        files = plain_files(self.path, FORMS[:2])
        if not files:
            raise DataError(f"{self.path}: no .jsonl and no .tsv in this folder{holds(self.path)}")
        return files

    def _shards_of(self, file: Path) -> list[Shard]:
        if file.suffix not in FORMS:
            hint = "; a table with commas is not read, write it with tabs" if file.suffix == ".csv" else ""
            raise DataError(f"{file}: expected a file that ends in {', '.join(FORMS)}{hint}")
        if file.suffix != ".tsv":
            return record_shards(file, self.records_per_shard, self.records or None)
        if self.caption_field not in self.columns:
            raise DataError(
                f"{self.name}: columns are {list(self.columns)}, expected names for the columns of {file}, with "
                f"{self.caption_field!r} among them"
            )
        self._has_header(file)  # raises an error now, not in the middle of the work
        return line_shards(file, self.records_per_shard)

    def _records(self, shard: Shard) -> Iterator[tuple[Record, str] | Skipped]:
        """Yield the records and their keys, with the record number, from 0, under ``line``."""
        if shard.path.suffix != ".tsv":
            for found in read_records(shard, self.records or None):
                if isinstance(found, Skipped):
                    yield found
                else:
                    value = found.value if isinstance(found.value, dict) else {self.caption_field: found.value}
                    yield {**value, "line": found.index}, found.key
            return
        header = self._has_header(shard.path)
        for line in read_lines(shard, self._split):
            if isinstance(line, Skipped):
                yield line
            elif not (header and line.number == 1):
                yield {**line.record, "line": line.number - 1 - header}, f"{shard.path.name}:{line.number}"

    def _split(self, text: str) -> Record:
        values = text.rstrip("\r\n").split("\t")
        if len(values) != len(self.columns):
            raise ValueError(f"expected {len(self.columns)} columns, found {len(values)}")
        return dict(zip(self.columns, values, strict=True))

    def _has_header(self, file: Path) -> bool:
        """Return whether the first line of a table is a header: as declared, or because it certainly is.

        Raises:
            DataError: It is uncertain. A wrong guess would assign every caption to another image.
        """
        if self.header is not None:
            return self.header
        lines = list(read_lines(Shard("", file, count=2), self._split))
        if not lines:
            return False
        first, second = lines[0], lines[-1]
        if isinstance(first, Skipped):
            doubt = first.detail
        elif all(_is_name(name, value) for name, value in first.record.items()):
            return True
        else:
            doubt = self._doubt(first.record, second.record if isinstance(second, Line) else first.record)
        if doubt:
            raise DataError(
                f"{file}, line 1: {doubt}. Is it a header? Say so with 'header: true' or 'header: false'; the columns "
                f"are taken to be {', '.join(self.columns)}"
            )
        return False

    def _doubt(self, first: Record, second: Record) -> str:
        """Return what is unusual about the first line of a table compared to the second, if the first is a record."""
        for name, value in first.items():
            if _is_name(name, value):
                return f"{value!r} is the name of its column"
            kind = _kind(second[name])
            if name != self.caption_field and kind != "text" and _kind(value) == "text":
                return f"{name!r} is {value!r:.60}, but in line 2 it is {kind}"
        if _kind(first[self.caption_field]) == _kind(second[self.caption_field]) == "an address":
            return f"{self.caption_field!r} is an address, {first[self.caption_field]!r:.60}"
        return ""

    def _samples(self, record: Record, key: str) -> Iterator[Sample | Skipped]:
        captions = record.get(self.caption_field)
        several = captions if isinstance(captions, list) else [captions]
        try:
            if not several:
                raise SkipSample("no_caption", f"{self.caption_field!r} is empty")
            scores = scores_of(record.get(self.score_field), len(several))
            image = read_first_image(self.image_root, image_names(self.image_pattern, record))
        except SkipSample as error:
            yield from skip_captions(key, several or [None], error)
            return
        sample = Sample(key, self.name, "caption", language_of(record, self.language), (image,))
        yield from caption_samples(sample, several, self.captions, scores)


def _is_name(name: str, value: str) -> bool:
    return value.strip().lower() == name.lower()


def _kind(value: str) -> str:
    """Return the kind of a table value by its form."""
    if _ADDRESS.fullmatch(value.strip()):
        return "an address"
    try:
        float(value)
    except ValueError:
        return "text"
    return "a number"
