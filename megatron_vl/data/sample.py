"""The records of data preparation, in the order in which they are made.

``Sample`` (read from a source) -> ``TokenizedSample`` (ids and supervision) -> ``PackedRow`` (input of training). All
are frozen: a stage returns new records and never changes its input.
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
interleaved documents of text and images."""
TASKS: tuple[str, ...] = get_args(Task)
"""Names of the tasks. A stored task is an index into this tuple."""

IMAGE_MARK = "\ufffc"
"""Placeholder in the text of an interleaved document for its next image (Unicode's object replacement character)."""


@dataclass(frozen=True)
class ImageRef:
    """One encoded image: its bytes as found in the source, and a key that names it in messages."""

    key: str
    data: bytes
    declared: tuple[int, int] | None = None
    """Width and height to which the coordinates of the record refer, if the record gives them."""


@dataclass(frozen=True)
class Region:
    """A phrase and its location in the image, in [0, 1].

    A box is (x1, y1, x2, y2). A quad is (x, y) x 4, clockwise from the top-left corner.
    """

    text: str
    boxes: tuple[tuple[float, float, float, float], ...] = ()
    quads: tuple[tuple[float, ...], ...] = ()
    span: tuple[int, int] | None = None
    """Range of the phrase in characters of the sample's caption (grounded captions only)."""


@dataclass(frozen=True)
class Turn:
    """One turn of a chat. ``text`` may hold Qwen-VL's <img>, <ref> and <box> markup."""

    role: Literal["system", "user", "assistant"]
    text: str


@dataclass(frozen=True)
class Sample:
    """A sample as read from a source, independent of prompts and of the tokenizer."""

    key: str
    """Key that is unique within the source. Every message about the sample names it."""
    source: str
    """Name of the source in the data recipe."""
    task: Task
    language: Literal["en", "zh"] = "en"
    images: tuple[ImageRef, ...] = ()
    question: str = ""
    """VQA: the question. Referring: the expression. Otherwise empty."""
    text: str = ""
    """Target as plain text: caption, answer or document. Interleaved: with an IMAGE_MARK for each image."""
    regions: tuple[Region, ...] = ()
    """Grounded caption, referring, region caption: phrases with boxes. OCR: lines with quads."""
    turns: tuple[Turn, ...] = ()
    """Turns of the dialogue, for chat only."""
    annotators: tuple[str, ...] = ()
    """VQA: the answer of each annotator, for the benchmark's accuracy. Empty if several annotators were not asked."""
    score: float | None = None
    """Agreement of image and text according to the source's metadata (CLIP similarity), for the filters."""


@dataclass(frozen=True)
class TokenizedSample:
    """Ids and supervision of one sample, as one segment of a row."""

    key: str
    source: str
    task: Task
    tokens: npt.NDArray[np.int32]
    """int32[length]: token ids, including image slots (filled with the image pad id)."""
    supervised: npt.NDArray[np.bool_]
    """bool[length]: whether this token is a target. Labels are not shifted here; only ``batch.py`` shifts them."""
    images: tuple[ImageRef, ...] = ()
    """Images in the order of their spans."""

    @property
    def length(self) -> int:
        """Number of tokens."""
        return len(self.tokens)


@dataclass(frozen=True)
class PackedRow:
    """One packed sequence of at most ``seq_length`` tokens. It is padded only when it is collated."""

    tokens: npt.NDArray[np.int32]
    """int32[length]: token ids; length <= seq_length."""
    supervised: npt.NDArray[np.bool_]
    """bool[length]: whether this token is a target."""
    segment_lengths: npt.NDArray[np.int32]
    """int32[segments]: tokens in each segment; their sum is length."""
    image_ids: npt.NDArray[np.int64]
    """int64[images]: indices into the image store of the data set, in the order of the spans."""
