"""Plain documents in JSON Lines, one object a line, the document under ``text`` as in Megatron-LM."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_vl.data.sample import Sample
from megatron_vl.data.sources.base import Shard, Skipped, Source, clean_text, field, skipped
from megatron_vl.data.sources.jsonl import line_shards, read_lines
from megatron_vl.errors import DataError, SkipSample


@dataclass(frozen=True)
class Text(Source):
    """Documents from JSON Lines."""

    path: Path
    """A .jsonl file, or a folder of them."""
    text_field: str = "text"
    """Field that holds the document."""
    language: Literal["en", "zh"] = "en"
    """Language of the documents; a record's own ``lang`` wins."""
    records_per_shard: int = 100_000
    """Documents in a unit of work."""

    def shards(self) -> list[Shard]:
        files = sorted(self.path.glob("*.jsonl")) if self.path.is_dir() else [self.path]
        if not files:
            raise DataError(f"{self.path}: no .jsonl file in this folder")
        return [shard for file in files for shard in line_shards(file, self.records_per_shard)]

    def read(self, shard: Shard) -> Iterator[Sample | Skipped]:
        for line in read_lines(shard):
            if isinstance(line, Skipped):
                yield line
                continue
            key = f"{shard.path.name}:{line.number}"
            try:
                text = clean_text(field(line.record, self.text_field, str), self.text_field)
            except SkipSample as error:
                yield skipped(key, error)
                continue
            language: Literal["en", "zh"] = "zh" if line.record.get("lang", self.language) == "zh" else "en"
            yield Sample(key, self.name, "text", language, text=text)
