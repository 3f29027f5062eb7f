"""Visual question answering in VQAv2's format: a questions file, an annotations file, a folder of images.

A record is a question. Its answer is the one with the highest confidence over the annotators (yes 1, maybe
1/2, no 0), then the most frequent, then the first (paper, A.2); sets without single answers fall back to
``multiple_choice_answer``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_vl.data.sample import Sample
from megatron_vl.data.sources.base import (
    Json,
    Shard,
    Skipped,
    Source,
    clean_text,
    field,
    json_list,
    load_json,
    range_shards,
    require_folder,
    skipped,
    slice_of,
)
from megatron_vl.data.sources.images import read_image
from megatron_vl.errors import DataError, SkipSample

CONFIDENCE = {"yes": 1.0, "maybe": 0.5, "no": 0.0}


@dataclass(frozen=True)
class VQA(Source):
    """Questions and answers in VQAv2's format."""

    questions: Path
    """JSON file with ``questions``."""
    annotations: Path
    """JSON file with ``annotations``."""
    image_root: Path
    """Folder of the images."""
    image_pattern: str = "COCO_train2014_{image_id:012d}.jpg"
    """File name of an image from its ``image_id``."""
    language: Literal["en", "zh"] = "en"
    """Language of questions and answers."""
    records_per_shard: int = 100_000
    """Questions in a unit of work; each unit parses both files."""

    def shards(self) -> list[Shard]:
        require_folder(self.image_root, "the folder of the images (image_root)")
        self._image_name(0)
        return range_shards(self.questions, len(self._questions()), self.records_per_shard)

    def read(self, shard: Shard) -> Iterator[Sample | Skipped]:
        answers = self._answers()
        for index, record in slice_of(self._questions(), shard):
            key = f"{self.questions.name}#{index}"
            try:
                question_id = field(record, "question_id", (int, str))
                key = f"question {question_id}"
                question = clean_text(field(record, "question", str), "question")
                if question_id not in answers:
                    raise SkipSample("no_annotation", f"{question_id} is not in {self.annotations.name}")
                answer = clean_text(best_answer(answers[question_id]), "answer")
                image = read_image(self.image_root, self._image_name(field(record, "image_id", int)))
                yield Sample(key, self.name, "vqa", self.language, (image,), question=question, text=answer)
            except SkipSample as error:
                yield skipped(key, error)

    def _questions(self) -> list[Json]:
        return json_list(load_json(self.questions, dict), "questions", self.questions)

    def _answers(self) -> dict[int | str, Json]:
        records = json_list(load_json(self.annotations, dict), "annotations", self.annotations)
        return {record["question_id"]: record for record in records if "question_id" in record}

    def _image_name(self, image_id: int) -> str:
        try:
            return self.image_pattern.format(image_id=image_id)
        except (ValueError, KeyError, IndexError) as error:
            raise DataError(
                f"{self.name}: image_pattern {self.image_pattern!r} is no format of image_id: {error!r}; "
                "expected for example 'COCO_train2014_{image_id:012d}.jpg'"
            ) from error


def best_answer(annotation: Json) -> str:
    """The answer to learn: highest summed confidence, then most frequent, then first; raises SkipSample."""
    scores: dict[str, tuple[float, int]] = {}
    for answer in annotation.get("answers") or []:
        text = field(answer, "answer", str).strip()
        confidence, count = scores.get(text, (0.0, 0))
        scores[text] = (confidence + CONFIDENCE.get(str(answer.get("answer_confidence")), 0.0), count + 1)
    if not scores:
        return str(field(annotation, "multiple_choice_answer", str))
    return max(scores, key=lambda text: scores[text])
