"""From a recipe and flags to a ``RunConfig``: defaults < size preset < recipe YAML < command line.

The recipe is nested by section with exactly the keys of the schema; the command line is flat with Megatron-LM's
spelling. Both name the same fields (``fields.py``), so there is nothing to keep in step. Errors name the file and
line or the flag, the value, what was expected and the nearest valid name: a typing mistake must never train.

The preset is looked up before anything else is applied, because it replaces the defaults of the whole model section.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml

from megatron_vl.addresses import require_local
from megatron_vl.config.fields import (
    FieldSpec,
    Value,
    from_text,
    from_yaml,
    iterate_fields,
    read_docs,
    section_paths,
    suggest_field,
)
from megatron_vl.config.presets import PRESETS
from megatron_vl.config.records import describe_value
from megatron_vl.config.schema import RunConfig
from megatron_vl.config.strict_yaml import KeyPath, read_yaml
from megatron_vl.config.suggestions import suggestion
from megatron_vl.errors import ConfigError

ALIASES: dict[str, tuple[str, ...]] = {
    "training.freeze_language_model": ("--freeze-LM",),
    "training.freeze_vision": ("--freeze-ViT",),
    "parallel.virtual_pipeline_model_parallel_size": ("--num-virtual-stages-per-pipeline-rank",),
    "parallel.pipeline_layout": ("--pipeline-model-parallel-layout",),
}
"""Second spellings that Megatron-LM's users have in their scripts."""
RETIRED = ("data.vocab_file",)
"""Keys that did nothing; the ``config.yaml`` of earlier checkpoints has them as null. With a value they are unknown."""

Node = TypeVar("Node")
Overrides = Mapping[str, Value]
"""Values by dotted path."""


class FlagParser(argparse.ArgumentParser):
    """An argument parser that raises ``ConfigError`` where argparse would leave the process."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"command line: {message}")


def load_config(recipe: Path | None, argv: Sequence[str] = ()) -> RunConfig:
    """Return the configuration of ``recipe`` with the flags ``argv`` applied.

    Raises ``ConfigError`` for an unreadable recipe, an unknown key or flag, and a value of the wrong type.
    """
    parser = FlagParser(add_help=False, allow_abbrev=False)
    add_flags(parser)
    flags, words = parse_flags(parser, argv)
    if words:
        raise ConfigError(f"command line: '{words[0]}' belongs to no flag")
    return resolve(recipe, flags)


def resolve(recipe: Path | None, flags: argparse.Namespace) -> RunConfig:
    """Return the configuration of ``recipe`` with parsed ``flags`` applied; raises as :func:`load_config`."""
    overrides = {} if recipe is None else read_recipe(recipe)
    overrides |= _overrides_from_flags(flags)
    _refuse_addresses(overrides)
    preset = overrides.get("model.preset", RunConfig().model.preset)
    if preset not in PRESETS:
        raise ConfigError(
            f"model.preset is {preset!r}; expected one of {', '.join(PRESETS)}{suggestion(str(preset), PRESETS)}"
        )
    return apply_overrides(RunConfig(model=PRESETS[str(preset)]), overrides)


def _refuse_addresses(overrides: Overrides) -> None:
    for dotted, value in overrides.items():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, str):
                require_local(item, dotted, "copy what is there to one (only raw data is read from addresses)")


def apply_overrides(config: RunConfig, overrides: Overrides) -> RunConfig:
    """Return ``config`` with values replaced by dotted path: ``{"training.train_iters": 5}``.

    Raises ``ConfigError`` for an unknown path. A changed ``model.preset`` does not change any size.
    """
    known = {spec.dotted for spec in iterate_fields()}
    for dotted in overrides:
        if dotted not in known:
            raise ConfigError(f"unknown configuration key {dotted}{suggestion(dotted, known)}")
    for dotted, value in overrides.items():
        config = _replace(config, tuple(dotted.split(".")), value)
    return config


def dump_config(config: RunConfig) -> str:
    """Return the whole resolved configuration as YAML that :func:`load_config` reads back to an equal object."""
    return yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False, allow_unicode=True, width=110)


# --- recipe ---------------------------------------------------------------------------------------------------------


def read_recipe(path: Path) -> dict[str, Value]:
    """Return the values of a recipe by dotted path; raises ``ConfigError`` with file and line."""
    tree, lines = read_yaml(path)
    return _Recipe(str(path), lines).flatten(tree, RunConfig, ())


@dataclasses.dataclass(frozen=True)
class _Recipe:
    """A recipe's file name and the lines of its keys, for messages."""

    file: str
    lines: Mapping[KeyPath, int]

    def flatten(self, tree: object, section: type, path: tuple[str, ...]) -> dict[str, Value]:
        """Return the values under ``tree`` by dotted path, checked against ``section``."""
        if tree is None:
            return {}
        if not isinstance(tree, dict):
            name = ".".join(path) or "the recipe"
            raise ConfigError(f"{self.where(path)}: {name} is {describe_value(tree)}; expected a mapping of its keys")
        leaves = {spec.path: spec for spec in iterate_fields(section, path)}
        sections = dict(section_paths(section, path))
        values: dict[str, Value] = {}
        for key, value in tree.items():
            here = (*path, str(key))
            if here in leaves:
                values[".".join(here)] = from_yaml(leaves[here], value, self.where(here))
            elif here in sections:
                values |= self.flatten(value, sections[here], here)
            elif value is not None or ".".join(here) not in RETIRED:
                raise self.unknown(here, section)
        return values

    def where(self, path: tuple[str, ...]) -> str:
        return f"{self.file}:{self.lines[path]}" if path in self.lines else self.file

    def unknown(self, path: tuple[str, ...], section: type) -> ConfigError:
        """Name the nearest key of the section, or the section to which a key of this name belongs."""
        siblings = [item.name for item in dataclasses.fields(section)]
        hint = suggest_field(path[-1], lambda spec: spec.dotted, siblings)
        return ConfigError(f"{self.where(path)}: unknown key {'.'.join(path)}{hint}")


