"""The thresholds of cleaning, for all sources of a recipe (``filters:`` at the top) or for one (``filters:`` in it).

The paper names its rules and no threshold, so every rule is off unless a recipe asks for it; an entry of a source
replaces that of the top. Unknown keys and impossible values are errors that name the key.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_vl.config.fields import nearest
from megatron_vl.data.formats.values import as_number
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
    min_side: int | None = None
    """Drop samples with an image whose shorter side has fewer pixels."""
    max_aspect_ratio: float | None = None
    """Drop samples with an image whose longer side is more than so many times the shorter one."""
    min_characters: int | None = None
    """Drop samples with a shorter text (caption, answer, document, all turns or lines together)."""
    max_characters: int | None = None
    """Drop samples with a longer text."""
    letters: Literal["any", "latin", "han", "latin_han"] = "any"
    """Drop samples with letters of other scripts; latin is ASCII and Latin-1, han the Chinese characters."""
    max_foreign_letters: int = 0
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
    benchmark_distance: int = 0
    """Bits in which the perceptual hashes of an image and a benchmark's may differ."""
    duplicates: Literal["keep", "exact", "near"] = "keep"
    """Drop a sample with one image if an earlier sample has the same file, or one with nearly equal looks."""
    duplicate_distance: int = 0
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
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: found {values!r:.60}, expected a mapping")
    hints = typing.get_type_hints(FilterOptions)
    changes = {}
    for key, value in values.items():
        if key not in hints:
            near = nearest(str(key), hints)
            raise ConfigError(f"{where}: unknown key {key!r}; " + (f"did you mean {near!r}?" if near else
                              f"valid are {', '.join(hints)}"))  # fmt: skip
        changes[key] = _convert(value, hints[key], f"{where}.{key}", root)
    return dataclasses.replace(base or FilterOptions(), **changes)


def _convert(value: Any, hint: Any, where: str, root: Path) -> Any:
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        hint = typing.get_args(hint)[0]
    if typing.get_origin(hint) is Literal:
        if value not in typing.get_args(hint):
            raise ConfigError(f"{where}: found {value!r}, expected one of {', '.join(typing.get_args(hint))}")
        return value
    if typing.get_origin(hint) is tuple:
        return _patterns(value, where)
    if hint is Path:
        return _path(value, where, root)
    if hint is bool:
        if not isinstance(value, bool):
            raise ConfigError(f"{where}: found {value!r:.60}, expected true or false")
        return value
    return _number(value, hint, where)


def _number(value: Any, kind: type[int] | type[float], where: str) -> int | float:
    if kind is float and isinstance(value, str):  # YAML takes 1e-3 for a text
        value = value if (number := as_number(value)) is None else number
    accepted = int if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, accepted):
        raise ConfigError(f"{where}: found {value!r:.60}, expected {'an integer' if kind is int else 'a number'}")
    if kind is int and value < 0:
        raise ConfigError(f"{where}: found {value}, expected 0 or more")
    if where.endswith("_distance") and value > MOST_DISTANCE:
        raise ConfigError(f"{where}: found {value}, expected 0 to {MOST_DISTANCE} of the 64 bits")
    if where.endswith("max_aspect_ratio") and not value >= 1:
        raise ConfigError(f"{where}: found {value}, expected 1 (squares only) or more")
    return value


def _path(value: Any, where: str, root: Path) -> Path:
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{where}: found {value!r:.60}, expected a path")
    path = root / value
    if not path.exists():
        raise ConfigError(f"{where}: {path}: no such file or folder")
    return path


def _patterns(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ConfigError(f"{where}: found {value!r:.60}, expected a list of regular expressions")
    for pattern in value:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"{where}: {pattern!r} is not a regular expression ({error})") from error
    return tuple(value)
