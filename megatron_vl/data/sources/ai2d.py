"""Questions about school diagrams: AI2D, a folder (or ``ai2d-all.zip``) as published.

    images/12.png    questions/12.png.json    annotations/12.png.json

A record is a question. Its text is a key of ``questions``, and the answer is one of ``answerTexts``. The option "{}"
means that there is no option. If ``abcLabel`` is set, the question refers to letters. They must be painted over the
words of the diagram: an opaque box with ``replacementText`` over each ``rectangle``. The image is then stored again as
PNG.

The options are listed after the question, as in the evaluation prompts for multiple choice. The answer is the text of
the correct option. With ``with_options: false``, the question is used alone.
"""

from __future__ import annotations

import io
import json
import string
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from PIL import ImageDraw, ImageFont

from megatron_vl.data.formats.image_files import read_bytes, read_image, require_images
from megatron_vl.data.formats.shard import Shard, Skipped, hash_of_files, range_shards, skipped, slice_of
from megatron_vl.data.formats.values import Json, clean_text, decode_text, field, is_finite, words_of
from megatron_vl.data.formats.zips import list_folder
from megatron_vl.data.images.decode import decode_image
from megatron_vl.data.sample import ImageRef, Sample
from megatron_vl.data.sources.base import Source
from megatron_vl.errors import DataError, SkipSample

NO_OPTION = "{}"


@dataclass(frozen=True)
class AI2D(Source):
    """Questions and diagrams of AI2D."""

    path: Path
    """Folder with images, questions and annotations. It may lie in a zip (ai2d-all.zip/ai2d)."""
    test_ids: Path
    """ai2d_test_ids.csv, which lists the diagrams of the test split by number."""
    split: Literal["train", "test"] = "train"
    """Diagrams to read: those that are not listed (train), or those that are (test)."""
    with_options: bool = True
    """List the options after the question."""
    records_per_shard: int = 1000
    """Diagrams in a shard."""

    def shards(self) -> list[Shard]:
        require_images(self.path)
        self._test_ids()
        names = self._names()
        if not names:
            raise DataError(f"{self.path / 'questions'}: no .json file; expected AI2D's questions")
        shards = range_shards(self.path, len(names), self.records_per_shard)
        files = [self._parts(name for _, name in slice_of(names, shard)) for shard in shards]
        return [replace(shard, contents=hash_of_files(mine)) for shard, mine in zip(shards, files, strict=True)]

    def read(self, shard: Shard) -> Iterator[Sample | Skipped]:
        tests = self._test_ids()
        for _, name in slice_of(self._names(), shard):
            try:
                questions = field(self._load("questions", name), "questions", dict)
            except SkipSample as error:
                yield skipped(f"questions/{name}", error)
                continue
            is_test = name.partition(".")[0] in tests
            for number, (text, question) in enumerate(questions.items()):
                key = f"{name.removesuffix('.json')}-{number}"
                try:
                    if is_test != (self.split == "test"):
                        raise SkipSample("other_split", "test" if is_test else "train")
                    yield self._sample(name.removesuffix(".json"), text, question, key)
                except SkipSample as error:
                    yield skipped(key, error)

    def _parts(self, names: Iterable[str]) -> Iterator[tuple[str, Path]]:
        """Yield each diagram with the paths of its files."""
        for name in names:
            stem = name.removesuffix(".json")
            for part in (f"questions/{name}", f"annotations/{name}", f"images/{stem}"):
                yield part, self.path / part

    def _names(self) -> list[str]:
        return list_folder(self.path / "questions", ".json")

    def _test_ids(self) -> frozenset[str]:
        try:
            return frozenset(decode_text(self.test_ids.read_bytes(), "ids").split())
        except (OSError, SkipSample) as error:
            raise DataError(f"{self.test_ids}: cannot be read ({error}); expected ai2d_test_ids.csv") from error

    def _load(self, folder: str, name: str) -> Any:
        try:
            return json.loads(decode_text(read_bytes(self.path, f"{folder}/{name}"), name))
        except SkipSample as error:
            raise SkipSample("no_annotation", error.detail) from error
        except (ValueError, RecursionError) as error:
            raise SkipSample("bad_json", f"{folder}/{name}: {error}") from error

    def _sample(self, image_name: str, text: str, question: Json, key: str) -> Sample:
        options = field(question, "answerTexts", list)
        right = field(question, "correctAnswer", int)
        if not 0 <= right < len(options):
            raise SkipSample("no_annotation", f"correctAnswer is {right} of {len(options)} options")
        options = [words_of(option, "an option") for option in options]
        answer = clean_text(options[right], "answer")
        if answer == NO_OPTION:
            raise SkipSample("no_annotation", f"the right option is {NO_OPTION!r}")
        prompt = clean_text(text, "question")
        if self.with_options:
            prompt += "\nOptions: " + "\n".join(_lettered(options))
        image = read_image(self.path, f"images/{image_name}")
        if question.get("abcLabel") is True:
            image = paint_letters(self.settle(image), self._load("annotations", f"{image_name}.json"))
        return Sample(key, self.name, "vqa", "en", (image,), question=prompt, text=answer)


def paint_letters(image: ImageRef, annotation: Any) -> ImageRef:
    """Return the diagram with its words replaced by the letters of the questions. Raises SkipSample."""
    picture = decode_image(image.data)
    draw = ImageDraw.Draw(picture)
    for word in field(annotation, "text", dict).values():
        letter = field(word, "replacementText", str).upper()
        x1, y1, x2, y2 = _corners(field(word, "rectangle", list), picture.size)
        if x1 < x2 and y1 < y2:
            draw.rectangle((x1, y1, x2, y2), fill="white", outline="black")
            font = ImageFont.load_default(max(8, round(0.8 * min(x2 - x1, y2 - y1))))
            draw.text(((x1 + x2) / 2, (y1 + y2) / 2), letter, fill="black", font=font, anchor="mm")
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return ImageRef(f"{image.key}#letters", buffer.getvalue())


def _corners(rectangle: list[Any], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Return x1, y1, x2, y2 in pixels of two corners, clipped to the image. Raises SkipSample('bad_box')."""
    numbers = [value for corner in rectangle if isinstance(corner, list) for value in corner]
    if len(numbers) != 4 or not all(map(is_finite, numbers)):
        raise SkipSample("bad_box", f"expected two corners, found {rectangle!r:.80}")
    x1, y1, x2, y2 = (min(max(float(value), 0.0), limit) for value, limit in zip(numbers, size * 2, strict=True))
    return x1, y1, x2, y2


def _lettered(options: list[str]) -> list[str]:
    """Return the distinct, non-empty options, with letters."""
    distinct = [option for option in dict.fromkeys(option.strip() for option in options) if option != NO_OPTION]
    return [f"{letter}. {option}" for letter, option in zip(string.ascii_uppercase, distinct, strict=False)]
