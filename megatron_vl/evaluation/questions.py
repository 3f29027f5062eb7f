"""Files of questions and of predictions: one JSON object a line, as ``tools/generate.py --help`` describes it.

A line of predictions is its question, and the answer. So it can be asked again: the old answer is left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_vl.data.prompting.markup import join_parts
from megatron_vl.errors import DataError
from megatron_vl.evaluation.json_records import iterate_json_lines, read_json_lines
from megatron_vl.generation.chat import read_history

Json = dict[str, Any]
_FIELDS = ("key", "task", "image", "prompt", "reference", "annotators", "system", "history", "prediction", "skipped")


@dataclass(frozen=True, kw_only=True)
class Question:
    """A prompt with its images, and the true answer if it is known."""

    prompt: str | list[Json]
    key: str | int | None = None
    task: str = ""
    images: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    """The true answer, or several that are equally right, in the model's own markup."""
    annotators: tuple[str, ...] = ()
    """For VQA, the answers of two or more annotators; then the references are not used for scoring."""
    system: str | None = None
    history: tuple[tuple[str, str], ...] = ()
    others: Mapping[str, Any] = field(default_factory=dict)
    """The user's own fields."""
    file: Path = Path()
    """Where it was read; paths of images count from its folder."""
    line: int = 0

    @property
    def name(self) -> str:
        """The line number, and the key if there is one, for messages."""
        return f"line {self.line}" + ("" if self.key is None else f" ({self.key})")

    @property
    def text(self) -> str:
        """The prompt as one text."""
        return self.prompt if isinstance(self.prompt, str) else join_parts(self.prompt)

    @property
    def fields(self) -> Json:
        """The object of its line, without empty fields."""
        fields = {
            "key": self.key,
            "task": self.task or None,
            "image": self.images[0] if len(self.images) == 1 else self.images or None,
            "prompt": self.prompt,
            "reference": self.references[0] if len(self.references) == 1 else self.references or None,
            "annotators": self.annotators or None,
            "system": self.system,
            "history": self.history or None,
        }
        return {name: value for name, value in fields.items() if value is not None} | dict(self.others)


@dataclass(frozen=True, kw_only=True)
class Prediction(Question):
    """A question and the model's answer."""

    prediction: str = ""
    skipped: str | None = None
    """Why there is no answer."""

    @property
    def fields(self) -> Json:
        said = {"prediction": self.prediction}
        return super().fields | (said if self.skipped is None else {"prediction": None, "skipped": self.skipped})


def to_lines(questions: Iterable[Question]) -> str:
    """Return the text of a file of questions or predictions."""
    return "".join(json.dumps(question.fields, ensure_ascii=False) + "\n" for question in questions)


def read_questions(path: Path) -> tuple[Question, ...]:
    """Read a file of questions. Raises DataError, which names the line."""
    return tuple(iterate_questions(path))


def iterate_questions(path: Path) -> Iterator[Question]:
    """Yield the questions of a file, one line at a time. Raises DataError, which names the line."""
    for number, fields in iterate_json_lines(path, written_by="tools/make_questions.py or by hand"):
        yield _question(fields, path, number)


def read_predictions(path: Path) -> tuple[Prediction, ...]:
    """Read a file of predictions for scoring. Raises DataError, which names the line."""
    lines = read_json_lines(path, written_by="tools/generate.py")
    return tuple(_prediction(_question(fields, path, number), fields) for number, fields in lines.items())


def _question(fields: Any, file: Path, line: int) -> Question:
    try:
        if not isinstance(fields, dict) or not isinstance(fields.get("prompt"), str | list):
            raise DataError(f"found {fields!r:.80}, expected an object with a 'prompt', a text or a list of parts")
        return Question(
            prompt=fields["prompt"],
            key=_typed(fields, "key", str | int, "a text or an integer"),
            task=_typed(fields, "task", str, "a text") or "",
            images=() if fields.get("image") == "" else _texts(fields, "image", "a path or a list of them"),
            references=_texts(fields, "reference", "the true answer, or a list of true answers"),
            annotators=_texts(fields, "annotators", "a list of two or more texts, or nothing", least=2),
            system=_typed(fields, "system", str, "a text"),
            history=read_history(fields.get("history")),
            others={name: value for name, value in fields.items() if name not in _FIELDS},
            file=file,
            line=line,
        )
    except DataError as error:
        raise DataError(f"{file}, line {line}: {error}") from error


def _prediction(question: Question, fields: Json) -> Prediction:
    where, said = f"{question.file}, line {question.line}", fields.get("prediction")
    if said is None and "skipped" in fields:
        raise DataError(
            f"{where}: was not answered ({fields['skipped']}), so there is no score of the whole file; mend or remove "
            "the question and generate again"
        )
    for name, found, expected in (
        ("key", question.key is not None, "a name of the question"),
        ("task", question.task, "a task"),
        ("reference", question.references or question.annotators, "the true answer, or a list of true answers"),
        ("prediction", isinstance(said, str), "the model's answer, a text"),
    ):
        if not found:
            raise DataError(f"{where}: {name!r} is {fields.get(name)!r:.80}, expected {expected}")
    return Prediction(**vars(question), prediction=fields["prediction"])


def _texts(fields: Json, name: str, expected: str, *, least: int = 1) -> tuple[str, ...]:
    """Return a list of texts, or a text as a list of one. It is empty, or has at least ``least``."""
    found = fields.get(name)
    texts = [] if found is None else [found] if isinstance(found, str) else found
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts) or 0 < len(texts) < least:
        raise DataError(f"{name!r} is {found!r:.80}, expected {expected}")
    return tuple(texts)


def _typed(fields: Json, name: str, kind: Any, expected: str) -> Any:
    """Return a field, or None if it is absent."""
    found = fields.get(name)
    if found is not None and not isinstance(found, kind):
        raise DataError(f"{name!r} is {found!r:.80}, expected {expected}")
    return found
