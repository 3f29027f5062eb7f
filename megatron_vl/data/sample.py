"""The records that flow through data preparation, in the order in which they appear.

``Sample`` (what a source found) -> ``TokenizedSample`` (ids and supervision) -> ``PackedRow`` (what is trained on).
All are frozen: a stage returns new records and never edits the ones it was given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

Task = Literal[
    "caption", "vqa", "grounded_caption", "referring", "region_caption", "ocr", "text", "chat", "interleaved"
]
"""The seven tasks of the paper (Table 3; ``region_caption`` is its grounded captioning of a region), chat, and
documents of text and images in their order."""
TASKS: tuple[str, ...] = get_args(Task)
"""A stored task is an index into these."""

IMAGE_MARK = "\ufffc"
"""Stands in the text of an interleaved document for its next image (Unicode's object replacement character)."""


@dataclass(frozen=True)
class ImageRef:
    """One encoded image: its bytes as found in the source, and a key that names it in messages."""

    key: str
    data: bytes
    declared: tuple[int, int] | None = None
    """Width and height with which the record's coordinates were reckoned, where it says so."""


@dataclass(frozen=True)
class Region:
    """A phrase and where it is: boxes (x1, y1, x2, y2) or quads (x, y) x 4 clockwise from top-left, in [0,
    1]."""

    text: str
    boxes: tuple[tuple[float, float, float, float], ...] = ()
    quads: tuple[tuple[float, ...], ...] = ()
    span: tuple[int, int] | None = None
    """Characters of the sample's caption that the phrase occupies (grounded captions only)."""


@dataclass(frozen=True)
class Turn:
    """One turn of a chat; ``text`` may hold Qwen-VL's <img>, <ref> and <box> markup."""

    role: Literal["system", "user", "assistant"]
    text: str


@dataclass(frozen=True)
class Sample:
    """What a source found, independent of prompts and of the tokenizer."""

    key: str
    """Unique within its source; named in every message about the sample."""
    source: str
    """Name of the source in the data recipe."""
    task: Task
    language: Literal["en", "zh"] = "en"
    images: tuple[ImageRef, ...] = ()
    question: str = ""
    """VQA: the question. Referring: the expression. Otherwise empty."""
    text: str = ""
    """Caption, answer, document: what is to be learned, as plain text. Interleaved: an IMAGE_MARK for each image."""
    regions: tuple[Region, ...] = ()
    """Grounded caption, referring, region caption: phrases with boxes. OCR: lines with quads."""
    turns: tuple[Turn, ...] = ()
    """Chat only."""
    annotators: tuple[str, ...] = ()
    """VQA: the answer of each annotator, for the benchmark's accuracy; empty where a set has not asked several."""
    score: float | None = None
    """How well image and text agree, as the source's metadata says it (CLIP similarity), for the filters."""


@dataclass(frozen=True)
class TokenizedSample:
    """Ids and supervision of one sample, as one segment of a row."""

    key: str
    source: str
    task: Task
    tokens: npt.NDArray[np.int32]
    """int32[length], image slots included (filled with the image pad id)."""
    supervised: npt.NDArray[np.bool_]
    """bool[length]: this token is a target. Not shifted; the shift happens in ``batch.py`` and nowhere
    else."""
    images: tuple[ImageRef, ...] = ()
    """In the order of their spans."""

    @property
    def length(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class PackedRow:
    """One packed sequence: at most ``seq_length`` tokens, padded only when it is collated."""

    tokens: npt.NDArray[np.int32]
    """int32[length], length <= seq_length."""
    supervised: npt.NDArray[np.bool_]
    """bool[length]."""
    segment_lengths: npt.NDArray[np.int32]
    """int32[segments], sum = length."""
    image_ids: npt.NDArray[np.int64]
    """int64[images]: indices into the data set's image store, in the order of their spans."""
