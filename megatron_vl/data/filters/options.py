"""The thresholds of cleaning, for all sources of a recipe (``filters:`` at the top) or for one (``filters:`` in it).

The paper names its rules and no threshold, so every rule is off unless a recipe asks for it; an entry of a source
replaces that of the top. Unknown keys and impossible values are errors that name the key.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from megatron_vl.config.records import Between, Builder
from megatron_vl.errors import ConfigError

MOST_DISTANCE = 7
"""Of two 64-bit perceptual hashes: more bits than this say nothing."""


@dataclass(frozen=True)
class FilterOptions:
    """What is dropped, and what is cleaned. ``None`` and the defaults switch a rule off."""

    min_score: float | None = None
    """Drop samples whose CLIP score, as the source's metadata says it, is below; thresholds differ by data set."""
    drop_unscored: bool = False
    """Where ``min_score`` is set: drop samples without a score, which pass otherwise."""
    min_side: Annotated[int, Between(0)] | None = None
    """Drop samples with an image whose shorter side has fewer pixels."""
    max_aspect_ratio: Annotated[float, Between(1)] | None = None
    """Drop samples with an image whose longer side is more than so many times the shorter one."""
    min_characters: Annotated[int, Between(0)] | None = None
    """Drop samples with a shorter text (caption, answer, document, all turns or lines together)."""
    max_characters: Annotated[int, Between(0)] | None = None
    """Drop samples with a longer text."""
    letters: Literal["any", "latin", "han", "latin_han"] = "any"
    """Drop samples with letters of other scripts; latin is ASCII and Latin-1, han the Chinese characters."""
    max_foreign_letters: Annotated[int, Between(0)] = 0
    """Letters of other scripts that ``letters`` tolerates in a sample."""
    match_language: bool = False
    """Drop samples of language zh without a Chinese character, and of language en with one."""
    drop_emoji: bool = False
    """Drop samples with an emoji."""
    drop_special_tags: bool = False
    """Drop samples with tags such as <PERSON>, [UNK], <|im_start|> or <img> (not chats, whose markup has meaning)."""
    strip_html: bool = False
    """Remove HTML tags and comments from the text, and resolve entities."""
    strip_irregular: bool = False
    """Remove addresses, control and invisible characters, and runs of one mark or of blanks from the text."""
    remove_patterns: tuple[str, ...] = ()
    """Regular expressions; what they match is removed from the text."""
    drop_patterns: tuple[str, ...] = ()
    """Regular expressions; a sample whose cleaned text matches one is dropped."""
    exclude_images: Path | None = None
    """File with one image a line, by name, name without suffix, or number: samples with one of them are dropped."""
    benchmark_images: Path | None = None
    """Folder of images, or file of hashes (one a line, see docs/data.md): samples with one of them are dropped."""
    benchmark_distance: Annotated[int, Between(0, MOST_DISTANCE)] = 0
    """Bits in which the perceptual hashes of an image and a benchmark's may differ."""
    duplicates: Literal["keep", "exact", "near"] = "keep"
    """Drop a sample with one image if an earlier sample has the same file, or one with nearly equal looks."""
    duplicate_distance: Annotated[int, Between(0, MOST_DISTANCE)] = 0
    """Bits in which the perceptual hashes of ``near`` duplicates may differ."""

    @property
    def needs_looks(self) -> bool:
        """Whether images need perceptual hashes."""
        return self.duplicates == "near" or self.benchmark_images is not None

    @property
    def of_samples(self) -> FilterOptions:
        """These options without what compares images with one another."""
        return dataclasses.replace(
            self, benchmark_images=None, benchmark_distance=0, duplicates="keep", duplicate_distance=0
        )


def read_filters(values: Any, where: str, *, root: Path, base: FilterOptions | None = None) -> FilterOptions:
    """The options of a recipe's ``filters`` mapping over those of ``base``.

    Relative paths count from ``root``. Raises ConfigError naming the key.
    """
    options = Builder(root=root).build(FilterOptions, values, where, base=base or FilterOptions())
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
