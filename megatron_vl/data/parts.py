"""The first half of preparation: one unit of work (shards of a source) -> one part (its tokenized samples, on
disk).

A part depends on nothing but the recipe and its shards, so parts may be made in any order, by any number of
processes on any machine; :mod:`megatron_vl.data.merge` puts them together in the order of the units. A part
is

    <part>.tokens.{bin,idx}   one sequence per sample, targets complemented (see rows.py)
    <part>.images.{bin,idx}   each image of the part once
    <part>.json               lengths, tasks, images of each sample; keys; what was skipped. Written last.

Every image is decoded here once, so that training meets no unreadable one; what fails is skipped under its
reason.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import get_args

from megatron_vl.data.image import decode_image
from megatron_vl.data.indexed import IndexedFile, IndexedWriter
from megatron_vl.data.manifest import NUM_EXAMPLES
from megatron_vl.data.recipe import DataRecipe
from megatron_vl.data.rows import join_tokens
from megatron_vl.data.sample import ImageRef, Sample, Task
from megatron_vl.data.sources.base import Shard, Skipped
from megatron_vl.data.tokenize import TokenizeOptions, tokenize_sample
from megatron_vl.data.tokenizer import QwenTokenizer
from megatron_vl.errors import SkipSample

TASKS: tuple[str, ...] = get_args(Task)


@dataclass(frozen=True)
class Unit:
    """A unit of work: shards of one source that become one part."""

    index: int
    source_index: int
    shards: tuple[Shard, ...]
    limit: int | None = None
    """Samples to keep at most."""


@dataclass
class PartIndex:
    """``<part>.json``; filled while the part is written."""

    source: str
    keys: list[str] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    images: list[list[int]] = field(default_factory=list)
    """For each sample the indices of its images in the part."""
    hashes: list[str] = field(default_factory=list)
    """SHA-256 of each image of the part."""
    skips: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def skip(self, skipped: Skipped) -> None:
        """Count a sample that was left out, and name it if it is among the first."""
        self.skips[skipped.reason] = self.skips.get(skipped.reason, 0) + 1
        examples = self.examples.setdefault(skipped.reason, [])
        if len(examples) < NUM_EXAMPLES:
            examples.append(f"{skipped.key}: {skipped.detail}" if skipped.detail else skipped.key)


@dataclass(frozen=True)
class Part:
    """A finished part, opened for reading."""

    index: PartIndex
    tokens: IndexedFile
    images: IndexedFile

    def close(self) -> None:
        """Close the files."""
        self.tokens.close()
        self.images.close()


def plan_units(recipe: DataRecipe) -> list[Unit]:
    """The work of a recipe in its fixed order: a unit per shard, or one for all shards of a source with a
    limit.

    Raises DataError if the files of a source are missing.
    """
    units: list[Unit] = []
    for source_index, entry in enumerate(recipe.sources):
        shards = tuple(entry.source.shards())
        groups = [shards] if entry.limit is not None else [(shard,) for shard in shards]
        units += [Unit(len(units) + i, source_index, group, entry.limit) for i, group in enumerate(groups)]
    return units


def write_part(recipe: DataRecipe, unit: Unit, prefix: Path) -> int:
    """Read, check and tokenize the samples of a unit into the part at ``prefix``; returns the number kept.

    Raises DataError if a file of the source turns out to be useless.
    """
    source = recipe.sources[unit.source_index].source
    writer = _PartWriter(recipe, source.name, prefix)
    try:
        for item in itertools.chain.from_iterable(source.read(shard) for shard in unit.shards):
            writer.add(item)
            if unit.limit is not None and writer.num_samples >= unit.limit:
                break
        writer.finish()
    finally:
        writer.close()
    return writer.num_samples


def open_part(prefix: Path) -> Part:
    """Open a finished part."""
    index = PartIndex(**json.loads(_index_path(prefix).read_text(encoding="utf-8")))
    return Part(index, IndexedFile(f"{prefix}.tokens"), IndexedFile(f"{prefix}.images"))


class _PartWriter:
    """Collects the samples of one part."""

    def __init__(self, recipe: DataRecipe, source: str, prefix: Path) -> None:
        self._recipe = recipe
        self._prefix = prefix
        self._tokenizer = _load_tokenizer(recipe.num_ranks, recipe.vocab_file)
        self._options = TokenizeOptions(recipe.num_queries, recipe.longest_sample, recipe.chat_style)
        self._index = PartIndex(source)
        self._tokens = IndexedWriter(f"{prefix}.tokens", "int32")
        self._images = IndexedWriter(f"{prefix}.images", "uint8")
        self._image_by_hash: dict[str, int] = {}

    @property
    def num_samples(self) -> int:
        return len(self._index.keys)

    def add(self, item: Sample | Skipped) -> None:
        """Keep a sample, or count why not."""
        if isinstance(item, Skipped):
            self._index.skip(item)
            return
        try:
            self._keep(item)
        except SkipSample as error:
            self._index.skip(Skipped(item.key, error.reason, error.detail))

    def finish(self) -> None:
        """Write the indices; the part's own index last."""
        self._tokens.finish()
        self._images.finish()
        _index_path(self._prefix).write_text(json.dumps(asdict(self._index)), encoding="utf-8")

    def close(self) -> None:
        """Close the files, finished or not."""
        self._tokens.abort()
        self._images.abort()

    def _keep(self, sample: Sample) -> None:
        most = self._recipe.pack.max_images
        if len(sample.images) > most:
            raise SkipSample("too_many_images", f"{len(sample.images)}, a row takes {most}")
        tokenized = tokenize_sample(sample, self._tokenizer, self._options)
        hashes = list(self._checked(sample.images))
        self._tokens.add(join_tokens(tokenized.tokens, tokenized.supervised))
        self._index.keys.append(sample.key)
        self._index.tasks.append(sample.task)
        self._index.lengths.append(tokenized.length)
        self._index.images.append([self._store(*pair) for pair in zip(hashes, sample.images, strict=True)])

    def _checked(self, images: Iterable[ImageRef]) -> Iterator[str]:
        """SHA-256 of each image, after decoding those that were not seen before."""
        for image in images:
            digest = hashlib.sha256(image.data).hexdigest()
            if digest not in self._image_by_hash:
                try:
                    decode_image(image.data)
                except SkipSample as error:
                    raise SkipSample(error.reason, f"image {image.key}: {error.detail}") from error
            yield digest

    def _store(self, digest: str, image: ImageRef) -> int:
        if digest not in self._image_by_hash:
            self._image_by_hash[digest] = self._images.add(image.data)
            self._index.hashes.append(digest)
        return self._image_by_hash[digest]


@lru_cache(maxsize=1)
def _load_tokenizer(num_ranks: int, vocab_file: str | None) -> QwenTokenizer:
    """A worker makes many parts and reads the vocabulary once."""
    return QwenTokenizer(num_ranks, vocab_file)


def _index_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".json")
