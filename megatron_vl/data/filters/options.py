"""The thresholds of cleaning, for all sources of a recipe (``filters:`` at the top) or for one (``filters:`` in it).

The paper names its rules but no thresholds, so every rule is off unless a recipe turns it on. An entry of a source
overrides the entry at the top. Unknown keys and impossible values are errors that name the key.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from megatron_vl.config.records import Between, Builder
from megatron_vl.data.remote.places import place_of
from megatron_vl.errors import ConfigError

MOST_DISTANCE = 7
"""Greatest useful distance of two 64-bit perceptual hashes. A larger distance says nothing."""


@dataclass(frozen=True)
class FilterOptions:
    """Rules that drop or clean samples. ``None`` and the defaults turn a rule off."""

    min_score: float | None = None
    """Drop samples whose CLIP score in the source's metadata is lower. Thresholds differ by data set."""
    drop_unscored: bool = False
    """With ``min_score``: drop samples without a score, which are kept otherwise."""
    min_side: Annotated[int, Between(0)] | None = None
    """Drop samples with an image whose shorter side has fewer pixels."""
    max_aspect_ratio: Annotated[float, Between(1)] | None = None
    """Drop samples with an image whose longer side is more than this many times the shorter side."""
    min_characters: Annotated[int, Between(0)] | None = None
    """Drop samples with a shorter text (caption, answer, document, all turns or lines together)."""
    max_characters: Annotated[int, Between(0)] | None = None
    """Drop samples with a longer text."""
    letters: Literal["any", "latin", "han", "latin_han"] = "any"
    """Drop samples with letters of other scripts. ``latin`` is ASCII and Latin-1, ``han`` the Chinese characters."""
    max_foreign_letters: Annotated[int, Between(0)] = 0
    """Number of letters of other scripts that ``letters`` tolerates in a sample."""
    match_language: bool = False
    """Drop samples of language zh without a Chinese character, and of language en with one."""
    drop_emoji: bool = False
    """Drop samples with an emoji."""
    drop_special_tags: bool = False
    """Drop samples with tags such as <PERSON>, [UNK], <|im_start|> or <img> (not chats, where they have a meaning)."""
    strip_html: bool = False
    """Remove HTML tags and comments from the text, and resolve entities."""
    strip_irregular: bool = False
    """Remove URLs, control and invisible characters from the text, and shorten runs of one mark or of white space."""
    remove_patterns: tuple[str, ...] = ()
    """Regular expressions whose matches are removed from the text."""
    drop_patterns: tuple[str, ...] = ()
    """Regular expressions. A sample whose cleaned text matches one is dropped."""
    exclude_images: Path | None = None
    """File with one image per line, by name, name without suffix, or number. Samples with one of them are dropped."""
    benchmark_images: Path | None = None
    """Folder of images, or file of hashes (one per line, see docs/data.md). Samples with one of them are dropped."""
    benchmark_distance: Annotated[int, Between(0, MOST_DISTANCE)] = 0
    """Greatest distance in bits between the perceptual hashes of an image and of a benchmark image."""
    duplicates: Literal["keep", "exact", "near"] = "keep"
    """Drop a sample with one image if an earlier one has the same file (``exact``) or a similar image (``near``)."""
    duplicate_distance: Annotated[int, Between(0, MOST_DISTANCE)] = 0
    """Greatest distance in bits between the perceptual hashes of ``near`` duplicates."""

    @property
    def needs_looks(self) -> bool:
        """Whether images need perceptual hashes."""
        return self.duplicates == "near" or self.benchmark_images is not None

    @property
    def of_samples(self) -> FilterOptions:
        """These options without those that compare images with each other."""
        return dataclasses.replace(
            self, benchmark_images=None, benchmark_distance=0, duplicates="keep", duplicate_distance=0
        )


def read_filters(values: Any, where: str, *, root: Path, base: FilterOptions | None = None) -> FilterOptions:
    """Return the options of a recipe's ``filters`` mapping, with defaults from ``base``.

    Relative paths are relative to ``root``.

    Raises:
        ConfigError: A key or value is wrong; the message names the key.
    """
    options = Builder(root=root, locate=place_of).build(FilterOptions, values, where, base=base or FilterOptions())
    for name in ("exclude_images", "benchmark_images"):
        path = getattr(options, name)
        if name in values and path is not None and not path.exists():
            raise ConfigError(f"{where}.{name}: {path}: no such file or folder")
    for name in ("remove_patterns", "drop_patterns"):
        for pattern in getattr(options, name):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"{where}.{name}: {pattern!r} is not a regular expression ({error})") from error
    return options
