"""Plain documents in JSON Lines, one object per line, with the document under ``text`` as in Megatron-LM."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_vl.data.formats.record_files import folder_shards, read_samples
from megatron_vl.data.formats.shard import Shard, Skipped
from megatron_vl.data.formats.values import Json, clean_text, language_of, words_in
from megatron_vl.data.sample import Sample
from megatron_vl.data.sources.base import Source


@dataclass(frozen=True)
class Text(Source):
    """Documents from JSON Lines."""

    path: Path
    """A .jsonl file, or a folder of them."""
    text_field: str = "text"
    """Field that holds the document."""
    language: Literal["en", "zh"] = "en"
    """Language of the documents. A record's own ``lang`` overrides it."""
    records_per_shard: int = 100_000
    """Documents in a shard."""

    def shards(self) -> list[Shard]:
        return folder_shards(self.path, self.records_per_shard)

    def read(self, shard: Shard) -> Iterator[Sample | Skipped]:
        return read_samples(shard, self._sample)

    def _sample(self, record: Json, key: str) -> Sample:
        text = clean_text(words_in(record, self.text_field), self.text_field)
        return Sample(key, self.name, "text", language_of(record, self.language), text=text)
