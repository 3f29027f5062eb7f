"""Documents of text and images in their order, in JSON Lines with the layout of OBELICS or MMC4.

    OBELICS   {"texts": ["A cat.", null, "It sleeps."], "images": [null, "cats/1.jpg", null]}
    MMC4      {"text_list": ["A cat.", "It sleeps."], "image_info": [{"image_name": "1.jpg", "matched_text_index": 1}]}

Images must be on disk under ``image_root``. OBELICS URLs must be replaced by paths. An image of MMC4 is placed before
the sentence that it was matched to. A document is skipped unless all its images can be read. A document without images
is plain text, which packing may split.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_vl.data.file_kinds import BYTE_ORDER_MARK
from megatron_vl.data.formats.image_files import read_image, require_images
from megatron_vl.data.formats.record_files import folder_shards, read_samples
from megatron_vl.data.formats.shard import Shard, Skipped
from megatron_vl.data.formats.values import Json, clean_text, field
from megatron_vl.data.sample import IMAGE_MARK, Sample
from megatron_vl.data.sources.base import Source
from megatron_vl.errors import SkipSample

Part = tuple[Literal["text", "image"], str]
"""Part of a document: a text, or the path of an image."""


@dataclass(frozen=True)
class Interleaved(Source):
    """Documents of text and images from JSON Lines."""

    path: Path
    """A .jsonl file, or a folder of them."""
    image_root: Path
    """Folder, or zip, of the images."""
    language: Literal["en", "zh"] = "en"
    """Language of the documents."""
    records_per_shard: int = 10_000
    """Documents in a shard."""

    def shards(self) -> list[Shard]:
        require_images(self.image_root)
        return folder_shards(self.path, self.records_per_shard)

    def read(self, shard: Shard) -> Iterator[Sample | Skipped]:
        return read_samples(shard, self._sample)

    def _sample(self, record: Json, key: str) -> Sample:
        parts = _sentences(record) if "text_list" in record else _paragraphs(record)
        images = tuple(read_image(self.image_root, path) for kind, path in parts if kind == "image")
        text = _joined(parts, "\n" if "text_list" in record else "\n\n")
        clean_text(text.replace(IMAGE_MARK, ""), "document")
        task: Literal["interleaved", "text"] = "interleaved" if images else "text"
        return Sample(key, self.name, task, self.language, images, text=text)


def _paragraphs(record: Json) -> list[Part]:
    """Return the parts in OBELICS' two lists; at each position exactly one list has an entry."""
    texts, images = field(record, "texts", list), field(record, "images", list)
    if len(texts) != len(images):
        raise SkipSample("wrong_field", f"{len(texts)} texts and {len(images)} images; the lists are to be parallel")
    parts: list[Part] = []
    for text, image in zip(texts, images, strict=True):
        if (text is None) == (image is None) or not isinstance(text or image, str):
            raise SkipSample("wrong_field", f"expected a text or an image, found {text!r:.40} and {image!r:.40}")
        parts.append(("image", image) if text is None else ("text", text))
    return parts


def _sentences(record: Json) -> list[Part]:
    """Return MMC4's sentences as parts, each after the images that were matched to it."""
    sentences = field(record, "text_list", list)
    before: dict[int, list[Part]] = {}
    for info in field(record, "image_info", list):
        place = field(info, "matched_text_index", int)
        if not 0 <= place < len(sentences):
            raise SkipSample("bad_span", f"matched_text_index is {place}, there are {len(sentences)} sentences")
        before.setdefault(place, []).append(("image", field(info, "image_name", str)))
    parts: list[Part] = []
    for place, sentence in enumerate(sentences):
        if not isinstance(sentence, str):
            raise SkipSample("wrong_field", f"text_list[{place}] is {type(sentence).__name__}")
        parts += [*before.get(place, ()), ("text", sentence)]
    return parts


def _joined(parts: list[Part], separator: str) -> str:
    """Return one text with a mark for each image, and the separator between neighboring texts."""
    text = ""
    for (kind, content), (before, _) in zip(parts, [("image", ""), *parts], strict=False):
        plain = content.replace(IMAGE_MARK, "").replace(BYTE_ORDER_MARK, "").strip()
        content = IMAGE_MARK if kind == "image" else plain
        text += (separator if kind == before == "text" and text else "") + content
    return text
