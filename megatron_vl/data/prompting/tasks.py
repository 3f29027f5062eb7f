"""The text of a sample for each task, and which part of it is supervised.

The strings are those of the paper (Appendix B.1) with the white space of its evaluation scripts. A prompt ends in
``English:`` or ``Answer:`` without a space, and the target begins with a space. In grounded text, the space before a
phrase is inside the tag (``gathering<ref> bees</ref><box>...``), as the released model writes it. Only the target and
the closing ``<|endoftext|>`` are supervised. The Chinese wording was never published; the one below is ours.

A rendered sample is a list of pieces: plain text, one special token, or an image. Text from data is always a text
piece, which cannot become a special token. So no caption, question or OCR line can open an image span. Pieces are
tokenized one by one, so a prompt has the same ids in training and in generation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from megatron_vl.data.prompting.coordinates import format_points
from megatron_vl.data.sample import IMAGE_MARK, Region, Sample
from megatron_vl.errors import SkipSample

END = "<|endoftext|>"


class Piece(NamedTuple):
    """Part of a rendered sample that is tokenized by itself. (A page has hundreds, so the record type must be fast.)"""

    kind: Literal["text", "special", "image"]
    text: str = ""
    """Plain text, the surface form of one special token, or the path of an image if a text names it."""
    supervised: bool = False


_TAGS = {tag: (Piece("special", f"<{tag}>"), Piece("special", f"</{tag}>")) for tag in ("ref", "box", "quad")}


@dataclass(frozen=True)
class Wording:
    """The fixed words of one language."""

    caption: str
    grounded_caption: str
    ocr: str
    answer: str
    """Text between the question and the answer."""
    this: str
    verb: str
    """Text after the box of a region that is to be described."""
    blank: str
    """First characters of a target."""


WORDINGS: dict[str, Wording] = {
    "en": Wording(
        caption="Generate the caption in English:",
        grounded_caption="Generate the caption in English with grounding:",
        ocr="OCR with grounding:",
        answer=" Answer:",
        this="This",
        verb=" is",
        blank=" ",
    ),
    "zh": Wording(
        caption="用中文描述图片：",
        grounded_caption="用中文描述图片并标出位置：",
        ocr="识别文字并标出位置：",
        answer=" 回答：",
        this="这",
        verb="是",
        blank="",
    ),
}


@dataclass(frozen=True)
class _Template:
    """Rendering of one task: what follows the images, what is supervised, and whether images are needed."""

    prompt: Callable[[Sample, Wording], list[Piece]]
    target: Callable[[Sample, Wording], list[Piece]]
    needs_image: bool = True


def render(sample: Sample) -> tuple[Piece, ...]:
    """Render prompt, target and end of a sample of one of the seven tasks, or an interleaved document.

    Target and end are supervised; in an interleaved document, everything but the images.

    Raises:
        SkipSample: The sample lacks what its task needs (``no_image``, ``empty_text``, ``no_region``, ...).
    """
    if sample.task == "interleaved":
        return (*_interleaved(sample), Piece("special", END, supervised=True))
    target = _TEMPLATES[sample.task].target(sample, WORDINGS[sample.language])
    learned = [Piece(kind, text, True) for kind, text, _ in target]
    return (*render_prompt(sample), *learned, Piece("special", END, supervised=True))


def render_prompt(sample: Sample) -> tuple[Piece, ...]:
    """Render the prompt alone, for generation: images, then the words before the target. ``text`` may be empty.

    Raises:
        SkipSample: The sample lacks what its prompt needs.
    """
    template = _TEMPLATES[sample.task]
    if template.needs_image and not sample.images:
        raise SkipSample("no_image", f"task {sample.task} needs an image")
    if not template.needs_image and sample.images:
        raise SkipSample("unexpected_image", f"task {sample.task} takes no image")
    return (*(Piece("image") for _ in sample.images), *template.prompt(sample, WORDINGS[sample.language]))


def _text(text: str) -> list[Piece]:
    return [Piece("text", text)] if text else []


def _tagged(tag: str, text: str) -> list[Piece]:
    opening, closing = _TAGS[tag]
    return [opening, Piece("text", text), closing] if text else [opening, closing]


def _required(text: str, what: str) -> str:
    stripped = text.strip()
    if not stripped:
        raise SkipSample("empty_text", f"the {what} is empty")
    return stripped


def _places(region: Region) -> list[Piece]:
    """Return the region's boxes, then its quadrilaterals."""
    pieces: list[Piece] = []
    for tag, shapes, size in (("box", region.boxes, 4), ("quad", region.quads, 8)):
        for shape in shapes:
            if len(shape) != size:
                raise SkipSample("bad_coordinates", f"a {tag} has {len(shape)} numbers, expected {size}")
            try:
                pieces += _tagged(tag, format_points(shape))
            except ValueError as error:
                raise SkipSample("bad_coordinates", str(error)) from error
    if not pieces:
        raise SkipSample("no_region", "a region has neither box nor quad")
    return pieces


