"""Split a stored row into segments, and each segment into runs: text, special tokens, pictures at their slots.

Every token of a row is in exactly one run, in order, and a run is wholly supervised or not. So the display can be
compared with the row. Boxes and quads are read from the special tokens, not from the text: a caption that contains the
characters ``<box>`` is still a caption. A shape belongs to the last picture before it in its segment, or to the first
one if none precedes it. The inspector must show damaged rows, so it reports problems instead of raising.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from megatron_vl.config.special_tokens import SpecialTokens
from megatron_vl.data.dataset.rows import SegmentKey
from megatron_vl.data.prompting.coordinates import outline, parse_points
from megatron_vl.data.sample import PackedRow
from megatron_vl.inspector.opening import Vocabulary
from megatron_vl.inspector.text import Mark, make_marks, printable

RunKind = Literal["text", "coordinates", "special", "picture", "unknown"]
Band = Literal["picture", "learned", "given"]

_SHAPES = {"<box>": 2, "<quad>": 4}
"""Number of points of a shape, by its opening tag."""
_NO_KEY = SegmentKey("?", "?", "?", 0, 0)


@dataclass(frozen=True)
class Shape:
    """A box or quad of a segment's text."""

    number: int
    """Within the segment, from 1."""
    points: tuple[float, ...]
    """Flat corners in [0, 1], four of them; empty if the text between the tags is no shape."""
    label: str
    """The phrase before it."""


@dataclass(frozen=True)
class ImageSpan:
    """An image at its slots."""

    image_id: int | None
    """In the data set's store; None if the row names fewer images than it has spans."""
    num_slots: int
    shapes: tuple[Shape, ...] = ()


@dataclass(frozen=True)
class TokenRun:
    """Neighboring tokens of one kind that are either all supervised or all not."""

    kind: RunKind
    start: int
    stop: int
    """Tokens [start, stop) of the row."""
    supervised: bool
    marks: tuple[Mark, ...] = ()
    """Of text and coordinates."""
    name: str = ""
    """Of a special or unknown token."""
    picture: ImageSpan | None = None
    shape: Shape | None = None
    """Set on the tag that closes a shape."""


@dataclass(frozen=True)
class SegmentView:
    """One sample, or a segment of a text document."""

    source: str
    task: str
    key: str
    sample_start: int
    sample_stop: int
    """Tokens [sample_start, sample_stop) of the sample are in this segment."""
    start: int
    stop: int
    """Tokens [start, stop) of the row."""
    num_supervised: int
    runs: tuple[TokenRun, ...]

    @property
    def length(self) -> int:
        return self.stop - self.start

    @property
    def pictures(self) -> tuple[ImageSpan, ...]:
        return tuple(run.picture for run in self.runs if run.picture is not None)

    @property
    def parts(self) -> list[tuple[TokenRun, ...]]:
        """All runs, split before each picture if there are several, so each picture is next to the runs after it."""
        cuts = [position for position, run in enumerate(self.runs) if run.picture is not None]
        cuts = [0, *cuts, len(self.runs)] if len(cuts) > 1 else [0, len(self.runs)]
        return [self.runs[start:stop] for start, stop in itertools.pairwise(cuts) if start < stop]

    @property
    def bands(self) -> list[tuple[Band, int]]:
        """Bands of slots, of supervised and of other tokens, with their lengths."""
        bands = itertools.groupby(self.runs, key=_band)
        return [(band, sum(run.stop - run.start for run in runs)) for band, runs in bands]


@dataclass(frozen=True)
class RowView:
    """One packed row."""

    index: int
    segments: tuple[SegmentView, ...]
    seq_length: int
    problems: tuple[str, ...]
    """Contradictions in the row."""

    @property
    def length(self) -> int:
        return sum(segment.length for segment in self.segments)

    @property
    def padding(self) -> int:
        return self.seq_length - self.length

    @property
    def num_supervised(self) -> int:
        return sum(segment.num_supervised for segment in self.segments)

    @property
    def pictures(self) -> tuple[ImageSpan, ...]:
        return tuple(picture for segment in self.segments for picture in segment.pictures)


