"""The output of ``tools/generate.py`` read back, and what is refused in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_vl.errors import DataError
from megatron_vl.evaluation.questions import read_predictions, read_questions


def test_references_are_one_text_or_several(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    line = {"key": "k", "task": "vqa", "prompt": "?", "prediction": "a", "image": "x.png"}
    path.write_text("".join(json.dumps({**line, "reference": truth}) + "\n" for truth in ("a", ["a", "b"])))
    first, second = read_predictions(path)
    assert (first.references, second.references) == (("a",), ("a", "b"))
    assert first.images == ("x.png",) and first.file == path


def test_annotators_need_no_reference(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    line = {"key": "k", "task": "vqa", "prompt": "?", "prediction": "a", "annotators": ["a", "b"]}
    path.write_text(json.dumps(line) + "\n")
    (prediction,) = read_predictions(path)
    assert (prediction.references, prediction.annotators) == ((), ("a", "b"))


@pytest.mark.parametrize("image", [0, False, {}, ["a.png", 1]])
def test_an_image_that_is_no_path_is_an_error(tmp_path: Path, image: Any) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"prompt": "?", "image": image}) + "\n")
    with pytest.raises(DataError, match="line 1: 'image' is .*expected a path or a list of them"):
        read_questions(path)


@pytest.mark.parametrize("reference", [None, [], ["a", None], 3])
def test_a_reference_that_is_no_text_is_an_error(tmp_path: Path, reference: Any) -> None:
    path = tmp_path / "p.jsonl"
    line = {"key": "k", "task": "vqa", "prompt": "?", "prediction": "a", "reference": reference}
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises(DataError, match="line 1: 'reference' is .*expected the true answer"):
        read_predictions(path)


def test_a_question_that_was_skipped_has_no_score(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    line = {"key": "k", "task": "vqa", "prompt": "?", "prediction": None, "reference": "a", "skipped": "empty_prompt"}
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises(DataError, match=r"line 1: was not answered \(empty_prompt\)"):
        read_predictions(path)


@pytest.mark.parametrize("annotators", ["red", ["red"], ["red", 1]])
def test_annotators_that_cannot_vote_are_an_error(tmp_path: Path, annotators: Any) -> None:
    path = tmp_path / "p.jsonl"
    line = {"key": "k", "task": "vqa", "prompt": "?", "prediction": "a", "reference": "a", "annotators": annotators}
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises(DataError, match="line 1: 'annotators' is .*two or more"):
        read_predictions(path)
