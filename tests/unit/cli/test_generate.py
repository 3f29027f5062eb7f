"""Questions: what is refused before any model is loaded, and where the message says it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_vl.cli.generate import read_questions
from megatron_vl.errors import DataError

DIALOGUE = {"prompt": [{"text": "a"}], "history": [["b", "c"]], "system": "d", "image": ["e.png"]}


def write(folder: Path, *questions: Any) -> Path:
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(question) + "\n" for question in questions), encoding="utf-8")
    return path


def test_questions_come_as_they_are(tmp_path: Path) -> None:
    plain = {"prompt": "a", "image": "b.png", "mine": [1]}
    assert read_questions(write(tmp_path, plain)) == [plain]
    assert read_questions(write(tmp_path, plain, DIALOGUE), "chatml") == [plain, DIALOGUE]


@pytest.mark.parametrize(
    ("question", "chat_format", "message"),
    [
        ("a", "raw", "a text 'prompt'"),
        ({}, "chatml", "a text 'prompt'"),
        ({"prompt": [{"text": "a"}]}, "raw", "needs --chat-format chatml"),
        ({"prompt": "a", "history": [["b", "c"]]}, "raw", "'history' and 'system' need --chat-format chatml"),
        ({"prompt": "a", "system": "b"}, "raw", "'history' and 'system' need --chat-format chatml"),
        ({"prompt": "a", "image": [1]}, "raw", "'image' should be a path"),
        ({"prompt": "a", "history": [["b"]]}, "chatml", "exchange 1 of history"),
        ({"prompt": "a", "system": 1}, "chatml", "'system' should be a text"),
    ],
)
def test_what_is_no_question_is_refused_by_its_line(
    tmp_path: Path, question: Any, chat_format: str, message: str
) -> None:
    with pytest.raises(DataError, match="line 2") as error:
        read_questions(write(tmp_path, {"prompt": "a"}, question), chat_format)
    assert message in str(error.value)


def test_a_file_that_is_not_json_lines_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken").write_text('{"prompt": "a"}\n{', encoding="utf-8")
    with pytest.raises(DataError, match="line 2: not JSON"):
        read_questions(tmp_path / "broken")
    with pytest.raises(DataError, match="cannot be read"):
        read_questions(tmp_path / "absent")
