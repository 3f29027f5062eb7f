"""Questions about images: the format of VQAv2, and sets that differ from it in names and nesting.

A record is a question. The options give the fields of its parts, and ``presets.DATA_SETS`` holds the options for each
published set:

    VQAv2             {"questions": [{image_id, question, question_id}]}, answers in a second file
    GQA               {ID: {imageId, question, answer, fullAnswer}}
    Visual Genome     [{"qas": [{image_id, qa_id, question, answer}]}]            unfolded
    DVQA, ChartQA     [{image, question, answer}], [{imgname, query, label}]
    DocVQA, TextVQA   {"data": [{image or image_id, question, answers}]}
    OCR-VQA           {ID: {questions: [...], answers: [...], split}}             parallel lists

Of several answers, the target is the one with the highest confidence over the annotators (yes 1, maybe 1/2, no 0), then
the most frequent, then the first (paper, A.2). Texts are used as published.

The files are streamed. Of a second file, memory holds the answers to each question.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_vl.data.file_kinds import plain_files
from megatron_vl.data.formats.image_files import check_patterns, image_names, read_first_image, require_images
from megatron_vl.data.formats.json_stream import iter_array
from megatron_vl.data.formats.record_files import Record, read_records, record_shards
from megatron_vl.data.formats.shard import Shard, Skipped, skipped
from megatron_vl.data.formats.values import NOTHING, Json, clean_text, field, words_in, words_of
from megatron_vl.data.sample import Sample
from megatron_vl.data.sources.base import Source
from megatron_vl.errors import DataError, SkipSample

CONFIDENCE = {"yes": 1.0, "maybe": 0.5, "no": 0.0}
Answers = Mapping[int | str, "Answer | SkipSample"]


@dataclass(frozen=True)
class Answer:
    """The target answer, and the answer of each annotator."""

    text: str
    annotators: tuple[str, ...]


@dataclass(frozen=True)
class VQA(Source):
    """Questions and answers in VQAv2's format, or a similar one."""

    questions: Path
    """JSON file with the questions, or a folder of such files. It may lie in a zip."""
    image_root: Path
    """Folder, or zip, of the images."""
    annotations: Path | None = None
    """JSON file whose ``annotations`` hold the answers by ``question_id``, if the questions do not."""
    image_pattern: tuple[str, ...] = ("COCO_train2014_{image_id:012d}.jpg",)
    """Name of an image from the fields of its question; with several, the first that exists. ``key`` is the key of the
    record if the document is a dictionary."""
    records: str = "questions"
    """Key of the list of questions. Empty: the document itself is the list, or a dictionary of them."""
    unfold: str = ""
    """Field of a record that lists its questions."""
    id_field: str = "question_id"
    """Field that identifies a question."""
    question_field: str = "question"
    """Field of the question, or of a list of questions."""
    answer_field: str = "answers"
    """Field of the answer, of several answers to the question, or of one answer to each of the questions."""
    annotated: bool = False
    """A list of text answers holds one answer per annotator, as a list of VQAv2's objects always does."""
    strip_period: bool = False
    """Remove the period at the end of answers."""
    split_field: str = ""
    """Field that names the split of a record, if one file holds all splits."""
    splits: tuple[str, ...] = ()
    """Splits to read."""
    language: Literal["en", "zh"] = "en"
    """Language of questions and answers."""
    records_per_shard: int = 100_000
    """Records in a shard. Each shard reads the annotations."""

    def shards(self) -> list[Shard]:
        require_images(self.image_root)
        check_patterns(self.image_pattern, self.name)
        self._annotated_answers()  # a damaged file raises an error now, not in the middle of the work
        shards = [record_shards(file, self.records_per_shard, self.records or None) for file in self._files()]
        return list(itertools.chain.from_iterable(shards))

    def read(self, shard: Shard) -> Iterator[Sample | Skipped]:
        answers = self._annotated_answers()
        for record in read_records(shard, self.records or None):
            if isinstance(record, Skipped):
                yield record
                continue
            try:
                questions = self._questions(record)
            except SkipSample as error:
                yield skipped(record.key, error)
                continue
            for index, question in enumerate(questions):
                yield self._sample(question, answers, record.key if len(questions) == 1 else f"{record.key}.{index}")

    def _files(self) -> list[Path]:
        if not self.questions.is_dir():
            return [self.questions]
        files = plain_files(self.questions, (".json",))
        if not files:
            raise DataError(f"{self.questions}: no .json file in this folder; expected the questions")
        return files

    def _annotated_answers(self) -> Answers | None:
        """Return the answer to each question of the second file, or None if there is no second file."""
        if self.annotations is None:
            return None
        answers: dict[int | str, Answer | SkipSample] = {}
        for element in iter_array(self.annotations, "annotations"):
            record = element.value
            question_id = record.get(self.id_field) if isinstance(record, dict) else None
            if isinstance(question_id, (int, str)):  # an annotation without it matches no question
                try:
                    found: Answer | SkipSample = self._answers_of(record)
                except SkipSample as error:
                    found = error
                if answers.get(question_id, found) != found:
                    found = SkipSample("contradiction", f"{self.annotations} answers it twice, not alike")
                answers[question_id] = found
        return answers

    def _questions(self, found: Record) -> list[Json]:
        """Return the record's questions one by one, each with the shared fields."""
        record = found.value
        if self.unfold:
            nested = field(record, self.unfold, list)
            return [{**record, **question} if isinstance(question, dict) else record for question in nested]
        texts = field(record, self.question_field, (str, int, float, list))
        record = {**record, "key": found.name} if found.name else record
        if not isinstance(texts, list):
            return [record]
        answers = field(record, self.answer_field, list)
        pairs = itertools.zip_longest(texts, answers)
        return [{**record, self.question_field: text, self.answer_field: answer} for text, answer in pairs]

    def _sample(self, record: Json, answers: Answers | None, key: str) -> Sample | Skipped:
        try:
            if self.id_field in record:
                key = f"question {field(record, self.id_field, (int, str))}"
            if self.splits and str(record.get(self.split_field)) not in self.splits:
                raise SkipSample("other_split", f"{self.split_field} is {record.get(self.split_field)!r}")
            question = clean_text(words_in(record, self.question_field), "question")
            answer = self._answer(record, answers)
            text = clean_text(answer.text.strip().removesuffix(".") if self.strip_period else answer.text, "answer")
            image = read_first_image(self.image_root, image_names(self.image_pattern, record))
        except SkipSample as error:
            return skipped(key, error)
        said = answer.annotators
        return Sample(key, self.name, "vqa", self.language, (image,), question=question, text=text, annotators=said)

    def _answer(self, record: Json, answers: Answers | None) -> Answer:
        if answers is None:
            return self._answers_of(record)
        found = answers.get(field(record, self.id_field, (int, str)))
        if not isinstance(found, Answer):
            reason, detail = (found.reason, found.detail) if found else ("no_annotation", str(self.annotations))
            raise SkipSample(reason, detail)
        return found

    def _answers_of(self, record: Json) -> Answer:
        best, said = best_answer(record, self.answer_field), record.get(self.answer_field)
        texts: list[str] = []
        for answer in said if isinstance(said, list) else []:
            if isinstance(answer, dict) or self.annotated:
                value = answer["answer"] if isinstance(answer, dict) else answer
                texts.append(sys.intern(words_of(value, "an answer")))
        return Answer(best, tuple(texts) if len(texts) > 1 else ())


