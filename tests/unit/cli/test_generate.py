"""Questions: what is refused before any model is loaded, and where the message says it is."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from megatron_vl.cli import generate
from megatron_vl.config.schema import ParallelConfig, RunConfig
from megatron_vl.errors import DataError
from megatron_vl.evaluation.answer_file import Tally
from megatron_vl.evaluation.questions import Prediction, read_questions, to_lines
from megatron_vl.generation.engine import Engine
from megatron_vl.generation.requests import GenerationOptions
from megatron_vl.model.build import build_model
from tests.helpers.ranks import RankError, RankPools, Start
from tests.helpers.tiny import tiny_config
from tests.parallel.generating import new_tokens, prompts
from tests.parallel.saving import save_fresh_weights

DIALOGUE = {"image": ["e.png", "f.png"], "prompt": [{"text": "a"}], "system": "d", "history": [["b", "c"]]}


def write(folder: Path, *questions: Any) -> Path:
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(question) + "\n" for question in questions), encoding="utf-8")
    return path


def test_questions_are_written_as_they_were_read(tmp_path: Path) -> None:
    plain = {"key": 1, "image": "b.png", "prompt": "a", "reference": ["c", "d"], "mine": [1]}
    path = write(tmp_path, plain, DIALOGUE)
    questions = read_questions(path)
    assert to_lines(questions) == path.read_text(encoding="utf-8")
    assert [question.line for question in questions] == [1, 2] and questions[0].others == {"mine": [1]}


def test_line_separators_within_a_text_end_no_line(tmp_path: Path) -> None:
    """JSON escapes no U+2028, U+2029 or U+0085, and Python takes each for the end of a line."""
    path = tmp_path / "questions.jsonl"
    lines = [json.dumps({"prompt": f"a{mark}b"}, ensure_ascii=False) for mark in "\u2028\u2029\x85"]
    path.write_bytes(("\ufeff" + "\r\n".join(lines) + "\n\n").encode())
    assert [question.prompt for question in read_questions(path)] == [f"a{m}b" for m in "\u2028\u2029\x85"]


def answers(start: Start, arguments: list[str]) -> list[Prediction]:
    options = generate._build_parser().parse_args(arguments)
    with start.topology(generate.parallel_config(options)) as topology:
        return list(generate._answers(options, topology, 0))


def test_what_cannot_be_asked_is_skipped_and_counted(ranks: RankPools, tmp_path: Path) -> None:
    checkpoint = ranks(1).run(save_fresh_weights, tiny_config(), tmp_path / "saved")[0]
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes((tmp_path / "good.png").read_bytes()[:40])
    good = {"key": "k", "prompt": "a", "image": "good.png"}
    wrong = [{**good, "image": "bad.png"}, {"prompt": ""}, {"prompt": "a", "image": "absent.png"}]
    inputs = write(tmp_path, good, *wrong, good)
    arguments = ["--checkpoint", str(checkpoint), "--inputs", str(inputs), "--output", "-", "--max-new-tokens", "2"]
    found = ranks(1).run(answers, arguments)[0]
    assert found[0].prediction == found[4].prediction and found[0].skipped is None
    reasons = [str(answer.skipped).partition(":")[0] for answer in found[1:4]]
    assert reasons == ["unreadable_image", "empty_prompt", "missing_image"]
    tally = Tally()
    for answer in found:
        tally.count(answer.name, answer.skipped)
    said = tally.summary
    assert said.startswith("2 answers; skipped 3 of 5 questions: line 2 (k), unreadable_image: ")
    assert "line 3, empty_prompt" in said


def continue_run(start: Start, arguments: list[str], lines: int | None = None) -> None:
    """What the command does; ``lines``: it is killed after so many lines, within the next."""
    options = generate._build_parser().parse_args(arguments)
    with start.topology(generate.parallel_config(options)) as topology:
        if topology.rank != 0:
            generate._write_answers(options, topology, None)
            return
        with generate._writer(options) as writer:
            generate._write_answers(options, topology, writer)
    if lines is not None:
        written = options.output.read_bytes().splitlines(keepends=True)
        (options.output.parent / "out.part").write_bytes(b"".join(written[:lines]) + written[lines][:9])
        (options.output.parent / "out.part.json").write_text(json.dumps(generate._settings(options)))
        options.output.unlink()


def test_a_killed_run_continues_at_another_layout(ranks: RankPools, tmp_path: Path) -> None:
    checkpoint = ranks(1).run(save_fresh_weights, tiny_config(), tmp_path / "saved")[0]
    Image.radial_gradient("L").save(tmp_path / "good.png")
    texts = ("a", "much longer than the others", "", "b", "c d", "e", "f" * 9)
    image = {"image": "good.png"}
    inputs = write(tmp_path, *({"prompt": text, **(image if len(text) % 2 else {})} for text in texts))
    flags = "--max-new-tokens 5 --temperature 2 --seed 3 --batch-size 2"
    arguments = ["--checkpoint", str(checkpoint), "--inputs", str(inputs), *flags.split(), "--output"]
    ranks(1).run(continue_run, [*arguments, str(tmp_path / "whole")])
    whole = (tmp_path / "whole").read_bytes()
    assert len({json.loads(line)["prediction"] for line in whole.splitlines()}) == len(texts)
    for lines, layout in ((3, "--tensor-model-parallel-size=1"), (4, "--pipeline-model-parallel-size=2")):
        ranks(1).run(continue_run, [*arguments, str(tmp_path / "out")], lines)
        ranks(2).run(continue_run, [*arguments, str(tmp_path / "out"), layout])
        assert (tmp_path / "out").read_bytes() == whole and not list(tmp_path.glob("out.part*"))


def test_an_answer_replaces_what_an_earlier_one_left(tmp_path: Path) -> None:
    """The output of one run may be the input of the next, when the image that was missing is there."""
    before = {"key": 1, "prompt": "a", "prediction": None, "skipped": "missing_image: a.png"}
    assert read_questions(write(tmp_path, before))[0].fields == {"key": 1, "prompt": "a"}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--max-new-tokens 0", "--max-new-tokens 0: expected at least 1"),
        ("--batch-size 0", "--batch-size 0: expected at least 1"),
        ("--max-window-size -1", "--max-window-size -1: expected at least 0"),
        ("--tensor-model-parallel-size 0", "--tensor-model-parallel-size 0: expected at least 1"),
        ("--pipeline-model-parallel-size -1", "--pipeline-model-parallel-size -1: expected at least 1"),
        ("--pipeline-model-parallel-size 2", "the run has 1 ranks"),
    ],
)
def test_sizes_that_cannot_be_are_refused(flags: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--checkpoint", "c", "--inputs", "i", "--output", "o"]
    assert generate.main([*files, *flags.split()]) == 2
    assert said in capsys.readouterr().err


def test_a_model_that_cannot_be_split_so_is_refused(ranks: RankPools, tmp_path: Path) -> None:
    checkpoint = ranks(1).run(save_fresh_weights, tiny_config(), tmp_path / "saved")[0]
    with pytest.raises(RankError, match="ConfigError.*num_attention_heads 4 cannot be split over"):
        ranks(1).run(split_by_three, checkpoint)


def split_by_three(start: Start, checkpoint: Path) -> None:
    with start.topology(ParallelConfig()) as topology:
        Engine.from_checkpoint(checkpoint, parallel=ParallelConfig(tensor_model_parallel_size=3), topology=topology)


def nothing_but_nan(start: Start, config: RunConfig) -> list[list[int]]:
    with start.topology(config.parallel) as topology:
        chunks = build_model(config, topology)
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.data.fill_(math.nan)
        return new_tokens(Engine(chunks, config, topology), prompts(config), GenerationOptions(max_new_tokens=2))


def test_weights_that_are_no_numbers_give_no_answers(ranks: RankPools) -> None:
    with pytest.raises(RankError, match="NotFiniteError.*logits are not numbers"):
        ranks(1).run(nothing_but_nan, tiny_config())


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ("a", "expected an object with a 'prompt'"),
        ({}, "expected an object with a 'prompt'"),
        ({"prompt": "a", "image": [1]}, r"'image' is \[1\], expected a path"),
        ({"prompt": "a", "reference": 1}, "'reference' is 1, expected the true answer"),
        ({"prompt": "a", "history": [["b"]]}, "exchange 1 of history"),
        ({"prompt": "a", "system": 1}, "'system' is 1, expected a text"),
        ({"prompt": [{"text": "a"}]}, "need --chat-format chatml"),
        ({"prompt": "a", "history": [["b", "c"]]}, "'history', 'system' and .* need --chat-format chatml"),
        ({"prompt": "a", "system": "b"}, "'history', 'system' and .* need --chat-format chatml"),
    ],
)
def test_what_is_no_question_is_refused_by_its_line(tmp_path: Path, question: Any, message: str) -> None:
    with pytest.raises(DataError, match=rf"questions\.jsonl, line 2: .*{message}"):
        path = write(tmp_path, {"prompt": "a"}, question)
        generate._check_questions(argparse.Namespace(inputs=path, chat_format="raw"))


def test_a_file_that_is_not_json_lines_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken").write_text('{"prompt": "a"}\n{', encoding="utf-8")
    with pytest.raises(DataError, match="line 2: not JSON"):
        read_questions(tmp_path / "broken")
    with pytest.raises(DataError, match="absent: cannot be read .*make_questions.py or by hand"):
        read_questions(tmp_path / "absent")
    with pytest.raises(DataError, match="cannot be read"):
        read_questions(tmp_path)
