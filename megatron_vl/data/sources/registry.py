"""The table of source types, and how a recipe's entry becomes a reader.

An entry is ``{name: scenes, type: vqa, questions: ..., image_root: ...}``: ``type`` picks the row, every
other key is a field of the reader's dataclass. The name of a data set in ``presets.DATA_SETS`` is a type too:
its reader with some fields filled in. Relative paths count from the folder of the recipe.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_vl.config.fields import nearest
from megatron_vl.data.sources.ai2d import AI2D
from megatron_vl.data.sources.base import Source
from megatron_vl.data.sources.caption_files import CaptionFiles
from megatron_vl.data.sources.grounded_caption import GroundedCaption
from megatron_vl.data.sources.html import HTML
from megatron_vl.data.sources.img2dataset import Img2Dataset
from megatron_vl.data.sources.interleaved import Interleaved
from megatron_vl.data.sources.karpathy import Karpathy
from megatron_vl.data.sources.llava import LLaVA
from megatron_vl.data.sources.ocr import OCR
from megatron_vl.data.sources.pdf import PDF
from megatron_vl.data.sources.presets import DATA_SETS
from megatron_vl.data.sources.qwen_vl_chat import QwenVLChat
from megatron_vl.data.sources.refcoco import RefCOCO
from megatron_vl.data.sources.refexp import RefExp
from megatron_vl.data.sources.text import Text
from megatron_vl.data.sources.visual_genome import VisualGenome
from megatron_vl.data.sources.vqa import VQA
from megatron_vl.errors import ConfigError

SOURCES: dict[str, type[Source]] = {
    "img2dataset": Img2Dataset,
    "grounded_caption": GroundedCaption,
    "pairs": CaptionFiles,
    "karpathy": Karpathy,
    "vqa": VQA,
    "ai2d": AI2D,
    "refexp": RefExp,
    "refcoco": RefCOCO,
    "visual_genome": VisualGenome,
    "ocr": OCR,
    "pdf": PDF,
    "html": HTML,
    "text": Text,
    "interleaved": Interleaved,
    "qwen_vl_chat": QwenVLChat,
    "llava": LLaVA,
}


def build_source(entry: Mapping[str, Any], *, where: str, root: Path | None = None) -> Source:
    """The reader of one recipe entry.

    ``where`` names the entry in messages ("data.yaml: sources[2]"); relative paths are joined to ``root`` if
    given. Raises ConfigError on an unknown type, an unknown or missing key, a value of the wrong type.
    """
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{where}: found {entry!r:.60}, expected a mapping with 'name' and 'type'")
    kind = entry.get("type")
    valid = {**SOURCES, **DATA_SETS}
    if kind is None:
        raise ConfigError(f"{where}: 'type' is missing; it names the reader, one of {', '.join(sorted(valid))}")
    if not isinstance(kind, str) or kind not in valid:
        raise ConfigError(f"{where}: unknown source type {kind!r}{_nearest(str(kind), valid)}")
    base, preset = DATA_SETS.get(kind, (kind, {}))
    reader = SOURCES[base]
    fields = {item.name: item for item in dataclasses.fields(reader)}
    hints = typing.get_type_hints(reader)
    values: dict[str, Any] = {}
    for key, value in {**preset, **entry}.items():
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
    if typing.get_origin(hint) is tuple:
        values = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_convert(item, typing.get_args(hint)[0], f"{where}[{i}]", root) for i, item in enumerate(values))
    if hint is Path and isinstance(value, (str, Path)) and str(value):
        return (root / value) if root else Path(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is Path or type(value) is not hint:
        raise ConfigError(f"{where}: found {value!r:.60}, expected {'a path' if hint is Path else hint.__name__}")
    return value


def _nearest(word: str, valid: Iterable[str]) -> str:
    names = sorted(valid)
    near = nearest(word, names)
    return f"; did you mean {near!r}?" if near else f"; valid are {', '.join(names)}"
