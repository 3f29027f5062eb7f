"""The golden cases through the command, and what it says about other files."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_vl.cli.tokenize_text import main

GOLDEN = Path("tests/golden/qwen_vl/qwen_text.json")
IMG_START = 256 + 214
"""<img> in the smallest vocabulary; </img> follows it."""

USER = {"from": "user", "value": "hi"}


def run(folder: Path, document: Any, *options: str) -> Any:
    """What the command makes of a document; options are its own."""
    (folder / "cases.json").write_text(json.dumps(document), encoding="utf-8")
    assert main(["--input", str(folder / "cases.json"), "--output", str(folder / "out.json"), *options]) == 0
    return json.loads((folder / "out.json").read_text(encoding="utf-8"))


def small(folder: Path, name: str, case: Any, *options: str) -> Any:
    """What it adds to one case, with a vocabulary of single bytes and 3 slots an image."""
    return run(folder, {name: [case]}, "--num-bpe-tokens", "256", "--num-queries", "3", *options)[name][0]


def expand(runs: list[list[int]]) -> list[int]:
    return [value for value, count in runs for _ in range(count)]


def test_the_golden_file_comes_out_as_it_is(tmp_path: Path) -> None:
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert [len(golden[name]) for name in ("tokenize", "sft", "chat")] == [12, 4, 2]
    blank = copy.deepcopy(golden)
    for name in ("tokenize", "sft", "chat"):
        for case in blank[name]:
            for key in ("ids_rle", "labels_unshifted_rle", "length", "raw_text"):
                case.pop(key, None)
    assert blank != golden
    assert run(tmp_path, blank, "--label-style", "released") == golden
    assert run(tmp_path, golden, "--label-style", "released") == golden


def test_the_papers_labels_are_the_assistants_turns(tmp_path: Path) -> None:
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    made = run(tmp_path, {"sft": golden["sft"]})
    assert made == run(tmp_path, {"sft": golden["sft"]}, "--label-style", "paper")
    for ours, theirs in zip(made["sft"], golden["sft"], strict=True):
        assert ours["ids_rle"] == theirs["ids_rle"]
        ids = expand(ours["ids_rle"])
        starts = [place for place, token in enumerate(ids) if token == 151644]
        expected: list[int] = []
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            marker, role, _, *answer, _ = ids[start:end]
            learned = [marker, -100, -100, *answer, -100]
            expected += learned if role == 77091 else [-100] * (end - start)
        assert expand(ours["labels_unshifted_rle"]) == expected


def test_a_sample_is_cut_at_its_longest_even_within_an_image(tmp_path: Path) -> None:
    case = {"conversations": [{"from": "user", "value": "<img>a</img>"}, {"from": "assistant", "value": "b"}]}
    whole = small(tmp_path, "sft", case)
    cut = small(tmp_path, "sft", {**case, "max_length": 46})
    assert cut["length"] == 46 == len(expand(cut["ids_rle"])) < whole["length"]
    assert expand(whole["ids_rle"])[:46] == expand(cut["ids_rle"])
    assert IMG_START in expand(cut["ids_rle"]) and IMG_START + 1 not in expand(cut["ids_rle"])


def test_defaults_of_a_chat_and_whatever_else_the_file_holds(tmp_path: Path) -> None:
    case = {"query": "hi", "note": "keep \ud800 me"}
    made = small(tmp_path, "chat", case)
    assert made["note"] == case["note"]
    assert made["raw_text"].startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n")
    assert run(tmp_path, {"tokenize": [], "other": [1, None]}) == {"tokenize": [], "other": [1, None]}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "at least one of the lists tokenize, sft, chat"),
        ({"other": []}, "at least one of the lists"),
        ({"sft": {}}, "sft is dict, expected a list"),
        ({"chat": [{"query": "a"}, "b"]}, "chat[1]: found 'b', expected an object"),
        ({"tokenize": [{"text": "a"}, {"text": "<img>a"}]}, "tokenize[1]: found a <img> that belongs to no image"),
        ({"tokenize": [{"text": "</img>"}]}, "tokenize[0]: found a </img>"),
        ({"tokenize": [{"text": "<imgpad>"}]}, "tokenize[0]: found a <imgpad>"),
        ({"tokenize": [{}]}, "tokenize[0]: text is 'None', expected a text"),
        ({"sft": [{"conversations": []}]}, "sft[0]: conversations is '[]', expected a list of turns"),
        ({"sft": [{"conversations": [{"from": "tool", "value": ""}]}]}, "sft[0]: turn 1 is"),
        ({"sft": [{"conversations": [{"from": "user"}]}]}, "sft[0]: value is 'None'"),
        ({"sft": [{"conversations": [{"from": "user", "value": "<img>"}]}]}, "sft[0]: found a <img> in '<img>'"),
        ({"sft": [{"conversations": [USER], "max_length": 0}]}, "sft[0]: max_length is '0'"),
        (
            {"sft": [{"conversations": [USER, {"from": "assistant", "value": "<img>a</img>"}]}]},
            "expected no image in an answer",
        ),
        ({"chat": [{"query": "</img>"}]}, "chat[0]: found a </img>"),
        ({"chat": [{"query": "a", "history": [["<img>", "b"]]}]}, "chat[0]: found a <img>"),
        ({"chat": [{"query": "a", "history": [["b"]]}]}, "chat[0]: exchange 1 of history"),
        ({"chat": [{"query": "a", "max_window_size": "9"}]}, "chat[0]: max_window_size is '9'"),
        ({"chat": [{"query": "a", "system": None}]}, "chat[0]: system is 'None'"),
    ],
)
def test_what_is_wrong_is_said_with_the_case(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], document: Any, message: str
) -> None:
    (tmp_path / "out.json").write_text("before", encoding="utf-8")
    (tmp_path / "cases.json").write_text(json.dumps(document), encoding="utf-8")
    files = ["--input", str(tmp_path / "cases.json"), "--output", str(tmp_path / "out.json")]
    arguments = [*files, "--num-bpe-tokens", "256"]
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert (tmp_path / "out.json").read_text(encoding="utf-8") == "before"


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"{", [], "expected JSON"),
        (b"\xff", [], "expected JSON"),
        (b'{"chat": []}', ["--num-queries", "0"], "at least one slot"),
        (b'{"chat": []}', ["--num-bpe-tokens", "5"], "num_bpe_tokens = 5"),
        (b'{"chat": []}', ["--vocab-file", "absent"], "cannot be read"),
    ],
)
def test_a_file_or_option_that_cannot_be_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, options: list[str], message: str
) -> None:
    (tmp_path / "cases.json").write_bytes(content)
    assert main(["--input", str(tmp_path / "cases.json"), "--output", str(tmp_path / "out.json"), *options]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["cases.json"]


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cases.json").write_text('{"chat": []}', encoding="utf-8")
    (tmp_path / "out.json").mkdir()
    assert main(["--input", str(tmp_path / "cases.json"), "--output", str(tmp_path / "out.json")]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cases.json", "out.json"]