def best_answer(record: Json, name: str = "answers") -> str:
    """Return the target answer: highest summed confidence, then most frequent, then first.

    ``record[name]`` is one answer, or a list of answers or of VQAv2's objects with ``answer`` and
    ``answer_confidence``. If it is empty or absent, ``multiple_choice_answer`` is used.

    Raises:
        SkipSample: There is no valid answer.
    """
    answers = record.get(name)
    if answers in NOTHING and not isinstance(record.get("multiple_choice_answer"), (list, dict)):
        answers = record.get("multiple_choice_answer")
    if answers in NOTHING and name in record:
        raise SkipSample("no_annotation", f"{name!r} is empty")
    if answers in NOTHING:
        raise SkipSample("missing_field", f"no {name!r}; found {sorted(record)[:8]}")
    if not isinstance(answers, list):
        return words_of(answers, repr(name))
    scores: dict[str, tuple[float, int]] = {}
    for answer in answers:
        entry = answer if isinstance(answer, dict) else {"answer": answer}
        text = words_in(entry, "answer").strip()
        confidence = CONFIDENCE.get(str(entry.get("answer_confidence")), 0.0)
        total, count = scores.get(text, (0.0, 0))
        scores[text] = (total + confidence, count + 1)
    return max(scores, key=lambda text: scores[text])
