"""The table of source types, and the construction of a reader from a recipe entry.

An entry is ``{name: scenes, type: vqa, questions: ..., image_root: ...}``. ``type`` selects the row, and every other
key is a field of the reader's dataclass. The name of a data set in ``presets.DATA_SETS`` is a type too: its reader with
some fields set. Relative paths are relative to the folder of the recipe. A path may be an address (``data/remote``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_vl.config.records import Builder
from megatron_vl.config.suggestions import suggestion_or_list
from megatron_vl.data.remote.places import place_of
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
    """Return the reader of one recipe entry.

    ``where`` names the entry in messages ("data.yaml: sources[2]"). Relative paths are joined to ``root`` if given.

    Raises:
        ConfigError: A type or key is unknown, a key is missing, or a value has the wrong type.
    """
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{where}: found {entry!r:.60}, expected a mapping with 'name' and 'type'")
    kind = entry.get("type")
    valid = {**SOURCES, **DATA_SETS}
    if kind is None:
        raise ConfigError(f"{where}: 'type' is missing; it names the reader, one of {', '.join(sorted(valid))}")
    if not isinstance(kind, str) or kind not in valid:
        raise ConfigError(f"{where}: unknown source type {kind!r}{suggestion_or_list(kind, valid)}")
    base, preset = DATA_SETS.get(kind, (kind, {}))
    reader = SOURCES[base]
    lists = {item.name for item in dataclasses.fields(reader) if str(item.type).startswith("tuple")}
    values = {key: value for key, value in {**preset, **entry}.items() if key != "type"}
    for key in lists & values.keys():
        if not isinstance(values[key], list | tuple):
            values[key] = [values[key]]  # one name in place of a list of names
    builder = Builder(root=root, locate=place_of, purpose=f" for source type {kind}")
    return builder.build(reader, values, where)
