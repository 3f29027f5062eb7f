"""The first half of preparation: from a unit of work (a shard of a source) to a part (its tokenized samples, on disk).

The name of a part is the fingerprint of its unit: the hash of everything that the part depends on. This is the options
of the source and its filters, the tokenizing options, and the shard with the size and time of its files. So parts can
be made in any order, by any number of processes on any machine. An existing part is finished and is not made again. A
part of another recipe or of other files has another name.

Every image is decoded here once, so that training meets no unreadable image. An image that fails is skipped and counted
under its reason.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from megatron_vl import __version__
from megatron_vl.data.dataset.rows import join_tokens
from megatron_vl.data.filters.duplicates import dhash
from megatron_vl.data.filters.rules import SampleFilter
from megatron_vl.data.formats.shard import Shard, Skipped
from megatron_vl.data.images.decode import check_image, decode_image
from megatron_vl.data.prepare.part_files import PartWriter, write_part_files
from megatron_vl.data.prepare.recipe import DataRecipe, SourceEntry
from megatron_vl.data.prompting.tokenize import TokenizeOptions, tokenize_sample
from megatron_vl.data.prompting.tokenizer import QwenTokenizer
from megatron_vl.data.remote.places import state_of
from megatron_vl.data.sample import TASKS, ImageRef, Sample
from megatron_vl.errors import DataError, SkipSample

_FORMAT = 4


@dataclass(frozen=True)
class Unit:
    """A unit of work: a shard of a source that becomes one part."""

    source_index: int
    shard: Shard
    name: str
    """Fingerprint of everything that the part depends on."""

    def __str__(self) -> str:
        return f"{self.shard.path}, shard {self.shard.name}"


def plan_units(recipe: DataRecipe) -> list[Unit]:
    """Return the work of a recipe in its fixed order.

    Raises:
        DataError: Files of a source are missing.
    """
    units = []
    for source_index, entry in enumerate(recipe.sources):
        with _named(entry):
            common = _common_facts(recipe, entry)
            states: dict[Path, tuple[int, int | str] | None] = {}  # one question for each file, not for each shard
            for shard in entry.source.shards():
                if shard.path not in states:
                    by_contents = shard.contents and shard.path.is_dir()
                    states[shard.path] = None if by_contents else _state(shard.path)
                facts = json.dumps([common, dataclasses.asdict(shard), states[shard.path]], default=str)
                units.append(Unit(source_index, shard, hashlib.sha256(facts.encode()).hexdigest()[:32]))
    return units


def write_part(recipe: DataRecipe, unit: Unit, folder: Path) -> int:
    """Read, check and tokenize the samples of a unit into its part; return the number of kept samples.

    A unit keeps at most as many samples as the limit of the whole source.

    Raises:
        DataError: A file of the source is unusable.
    """
    entry = recipe.sources[unit.source_index]
    with write_part_files(part_prefix(folder, unit)) as writer:
        maker = _PartMaker(recipe, entry, writer)
        with _named(entry):
            for item in entry.source.read(unit.shard):
                maker.add(item)
                if entry.limit is not None and writer.num_samples >= entry.limit:
                    break
    return writer.num_samples


def part_prefix(folder: Path, unit: Unit) -> Path:
    """Return the path prefix of the part of a unit."""
    return folder / unit.name


class _PartMaker:
    """Convert the items of a reader into the samples of one part."""

    def __init__(self, recipe: DataRecipe, entry: SourceEntry, writer: PartWriter) -> None:
        self._recipe = recipe
        self._tokenizer = _load_tokenizer(recipe.num_bpe_tokens, recipe.vocab_file)
        self._options = _tokenize_options(recipe)
        self._source = entry.source
        self._filter = SampleFilter(entry.filters)
        self._needs_dhash = entry.filters.needs_looks
        self._writer = writer

    def add(self, item: Sample | Skipped) -> None:
        """Keep a sample, or count the reason why it is skipped."""
        if isinstance(item, Skipped):
            self._writer.skip(item)
            return
        if item.score is not None:
            self._writer.count_score()
        try:
            self._keep(item)
        except SkipSample as error:
            self._writer.skip(Skipped(item.key, error.reason, error.detail))

    def _keep(self, sample: Sample) -> None:
        most = self._recipe.pack.max_images
        if len(sample.images) > most:
            raise SkipSample("too_many_images", f"{len(sample.images)}, a row takes {most}")
        tokenized = tokenize_sample(self._filter.apply(sample), self._tokenizer, self._options)
        checked = [self._check(image) for image in sample.images]  # check all images before storing any
        images = [self._writer.add_image(*fresh) if number is None else number for number, fresh in checked]
        joined = join_tokens(tokenized.tokens, tokenized.supervised)
        self._writer.add_sample(joined, sample.key, task=TASKS.index(sample.task), images=images)

    def _check(self, image: ImageRef) -> tuple[int | None, tuple[bytes, bytes, int]]:
        """Return the number of the image if it is stored (else None), and its bytes, SHA-256 and perceptual hash.

        An image that is not stored is decoded first.

        Raises:
            SkipSample: The image cannot be used.
        """
        try:
            image = self._source.settle(image)
            digest = hashlib.sha256(image.data).digest()
            number, image_hash = self._writer.find_image(digest), 0
            if number is None:
                decoded = decode_image(image.data) if self._needs_dhash else None
                self._filter.check_image(check_image(image.data) if decoded is None else decoded.size)
                image_hash = 0 if decoded is None else dhash(decoded)
        except SkipSample as error:
            raise SkipSample(error.reason, f"image {image.key}: {error.detail}") from error
        return number, (image.data, digest, image_hash)


@lru_cache(maxsize=1)
def _load_tokenizer(num_bpe_tokens: int, vocab_file: str | None) -> QwenTokenizer:
    """Load the tokenizer once per worker, because a worker makes many parts."""
    return QwenTokenizer(num_bpe_tokens, vocab_file)


def _tokenize_options(recipe: DataRecipe) -> TokenizeOptions:
    return TokenizeOptions(recipe.num_queries, recipe.longest_sample, recipe.chat_style)


@contextlib.contextmanager
def _named(entry: SourceEntry) -> Iterator[None]:
    """Add the name of the source to a DataError about its files."""
    try:
        yield
    except DataError as error:
        raise DataError(f"source {entry.source.name!r}: {error}") from error


def _common_facts(recipe: DataRecipe, entry: SourceEntry) -> list[object]:
    """Return everything that all parts of a source depend on."""
    files = [*entry.source.files(), *filter(None, [entry.filters.exclude_images])]
    return [
        __version__, _FORMAT, type(entry.source).__name__, dataclasses.asdict(entry.source),
        dataclasses.asdict(entry.filters.of_samples), entry.filters.needs_looks,
        [_state(path) for path in files if not path.is_dir()], entry.limit, recipe.num_bpe_tokens, recipe.vocab_file,
        dataclasses.asdict(_tokenize_options(recipe)), recipe.pack.max_images,
    ]  # fmt: skip


def _state(path: Path) -> tuple[int, int | str] | None:
    """Return the state of a file, or of the archive that a path leads into, to detect changes."""
    for place in (path, *path.parents):
        with contextlib.suppress(OSError):
            if (state := state_of(place)) is not None:
                return state
    return None