# --- command line ---------------------------------------------------------------------------------------------------


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add one flag for each field of the configuration, grouped by section and documented by the schema."""
    docs = read_docs()
    groups: dict[type, Any] = {}
    for path, section in section_paths():
        if path:
            groups[section] = parser.add_argument_group(path[-1], docs[section.__name__, ""])
    for spec in iterate_fields():
        _add_flag(groups[spec.section], spec, docs[spec.section.__name__, spec.path[-1]])


def _add_flag(group: Any, spec: FieldSpec, doc: str) -> None:
    names = (spec.flag, *ALIASES.get(spec.dotted, ()))
    # The default of the size fields is that of the 7B preset; a preset or recipe replaces it.
    text = f"{doc} (default: {_show(spec.default)})".replace("%", "%%")
    common: dict[str, Any] = {"dest": spec.dotted, "default": argparse.SUPPRESS, "help": text}
    if spec.shape.base is bool:
        negative = spec.flag.startswith("--no-")
        group.add_argument(*names, **common, action="store_true" if negative else argparse.BooleanOptionalAction)
    elif spec.shape.base is tuple:
        group.add_argument(*names, **common, nargs="+", metavar="X")
    else:
        kinds = {int: "N", float: "X", str: "TEXT"}
        metavar = "{" + ",".join(spec.shape.choices) + "}" if spec.shape.choices else kinds[spec.shape.base]
        group.add_argument(*names, **common, metavar=metavar)


def parse_flags(parser: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse ``argv`` and return the flags and the words that belong to none, wherever they stand.

    Raises ``ConfigError`` that names the nearest flag for one that is not known.
    """
    flags, words = parser.parse_known_args(argv)
    for word in words:
        if word.startswith("-"):
            valid = [name for spec in iterate_fields() for name in (spec.flag, *ALIASES.get(spec.dotted, ()))]
            flag = word.split("=")[0].replace("_", "-")
            hint = suggest_field(flag, lambda spec: spec.flag, valid)
            raise ConfigError(f"command line: {word} is not a known flag{hint}")
    return flags, words


def _overrides_from_flags(flags: argparse.Namespace) -> dict[str, Value]:
    values: dict[str, Value] = {}
    for spec in iterate_fields():
        given = vars(flags).get(spec.dotted)
        if given is not None:
            values[spec.dotted] = given if isinstance(given, bool) else from_text(spec, given, spec.flag)
    return values


def _show(value: Value) -> str:
    if value is None or value == ():
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


# --- records --------------------------------------------------------------------------------------------------------


def _replace(node: Node, path: tuple[str, ...], value: Value) -> Node:
    """Return a copy of the record ``node`` with the leaf at ``path`` replaced."""
    child = value if len(path) == 1 else _replace(getattr(node, path[0]), path[1:], value)
    return dataclasses.replace(node, **{path[0]: child})  # type: ignore[type-var]


def _plain(node: Any) -> Any:
    """Turn tuples into lists, which YAML can write without tags."""
    if isinstance(node, dict):
        return {key: _plain(value) for key, value in node.items()}
    return list(node) if isinstance(node, tuple) else node
