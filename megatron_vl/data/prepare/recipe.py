"""The recipe of a data set: its sources, and how they are tokenized and packed.

    sources:
      - {name: scenes, type: img2dataset, path: raw/scenes}
      - {name: questions, type: vqa, questions: raw/vqa.json, image_root: raw/images, weight: 2, limit: 50000}
    seq_length: 2048
    num_queries: 256          # these two may come from --model-preset
    num_bpe_tokens: 151643
    pack: {mode: mixed, max_images: 7}
    filters: {min_side: 64, drop_emoji: true}
    mixture: {groups: {captioning: 19.7M}, max_repeats: 2}

``weight`` repeats a source (2: every sample twice; 0.5: every other sample). ``limit`` keeps its first samples.
``samples`` or ``group`` give it an amount (mixture.py). ``filters`` set its own thresholds. All other keys of a source
are options of its reader. An unknown key is an error that suggests the nearest valid key.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal

from megatron_vl.addresses import is_address, require_local
from megatron_vl.config.records import Between, Builder
from megatron_vl.config.strict_yaml import read_yaml
from megatron_vl.data.dataset.rows import MAX_IMAGES_PER_ROW
from megatron_vl.data.filters.options import FilterOptions, read_filters
from megatron_vl.data.formats.values import as_number
from megatron_vl.data.prompting.chat import ChatStyle
from megatron_vl.data.remote.places import place_of
from megatron_vl.data.sources.base import Source
from megatron_vl.data.sources.registry import build_source
from megatron_vl.errors import ConfigError

_Positive = Annotated[int, Between(1)]


@dataclass(frozen=True)
class PackOptions:
    """Rules for samples that share rows."""

    mode: Literal["mixed", "task", "none"] = "mixed"
    """``mixed``; ``task``: each row has samples of one task (few-shot rows); ``none``: one sample per row."""
    max_images: Annotated[int, Between(1, MAX_IMAGES_PER_ROW)] = MAX_IMAGES_PER_ROW
    """Greatest number of images in a row."""
    min_piece: _Positive = 16
    """Shorter gaps are not filled with text."""
    seed: Annotated[int, Between(0)] = 0
    """Seed of the shuffle before packing."""
    block_samples: _Positive = 2**24
    """Greatest number of samples that are packed together. More are packed in blocks with files of their own."""


@dataclass(frozen=True)
class SourceEntry:
    """One source, its filters, and the amount that is used."""

    source: Source
    weight: float = 1.0
    limit: int | None = None
    """Greatest number of samples to read: the first ones that pass the filters of single samples."""
    group: str | None = None
    """Group of the mixture, if amounts are given. A source with ``samples`` is a group of its own."""
    filters: FilterOptions = field(default_factory=FilterOptions)
    needs_scores: bool = False
    """Whether ``score_field`` or a filter requires a score. Then it is an error if no record has one."""


@dataclass(frozen=True)
class MixtureOptions:
    """Amounts of the groups of sources, see mixture.py."""

    groups: dict[str, int] = field(default_factory=dict)
    """Samples of each group. If there are fewer samples, only the proportions of the amounts hold."""
    max_repeats: float = 1.0
    """Greatest number of uses of the samples of a group."""


@dataclass(frozen=True)
class DataRecipe:
    """Everything that the prepared rows depend on."""

    sources: tuple[SourceEntry, ...]
    num_queries: _Positive
    num_bpe_tokens: _Positive
    seq_length: _Positive = 2048
    max_sample_length: _Positive | None = None
    """Greatest length of a sample, by default that of a row (stage 1 of the paper: 512)."""
    chat_style: ChatStyle = "paper"
    exif_orientation: Literal["ignore", "apply"] = "ignore"
    """Take images as they are stored, or apply their EXIF orientation. A source's own value overrides this."""
    vocab_file: str | None = None
    pack: PackOptions = field(default_factory=PackOptions)
    filters: FilterOptions = field(default_factory=FilterOptions)
    """Filters of all sources. A source's own entries override these."""
    mixture: MixtureOptions = field(default_factory=MixtureOptions)
    allow_empty: bool = False
    """Continue if no sample of a source passes. By default this is an error."""

    @property
    def longest_sample(self) -> int:
        """Greatest length of a sample in tokens."""
        return self.max_sample_length or self.seq_length