@dataclass(frozen=True)
class RowReader:
    """Converts rows to views."""

    vocabulary: Vocabulary
    num_queries: int
    seq_length: int

    def view(self, index: int, row: PackedRow, keys: Sequence[SegmentKey]) -> RowView:
        """Return the view of row ``index`` with the keys of its segments."""
        image_ids = iter(row.image_ids.tolist())
        ends = np.cumsum(row.segment_lengths).tolist()
        segments = []
        for number, (start, stop) in enumerate(zip([0, *ends], ends, strict=False)):
            key = keys[number] if number < len(keys) else _NO_KEY
            runs = _with_shapes(list(self._runs(row, start, stop, image_ids)))
            segments.append(
                SegmentView(
                    source=printable(key.source),
                    task=printable(key.task),
                    key=printable(key.key),
                    sample_start=key.start,
                    sample_stop=key.stop,
                    start=start,
                    stop=stop,
                    num_supervised=int(row.supervised[start:stop].sum()),
                    runs=runs,
                )
            )
        return RowView(index, tuple(segments), self.seq_length, tuple(self._problems(row, keys, segments)))

    def _runs(self, row: PackedRow, start: int, stop: int, image_ids: Iterator[int]) -> Iterator[TokenRun]:
        special = self.vocabulary.special
        tokens, supervised = row.tokens[:stop].tolist(), row.supervised[:stop].tolist()
        while start < stop:
            token, learned = tokens[start], supervised[start]
            end = start + 1
            if token < special.num_bpe_tokens:
                while end < stop and tokens[end] < special.num_bpe_tokens and supervised[end] == learned:
                    end += 1
                marks = make_marks(self.vocabulary.to_bytes(tokens[start:end]))
                yield TokenRun("text", start, end, learned, marks=marks)
            elif token == special.img_start and (found := _picture_end(tokens, start, special)):
                end = found
                picture = ImageSpan(next(image_ids, None), end - start - 2)
                yield TokenRun("picture", start, end, any(supervised[start:end]), picture=picture)
            else:
                name = self.vocabulary.special_text.get(token)
                kind: RunKind = "unknown" if name is None else "special"
                yield TokenRun(kind, start, end, learned, name=name or f"id {token}")
            start = end

    def _problems(self, row: PackedRow, keys: Sequence[SegmentKey], segments: Sequence[SegmentView]) -> Iterator[str]:
        runs = [run for segment in segments for run in segment.runs]
        pictures = [run.picture for run in runs if run.picture is not None]
        if len(row.tokens) > self.seq_length:
            yield f"{len(row.tokens)} tokens, but the longest row has {self.seq_length}"
        if len(pictures) != len(row.image_ids):
            yield f"{len(pictures)} image spans, but {len(row.image_ids)} images"
        if any(picture.num_slots != self.num_queries for picture in pictures):
            found = sorted({picture.num_slots for picture in pictures} - {self.num_queries})
            yield f"images of {', '.join(map(str, found))} slots, expected {self.num_queries}"
        if any(run.kind == "picture" and run.supervised for run in runs):
            yield "supervised image slots"
        if any(run.kind == "unknown" for run in runs):
            yield "ids outside the vocabulary"
        if [key.stop - key.start for key in keys] != row.segment_lengths.tolist():
            yield "the keys are not those of these segments"


def _band(run: TokenRun) -> Band:
    return "picture" if run.kind == "picture" else "learned" if run.supervised else "given"


def _picture_end(tokens: Sequence[int], start: int, special: SpecialTokens) -> int | None:
    """Return the end of the image span at ``start`` (slots alone, then the closing tag); None if it is no span."""
    end = start + 1
    while end < len(tokens) and tokens[end] == special.img_pad:
        end += 1
    return end + 1 if end < len(tokens) and tokens[end] == special.img_end else None


def _with_shapes(runs: list[TokenRun]) -> tuple[TokenRun, ...]:
    """Return runs with each shape at the tag that closes it, and at the picture to which it belongs."""
    pictures = [position for position, run in enumerate(runs) if run.kind == "picture"]
    label, number = "", 0
    for position, run in enumerate(runs):
        text, closed = _between(runs, position)
        if run.name == "<ref>" and closed is not None:
            label = text
        elif run.name in _SHAPES and closed is not None:
            number += 1
            shape = Shape(number, outline(parse_points(text, _SHAPES[run.name]) or ()), label)
            runs[position + 1 : closed] = [replace(run, kind="coordinates") for run in runs[position + 1 : closed]]
            runs[closed] = replace(runs[closed], shape=shape)
            before = [place for place in pictures if place < position] or pictures[:1]
            if before:
                picture = runs[before[-1]].picture
                assert picture is not None
                picture = replace(picture, shapes=(*picture.shapes, shape))
                runs[before[-1]] = replace(runs[before[-1]], picture=picture)
    return tuple(runs)


def _between(runs: Sequence[TokenRun], position: int) -> tuple[str, int | None]:
    """Return the text between an opening and a closing tag, and the latter's position; None if it does not follow."""
    closing = runs[position].name.replace("<", "</", 1)
    stop = position + 1
    while stop < len(runs) and runs[stop].kind == "text":
        stop += 1
    if stop == len(runs) or runs[stop].name != closing:
        return "", None
    return "".join(mark.text for run in runs[position + 1 : stop] for mark in run.marks).strip(), stop
