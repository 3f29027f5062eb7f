"""Files of commands: refused before the work if they cannot be written, whole or not there after it."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_vl.cli import evaluate_loss, generate
from megatron_vl.cli.output import check_writable, write_whole
from megatron_vl.errors import DataError


@pytest.mark.parametrize("name", ["folder", "file/out.json"])
def test_what_cannot_be_written_is_refused_first_and_last(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    for attempt in (check_writable, lambda path: write_whole(path, "{}")):
        with pytest.raises(DataError, match=rf"--output .*{name}: cannot be written \((Is a directory|File exists)\)"):
            attempt(tmp_path / name)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder"]


def test_an_older_file_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "out.json"
    check_writable(path)
    assert list(path.parent.iterdir()) == []
    write_whole(path, "old")
    check_writable(path)
    assert path.read_text() == "old"
    write_whole(path, "new")
    assert path.read_text() == "new" and list(path.parent.iterdir()) == [path]


def test_commands_ask_before_they_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither opens the checkpoint, which is not there."""
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"prompt": "<img>a.jpg</img>What?"}\n')
    common = ["--checkpoint", str(tmp_path / "none"), "--output", str(tmp_path)]
    assert evaluate_loss.main([*common, "--data-path", str(tmp_path / "data")]) == 2
    assert generate.main([*common, "--inputs", str(questions)]) == 2
    assert capsys.readouterr().err.count("cannot be written (Is a directory)") == 2


def test_an_error_names_the_flag_of_the_file(tmp_path: Path) -> None:
    for attempt in (check_writable, lambda path, flag: write_whole(path, "{}", flag=flag)):
        with pytest.raises(DataError, match=r"^--json .*: cannot be written \(Is a directory\)"):
            attempt(tmp_path, flag="--json")
