"""Files of answers: written as they come, continued after a kill at any byte, in constant memory."""

from __future__ import annotations

import itertools
import json
import tracemalloc
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_vl.data.prompting.tokenizer import QwenTokenizer
from megatron_vl.errors import DataError
from megatron_vl.evaluation.answer_file import AnswerFile, Tally
from megatron_vl.evaluation.answering import QuestionEncoder, answer_questions
from megatron_vl.evaluation.questions import iterate_questions
from megatron_vl.generation.requests import Answer, Request
from tests.helpers.tiny import MODEL

TOKENIZER = QwenTokenizer(MODEL.num_bpe_tokens)
SETTINGS: dict[str, Any] = {"questions": "a", "checkpoint": "b", "temperature": 0.5, "stop": []}
QUESTIONS = [
    {"key": "k", "prompt": "one", "mine": [1]},
    {"prompt": ""},  # is not asked
    {"prompt": "two \u2028 \ud800", "image": "a.png"},  # its image cannot be used
    {"prompt": "three"},
    {"prompt": ""},
]


def echo(requests: Iterable[Request]) -> Iterator[Answer]:
    """An engine that repeats the prompt, and cannot use any image."""
    for request in requests:
        yield Answer(request.number, *((), "broken") if request.pixels else (request.tokens, None))


def questions_in(folder: Path, questions: Iterable[Any] = QUESTIONS) -> Path:
    path = folder / "questions.jsonl"
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(item) + "\n" for item in questions)
    return path


def run(path: Path, output: AnswerFile, *, until: int | None = None) -> Tally:
    """Answer the questions that are left; ``until``: die after so many lines of this run."""
    tally = output.resume(iterate_questions(path))
    questions = iterate_questions(path)
    for _ in range(tally.lines):
        next(questions)
    encoder = QuestionEncoder(TOKENIZER, MODEL)
    predictions = answer_questions(questions, encoder, echo, lambda tokens: f"said {TOKENIZER.decode(tokens)}")
    if until is not None:
        predictions = itertools.islice(predictions, until)
    output.append(predictions, tally, lambda: None)
    if until is None:
        output.finish()
    return tally


def test_answers_are_in_the_order_of_the_questions(tmp_path: Path) -> None:
    tally = run(questions_in(tmp_path), AnswerFile(tmp_path / "out", SETTINGS))
    lines = [json.loads(line) for line in (tmp_path / "out").read_bytes().splitlines()]
    assert [line["prediction"] for line in lines] == ["said one", None, None, "said three", None]
    assert [line.get("skipped", "").partition(":")[0] for line in lines] == [
        "",
        "empty_prompt",
        "broken",
        "",
        "empty_prompt",
    ]
    assert lines[0] == {**QUESTIONS[0], "prediction": "said one"}
    assert tally.summary.startswith("2 answers; skipped 3 of 5 questions: line 2, empty_prompt: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "questions.jsonl"]


def test_a_run_that_was_killed_at_any_byte_gives_the_same_file(tmp_path: Path) -> None:
    """Every eleventh byte, and before and after each line end."""
    path = questions_in(tmp_path)
    run(path, AnswerFile(tmp_path / "whole", SETTINGS))
    whole = (tmp_path / "whole").read_bytes()
    output = AnswerFile(tmp_path / "out", SETTINGS)
    ends = [place + 1 for place, byte in enumerate(whole) if byte == ord("\n")]
    for cut in sorted({*range(0, len(whole), 11), *ends, *(end - 1 for end in ends)}):
        run(path, output, until=0)
        output.part.write_bytes(whole[:cut])
        tally = run(path, output)
        assert output.path.read_bytes() == whole and (tally.lines, tally.skipped) == (5, 3), cut


@pytest.mark.parametrize("until", range(6))
def test_a_run_that_was_stopped_after_any_line_continues(tmp_path: Path, until: int) -> None:
    path, output = questions_in(tmp_path), AnswerFile(tmp_path / "out", SETTINGS)
    run(path, output, until=until)
    assert not output.path.exists(), "a part of the answers never has the name of all"
    assert output.part.read_bytes().count(b"\n") == until
    run(path, output)
    assert [json.loads(line)["prompt"] for line in output.path.read_bytes().splitlines()] == [
        question["prompt"] for question in QUESTIONS
    ]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"questions": "c"}, "questions was 'a' and is 'c'"),
        ({"checkpoint": "c"}, "checkpoint was 'b' and is 'c'"),
        ({"temperature": 0.6}, "temperature was 0.5 and is 0.6"),
        ({"stop": ["x"]}, r"stop was \[\] and is \['x'\]"),
        ({"later": 1}, "later was None and is 1"),
    ],
)
def test_a_part_of_another_run_is_refused_by_name(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    path = questions_in(tmp_path)
    run(path, AnswerFile(tmp_path / "out", SETTINGS), until=2)
    before = (tmp_path / "out.part").read_bytes()
    with pytest.raises(DataError, match=f"out.part is of another run: {said}; .*--restart"):
        run(path, AnswerFile(tmp_path / "out", SETTINGS | changed))
    assert (tmp_path / "out.part").read_bytes() == before
    run(path, AnswerFile(tmp_path / "out", SETTINGS | changed, restart=True))
    assert (tmp_path / "out").read_bytes().count(b"\n") == 5


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ('{"prompt": "other", "prediction": ""}\n', "line 1: is not the answer to line 1"),
        ('{"key": "k", "prompt": "one", "mine": [1]}\n', "line 1: is not the answer to line 1"),
        ("{\n", "line 1: not JSON"),
        ("[]\n", "line 1: is not the answer"),
    ],
)
def test_lines_that_are_no_answers_are_refused(tmp_path: Path, lines: str, said: str) -> None:
    path, output = questions_in(tmp_path), AnswerFile(tmp_path / "out", SETTINGS)
    run(path, output, until=0)
    output.part.write_text(lines)
    with pytest.raises(DataError, match=said):
        run(path, output)


def test_more_answers_than_questions_are_refused(tmp_path: Path) -> None:
    path, output = questions_in(tmp_path), AnswerFile(tmp_path / "out", SETTINGS)
    run(path, output, until=5)
    questions_in(tmp_path, QUESTIONS[:4])
    with pytest.raises(DataError, match=r"out\.part, line 5: there is no such question"):
        run(path, output)


def test_a_part_without_settings_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out.part").write_text("")
    with pytest.raises(DataError, match=r"out\.part\.json, which says what wrote it, is missing"):
        run(questions_in(tmp_path), AnswerFile(tmp_path / "out", SETTINGS))


def test_two_runs_do_not_write_one_output(tmp_path: Path) -> None:
    first, second = (AnswerFile(tmp_path / "out", SETTINGS) for _ in range(2))
    with first.locked(), pytest.raises(DataError, match="out: is being written by another run"), second.locked():
        pass
    with second.locked():
        pass


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """Peaks of a new run and of one that continues, for 200 and 2,000 lines of 4 kB."""
    peaks = {}
    for count in (200, 2_000):
        path = questions_in(tmp_path, ({"prompt": "x", "mine": "y" * 4000} for _ in range(count)))
        output = AnswerFile(tmp_path / f"out{count}", SETTINGS)
        tracemalloc.start()
        run(path, output, until=count // 2)
        run(path, output)
        peaks[count] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert output.path.read_bytes().count(b"\n") == count
    assert peaks[2_000] < peaks[200] + 200_000, peaks