def load_recipe(path: Path, defaults: Mapping[str, int] | None = None, *, root: str | Path | None = None) -> DataRecipe:
    """Read a recipe. ``defaults`` give ``num_queries`` and ``num_bpe_tokens`` of a model preset if they are missing.

    Relative paths are relative to ``root``, by default the recipe's folder. Both may be addresses: paths of sources,
    and ``root``.

    Raises:
        ConfigError: The recipe is not valid; the message names file and key.
    """
    require_local(path, "the recipe", "copy it to one")
    values, _ = read_yaml(path)
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping with 'sources', found {type(values).__name__}")
    values = {**(defaults or {}), **values}
    for key in ("sources", "num_queries", "num_bpe_tokens"):
        if key not in values:
            hint = "" if key == "sources" else " (or give --model-preset)"
            raise ConfigError(f"{path}: {key} is missing{hint}")
    root = _root(root) if root else path.parent
    filters = read_filters(values.get("filters", {}), f"{path}: filters", root=root)
    sources, amounts = _sources(_with_defaults(values), path, root, filters)
    read = {
        "sources": sources,
        "vocab_file": _vocab_file(values.get("vocab_file"), f"{path}: vocab_file", root),
        "filters": filters,
        "mixture": _mixture(values.get("mixture", {}), amounts, f"{path}: mixture"),
    }
    recipe = Builder().build(DataRecipe, {**values, **read}, str(path))
    _check_values(recipe, str(path))
    _check_groups(recipe, str(path))
    return recipe


def _root(given: str | Path) -> Path:
    try:
        return place_of(None, given)
    except ValueError as error:
        raise ConfigError(f"--root: {error}") from error


def without_missing(recipe: DataRecipe) -> tuple[DataRecipe, list[str]]:
    """Return the recipe without sources whose files are missing, and a line about each of those sources.

    Raises:
        ConfigError: No source is left.
    """
    missing = {entry.source.name: _absent(entry.source) for entry in recipe.sources}
    sources = tuple(entry for entry in recipe.sources if not missing[entry.source.name])
    lines = [f"source {name} is left out: {paths[0]} is missing" for name, paths in missing.items() if paths]
    if not sources:
        raise ConfigError("the files of all sources are missing:\n  " + "\n  ".join(lines))
    served = {entry.group for entry in sources}
    groups = {name: amount for name, amount in recipe.mixture.groups.items() if name in served}
    mixture = dataclasses.replace(recipe.mixture, groups=groups)
    return dataclasses.replace(recipe, sources=sources, mixture=mixture), lines


def _absent(source: Source) -> list[Path]:
    """Return paths of a source that neither exist nor lead into a file (a zip)."""
    values = [getattr(source, item.name) for item in dataclasses.fields(source)]
    paths = [value for value in values if isinstance(value, Path)]
    return [path for path in paths if not path.exists() and not any(parent.is_file() for parent in path.parents)]