def _first_region(sample: Sample) -> Region:
    if not sample.regions:
        raise SkipSample("no_region", f"task {sample.task} needs a region")
    return sample.regions[0]


def _interleaved(sample: Sample) -> list[Piece]:
    """Return text and images in their order, with the text supervised."""
    _required(sample.text.replace(IMAGE_MARK, ""), "text")
    first, *others = sample.text.split(IMAGE_MARK)
    if len(others) != len(sample.images):
        raise SkipSample("image_mismatch", f"{len(others)} places in the text for {len(sample.images)} images")
    pieces = _text(first)
    for text in others:
        pieces += [Piece("image"), *_text(text)]
    return [Piece(piece.kind, piece.text, piece.kind == "text") for piece in pieces]


def _learn_text(sample: Sample, words: Wording) -> list[Piece]:
    return _text(words.blank + _required(sample.text, "text"))


def _learn_document(sample: Sample, words: Wording) -> list[Piece]:
    _required(sample.text, "text")
    return _text(sample.text)


def _learn_places(sample: Sample, words: Wording) -> list[Piece]:
    return _places(_first_region(sample))


def _learn_region_text(sample: Sample, words: Wording) -> list[Piece]:
    return _text(words.blank + _required(sample.text or _first_region(sample).text, "description of the region"))


def _learn_lines(sample: Sample, words: Wording) -> list[Piece]:
    _first_region(sample)
    pieces: list[Piece] = []
    for line in sample.regions:
        pieces += [*_tagged("ref", words.blank + _required(line.text, "OCR line")), *_places(line)]
    return pieces


def _learn_grounded_caption(sample: Sample, words: Wording) -> list[Piece]:
    """Return the caption. Each phrase is tagged where it occurs, and its boxes follow it."""
    _required(sample.text, "caption")
    _first_region(sample)
    caption = words.blank + sample.text.rstrip()
    pieces: list[Piece] = []
    done = 0
    for region, start, end in sorted(_spans(sample), key=lambda item: item[1:]):
        start, end = start + len(words.blank), end + len(words.blank)
        start -= start > done and caption[start - 1] == " "
        if start < done:
            raise SkipSample("overlapping_regions", f"phrase {region.text!r} overlaps the phrase before it")
        pieces += [*_text(caption[done:start]), *_tagged("ref", caption[start:end]), *_places(region)]
        done = end
    return [*pieces, *_text(caption[done:])]


def _spans(sample: Sample) -> list[tuple[Region, int, int]]:
    spans = []
    for region in sample.regions:
        start, end = region.span or (0, 0)
        if not 0 <= start < end <= len(sample.text.rstrip()):
            raise SkipSample(
                "bad_span",
                f"phrase {region.text!r} has span {region.span} in a caption of {len(sample.text)}",
            )
        spans.append((region, start, end))
    return spans


_TEMPLATES: dict[str, _Template] = {
    "caption": _Template(lambda sample, words: _text(words.caption), _learn_text),
    "vqa": _Template(lambda sample, words: _text(_required(sample.question, "question") + words.answer), _learn_text),
    "grounded_caption": _Template(lambda sample, words: _text(words.grounded_caption), _learn_grounded_caption),
    "referring": _Template(
        lambda sample, words: _tagged("ref", _required(sample.question, "expression")), _learn_places
    ),
    "region_caption": _Template(
        lambda sample, words: [
            *_tagged("ref", words.this),
            *_places(_first_region(sample)),
            *_text(words.verb),
        ],
        _learn_region_text,
    ),
    "ocr": _Template(lambda sample, words: _text(words.ocr), _learn_lines),
    "text": _Template(lambda sample, words: [], _learn_document, needs_image=False),
}
