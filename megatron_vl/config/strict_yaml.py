"""YAML of which nothing is lost silently: a key that one mapping has twice is an error, not the last value that it has.

Recipes of runs and of data sets are read with it. The line of each key comes along, for messages.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from megatron_vl.errors import ConfigError

KeyPath = tuple[str, ...]
"""Keys from the top down; an element of a list is part of the list's: ("sources[0]", "path")."""


def read_yaml(path: Path) -> tuple[Any, dict[KeyPath, int]]:
    """Read a recipe: its values, and the line of each key.

    Raises:
        ConfigError: with file and line; the file cannot be read, is no YAML, holds nothing, or gives a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: the recipe cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: no UTF-8 ({error.reason}, byte {error.start}); save it as UTF-8") from error
    try:
        values, lines = parse_yaml(text, str(path))
    except yaml.MarkedYAMLError as error:
        mark, words = error.problem_mark or error.context_mark, " ".join(filter(None, (error.context, error.problem)))
        place = f"{path}:{mark.line + 1}, column {mark.column + 1}" if mark else str(path)
        raise ConfigError(f"{place}: not valid YAML: {words}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if values is None:
        raise ConfigError(f"{path}: the recipe is empty; expected keys and their values, as in examples/")
    return values, lines


def parse_yaml(text: str, file: str) -> tuple[Any, dict[KeyPath, int]]:
    """Return the values of ``text`` and the line of each key; what an anchor repeats is listed where it stands first.

    Raises ``yaml.YAMLError`` for what is no YAML, and ``ConfigError`` with ``file``, line and key for a key that is
    given twice.
    """
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    try:
        values = yaml.safe_load(text)
    except ValueError as error:  # 2024-13-01 looks like a date
        raise yaml.YAMLError(str(error)) from error
    lines: dict[KeyPath, int] = {}
    if root is not None:
        _add_lines(root, (), lines, (file, set()))
    return values, lines


def _add_lines(node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int], walk: tuple[str, set[int]]) -> None:
    """Add the lines of the keys below ``node``; ``walk`` is the file and the nodes that were visited."""
    file, visited = walk
    if id(node) in visited:  # an anchor may stand for much, and even contain itself
        return
    visited.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _add_lines(item, (*path[:-1], f"{''.join(path[-1:])}[{index}]"), lines, walk)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*path, str(key.value))
            line = key.start_mark.line + 1
            if here in lines:
                raise ConfigError(f"{file}:{line}: {'.'.join(here)} is given twice, first in line {lines[here]}")
            lines[here] = line
            _add_lines(value, here, lines, walk)
