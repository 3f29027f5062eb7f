"""The table of source types, and how a recipe's entry becomes a reader.

An entry is ``{name: scenes, type: vqa, questions: ..., image_root: ...}``: ``type`` picks the row, every
other key is a field of the reader's dataclass. Relative paths count from the folder of the recipe.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_vl.data.sources.base import Source
from megatron_vl.data.sources.grounded_caption import GroundedCaption
from megatron_vl.data.sources.img2dataset import Img2Dataset
from megatron_vl.data.sources.ocr import OCR
from megatron_vl.data.sources.qwen_vl_chat import QwenVLChat
from megatron_vl.data.sources.refexp import RefExp
from megatron_vl.data.sources.text import Text
from megatron_vl.data.sources.vqa import VQA
from megatron_vl.errors import ConfigError

SOURCES: dict[str, type[Source]] = {
    "img2dataset": Img2Dataset,
    "grounded_caption": GroundedCaption,
    "vqa": VQA,
    "refexp": RefExp,
    "ocr": OCR,
    "text": Text,
    "qwen_vl_chat": QwenVLChat,
}


def build_source(entry: Mapping[str, Any], *, where: str, root: Path | None = None) -> Source:
    """The reader of one recipe entry.

    ``where`` names the entry in messages ("data.yaml: sources[2]"); relative paths are joined to ``root`` if
    given. Raises ConfigError on an unknown type, an unknown or missing key, a value of the wrong type.
    """
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{where}: found {entry!r:.60}, expected a mapping with 'name' and 'type'")
    kind = entry.get("type")
    if not isinstance(kind, str) or kind not in SOURCES:
        raise ConfigError(f"{where}: unknown source type {kind!r}{_nearest(str(kind), SOURCES)}")
    reader = SOURCES[kind]
    fields = {item.name: item for item in dataclasses.fields(reader)}
    hints = typing.get_type_hints(reader)
    values: dict[str, Any] = {}
    for key, value in entry.items():
        if key == "type":
            continue
        if key not in fields:
            raise ConfigError(f"{where}: source type {kind} has no option {key!r}{_nearest(str(key), fields)}")
        values[key] = _convert(value, hints[key], f"{where}.{key}", root)
    missing = [name for name, item in fields.items() if item.default is dataclasses.MISSING and name not in values]
    if missing:
        raise ConfigError(f"{where}: source type {kind} needs {', '.join(missing)}")
    return reader(**values)


def _convert(value: Any, hint: Any, where: str, root: Path | None) -> Any:
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        hint = next(option for option in typing.get_args(hint) if option is not type(None))
    if typing.get_origin(hint) is typing.Literal:
        options = typing.get_args(hint)
        if value not in options:
            raise ConfigError(f"{where}: found {value!r}, expected one of {', '.join(map(repr, options))}")
        return value
    if hint is Path and isinstance(value, (str, Path)) and str(value):
        return (root / value) if root else Path(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is Path or type(value) is not hint:
        raise ConfigError(f"{where}: found {value!r:.60}, expected {'a path' if hint is Path else hint.__name__}")
    return value


def _nearest(word: str, valid: Iterable[str]) -> str:
    names = sorted(valid)
    near = difflib.get_close_matches(word, names, 1)
    return f"; did you mean {near[0]!r}?" if near else f"; valid are {', '.join(names)}"