def read_amount(value: Any, where: str) -> int:
    """Return a number of samples, given as an integer or as a number followed by K, M or B. Raises ConfigError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMB]?)", str(value)) if type(value) in (int, str) else None
    amount = Decimal(match[1]) * {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}[match[2]] if match else Decimal(0)
    if amount < 1 or amount != int(amount):
        raise ConfigError(f"{where}: found {value!r:.60}, expected a number of samples such as 350000, 350K or 19.7M")
    return int(amount)


def _with_defaults(values: Mapping[str, Any]) -> Any:
    """Return the source entries, with the values that the recipe sets for all of them added."""
    entries = values["sources"]
    if "exif_orientation" not in values or not isinstance(entries, list):
        return entries
    common = {"exif_orientation": values["exif_orientation"]}
    return [{**common, **entry} if isinstance(entry, dict) else entry for entry in entries]


def _sources(
    entries: Any, path: Path, root: Path, filters: FilterOptions
) -> tuple[tuple[SourceEntry, ...], dict[str, int]]:
    """Return the sources, and the amounts of those that have one of their own. Raises ConfigError."""
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"{path}: sources: expected a list of mappings with 'name' and 'type'")
    built = tuple(_source(entry, f"{path}: sources[{i}]", root, filters) for i, entry in enumerate(entries))
    names = [entry.source.name for entry in built]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{path}: sources: the name {name!r} occurs twice; sample keys would not be unique")
    amounts = {
        entry["name"]: read_amount(entry["samples"], f"{path}: sources[{i}].samples")
        for i, entry in enumerate(entries)
        if "samples" in entry
    }
    return built, amounts


_ENTRY_KEYS = ("weight", "limit", "samples", "group", "filters")
"""Keys of a source entry that are not options of its reader."""


def _source(entry: Any, where: str, root: Path, filters: FilterOptions) -> SourceEntry:
    if not isinstance(entry, dict):
        raise ConfigError(f"{where}: found {entry!r:.60}, expected a mapping with 'name' and 'type'")
    weight = _factor(entry.get("weight", 1.0), f"{where}.weight", "2 uses every sample twice")
    limit, group = entry.get("limit"), entry.get("group")
    if "samples" in entry and group is not None:
        raise ConfigError(f"{where}: 'samples' and 'group' exclude each other; the group has an amount already")
    group = Builder().convert(group, str | None, f"{where}.group")
    source = build_source({key: entry[key] for key in entry if key not in _ENTRY_KEYS}, where=where, root=root)
    cleaning = read_filters(entry.get("filters", {}), f"{where}.filters", root=root, base=filters)
    own = entry.get("filters", {})
    if own.get("min_score") is not None and not source.score_fields():
        raise ConfigError(
            f"{where}.filters.min_score: no record of this source has a score; name the field that holds it "
            "(score_field of img2dataset and pairs), or remove min_score"
        )
    return SourceEntry(
        source,
        weight=weight,
        limit=None if limit is None else read_amount(limit, f"{where}.limit"),
        group=source.name if "samples" in entry else group,
        filters=cleaning,
        needs_scores=bool(source.score_fields()) and ("score_field" in entry or cleaning.min_score is not None),
    )


def _mixture(values: Any, amounts: dict[str, int], where: str) -> MixtureOptions:
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: found {values!r:.60}, expected a mapping")
    groups, repeats = values.get("groups", {}), values.get("max_repeats", 1.0)
    if not isinstance(groups, dict):
        raise ConfigError(f"{where}.groups: found {groups!r:.60}, expected names and numbers of samples")
    repeats = _factor(repeats, f"{where}.max_repeats", "2 may use every sample twice")
    for name in amounts:
        if name in groups:
            raise ConfigError(f"{where}.groups: {name!r} is the name of a source that has its own 'samples'")
    named = {str(name): read_amount(value, f"{where}.groups.{name}") for name, value in groups.items()}
    return Builder().build(MixtureOptions, {**values, "groups": {**named, **amounts}, "max_repeats": repeats}, where)


def _factor(value: Any, where: str, meaning: str) -> float:
    """Return the factor by which samples are used. Raises ConfigError."""
    number = as_number(value)  # YAML parses 1e-3 as a string
    if number is None or not 0 < number <= 1000:
        raise ConfigError(f"{where}: found {value!r:.60}, expected a number above 0 and at most 1000 ({meaning})")
    return number


def _check_groups(recipe: DataRecipe, where: str) -> None:
    """Raise ConfigError unless all sources or none have amounts, and every amount has a source."""
    amounts = recipe.mixture.groups
    for index, entry in enumerate(recipe.sources):
        if entry.group is not None and entry.group not in amounts:
            known = f"known are {', '.join(amounts)}" if amounts else "there is no such entry"
            raise ConfigError(
                f"{where}: sources[{index}].group: {entry.group!r} has no amount in mixture.groups; {known}"
            )
        if entry.group is None and amounts:
            raise ConfigError(
                f"{where}: sources[{index}] ({entry.source.name}) has neither 'samples' nor 'group', but other sources "
                "have amounts; give all sources one, or none"
            )
    for name in amounts:
        if not any(entry.group == name for entry in recipe.sources):
            raise ConfigError(f"{where}: mixture.groups.{name}: no source is in this group; remove it")


def _vocab_file(value: Any, where: str, root: Path) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{where}: found {value!r:.60}, expected a path")
    require_local(value if is_address(value) else root / value, where, "download the file, or leave the key out")
    path = root / value
    if not path.is_file():
        raise ConfigError(
            f"{where}: {path}: no such file; expected Qwen's .tiktoken file. Without this key it is that of the "
            "package dashscope"
        )
    return str(path)


def _check_values(recipe: DataRecipe, where: str) -> None:
    if recipe.filters.min_score is not None and not any(entry.source.score_fields() for entry in recipe.sources):
        raise ConfigError(
            f"{where}: filters.min_score: no source has a score; name the field that holds it (score_field of "
            "img2dataset and pairs), or remove min_score"
        )
    if recipe.longest_sample > recipe.seq_length:
        raise ConfigError(
            f"{where}: max_sample_length {recipe.longest_sample} exceeds seq_length {recipe.seq_length}; a "
            "sample must fit "
            "into a row"
        )
