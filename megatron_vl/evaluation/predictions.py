"""The output of ``tools/generate.py`` as typed records."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vl.errors import DataError
from megatron_vl.evaluation.json_records import make_record, read_json_lines


@dataclass(frozen=True)
class Prediction:
    """One question, its true answer and the model's answer."""

    key: str
    task: str
    prompt: str
    references: tuple[str, ...]
    """The true answer, or several that are equally right, in the model's own markup."""
    prediction: str
    image: Path | None = None
    annotators: tuple[str, ...] = ()
    """For VQA, the answers of two or more annotators; then the references are not used for scoring."""


def load_predictions(path: Path) -> tuple[Prediction, ...]:
    """Read the output of ``tools/generate.py``; image paths may be relative to the file's folder."""
    predictions = []
    for i, line in enumerate(read_json_lines(path, written_by="tools/generate.py"), 1):
        if line.get("prediction") is None and "skipped" in line:
            raise DataError(
                f"{path}, line {i}: was not answered ({line['skipped']}), so there is no score of the whole file; mend "
                "or remove the question and generate again"
            )
        image = line.get("image")
        values = {
            **line,
            "references": _references(line, f"{path}, line {i}"),
            "image": None if image is None else path.parent / image,
            "annotators": _annotators(line, f"{path}, line {i}"),
        }
        predictions.append(make_record(Prediction, values, path, f"line {i}"))
    return tuple(predictions)


def _references(line: dict[str, Any], where: str) -> tuple[str, ...]:
    found = line.get("reference")
    references = found if isinstance(found, list) else [found]
    if not references or not all(isinstance(answer, str) for answer in references):
        raise DataError(f"{where}: 'reference' is {found!r:.80}; expected the true answer, or a list of true answers")
    return tuple(references)


def _annotators(line: dict[str, Any], where: str) -> tuple[str, ...]:
    found = line.get("annotators", [])
    if not isinstance(found, list) or len(found) == 1 or not all(isinstance(answer, str) for answer in found):
        raise DataError(f"{where}: 'annotators' is {found!r}; expected a list of two or more texts, or nothing")
    return tuple(found)
