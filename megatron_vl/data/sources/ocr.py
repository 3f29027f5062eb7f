"""Pages with the text and the quadrilateral of every line: SynthDoG's metadata.jsonl, extended.

SynthDoG (of Donut) writes ``{"file_name", "ground_truth"}`` and drops the positions. The extension adds
``size`` ([width, height] in pixels) and ``lines``, each with ``text`` and ``quad`` (four points in pixels,
clockwise from top-left), which is what Qwen-VL's OCR task needs; a line of the plain form is skipped as
``no_lines``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_vl.data.sample import Region, Sample
from megatron_vl.data.sources.base import (
    Json,
    Shard,
    Skipped,
    Source,
    clean_text,
    field,
    require_folder,
    skipped,
)
from megatron_vl.data.sources.boxes import quad_from_points
from megatron_vl.data.sources.images import read_image
from megatron_vl.data.sources.jsonl import line_shards, read_lines
from megatron_vl.errors import SkipSample


@dataclass(frozen=True)
class OCR(Source):
    """Pages with lines and quads."""

    path: Path
    """metadata.jsonl, or the folder that holds it."""
    image_root: Path | None = None
    """Folder of the images; by default the folder of the metadata."""
    language: Literal["en", "zh"] = "en"
    """Language of the pages; a record's own ``lang`` wins."""
    records_per_shard: int = 10_000
    """Pages in a unit of work."""

    def shards(self) -> list[Shard]:
        require_folder(self._root, "the folder of the pages (image_root)")
        return line_shards(self._metadata, self.records_per_shard)

    def read(self, shard: Shard) -> Iterator[Sample | Skipped]:
        for line in read_lines(shard):
            if isinstance(line, Skipped):
                yield line
                continue
            key = f"{shard.path.name}:{line.number}"
            try:
                yield self._sample(line.record, key)
            except SkipSample as error:
                yield skipped(key, error)

    @property
    def _metadata(self) -> Path:
        return self.path / "metadata.jsonl" if self.path.is_dir() else self.path

    @property
    def _root(self) -> Path:
        return self.image_root or self._metadata.parent

    def _sample(self, record: Json, key: str) -> Sample:
        name = field(record, "file_name", str)
        if "lines" not in record:
            raise SkipSample("no_lines", f"{name}: the record has no 'lines' with quads")
        size = field(record, "size", list)
        if len(size) != 2 or not all(isinstance(side, int) for side in size):
            raise SkipSample("bad_size", f"{name}: size is {size!r:.40}, expected [width, height]")
        regions = []
        for line in field(record, "lines", list):
            text = clean_text(field(line, "text", str), "text of a line")
            regions.append(Region(text, quads=(quad_from_points(field(line, "quad", list), *size),)))
        if not regions:
            raise SkipSample("no_lines", f"{name}: 'lines' is empty")
        language: Literal["en", "zh"] = "zh" if record.get("lang", self.language) == "zh" else "en"
        image = read_image(self._root, name)
        text = " ".join(region.text for region in regions)
        return Sample(key, self.name, "ocr", language, (image,), text=text, regions=tuple(regions))
