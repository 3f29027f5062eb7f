"""Chats with a model of fresh weights: answers end at stop sequences, and the command puts questions as dialogues."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from megatron_vl.config.special_tokens import SpecialTokens
from tests.helpers.ranks import RankPools
from tests.helpers.tiny import MODEL, tiny_config
from tests.parallel.chatting import LONG, answer_texts, run_generate, stop_on_rank
from tests.parallel.saving import save_fresh_weights


@pytest.fixture(scope="module")
def endless(ranks: RankPools) -> list[list[int]]:
    answers: list[list[int]] = ranks(1).run(stop_on_rank, tiny_config(), (), 5)[0]
    assert [len(answer) for answer in answers] == [LONG] * len(answers)
    return answers


@pytest.mark.parametrize("batch_size", [1, 5])
def test_an_answer_ends_before_the_first_stop_sequence(
    ranks: RankPools, endless: list[list[int]], batch_size: int
) -> None:
    stops = (tuple(endless[0][4:6]), (endless[1][8],), (endless[2][3], -1))
    cut = ranks(1).run(stop_on_rank, tiny_config(), stops, batch_size)[0]
    assert cut == [_before_first(answer, stops) for answer in endless]
    assert len(cut[0]) < LONG and len(cut[1]) < LONG and len({len(answer) for answer in cut}) > 1


def _before_first(answer: list[int], stops: tuple[tuple[int, ...], ...]) -> list[int]:
    places = (
        start
        for end in range(1, len(answer) + 1)
        for stop in stops
        for start in (end - len(stop),)
        if start >= 0 and tuple(answer[start:end]) == stop
    )
    return answer[: next(places, len(answer))]


# --- tools/generate.py ------------------------------------------------------------------------------------------------

CONFIG = tiny_config(
    model={"language": replace(MODEL.language, vocab_size=SpecialTokens(MODEL.num_bpe_tokens).num_tokens)}
)
"""Without rows of the vocabulary that have no text."""
SLOTS = "<img>" + "<imgpad>" * 4 + "</img>"
QUESTION = {
    "key": "q",
    "image": "b.png",
    "prompt": [{"text": "Is it "}, {"ref": "here", "box": [[1, 2, 3, 4]]}, {"text": "?"}],
    "history": [["Picture 1: <img>a.png</img>\nWhat?", "A cat."], ["Sure?", "Yes."]],
    "mine": 1,
}
SYSTEMS = ("Be short.", "Be kind.", "", "You are a cat.")
HISTORY = (
    f"<|im_start|>user\nPicture 1: {SLOTS}\nWhat?<|im_end|>\n<|im_start|>assistant\nA cat.<|im_end|>\n"
    "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
)


def written_out(system: str, number: int, history: str) -> str:
    return (
        f"<|im_start|>system\n{system}<|im_end|>\n{history}<|im_start|>user\nPicture {number}: {SLOTS}\n"
        "Is it <ref>here</ref><box>(1,2),(3,4)</box>?<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.fixture(scope="module")
def folder(ranks: RankPools, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint and two images."""
    folder = tmp_path_factory.mktemp("chat")
    ranks(1).run(save_fresh_weights, CONFIG, folder / "checkpoint")
    Image.new("RGB", (70, 50), "red").save(folder / "a.png")
    Image.radial_gradient("L").save(folder / "b.png")
    return folder


def answers(ranks: RankPools, folder: Path, questions: list[Any], *options: str) -> list[Any]:
    """What the command writes."""
    (folder / "questions.jsonl").write_text("".join(json.dumps(item) + "\n" for item in questions), encoding="utf-8")
    paths = (f"--checkpoint={folder}/checkpoint", f"--inputs={folder}/questions.jsonl", f"--output={folder}/answers")
    assert ranks(1).run(run_generate, *paths, *options) == [0]
    return [json.loads(line) for line in (folder / "answers").read_text(encoding="utf-8").splitlines()]


def test_a_question_with_history_is_answered_as_a_dialogue(ranks: RankPools, folder: Path) -> None:
    bare = {name: value for name, value in QUESTION.items() if name != "history"}
    questions = [question | {"system": system} for question in (QUESTION, bare) for system in SYSTEMS]
    made = answers(ranks, folder, questions, "--chat-format", "chatml")
    assert [{**item, "prediction": ""} for item in made] == [{**item, "prediction": ""} for item in questions]
    texts = [(written_out(system, 2, HISTORY), [folder / "a.png", folder / "b.png"]) for system in SYSTEMS]
    texts += [(written_out(system, 1, ""), [folder / "b.png"]) for system in SYSTEMS]
    expected = ranks(1).run(answer_texts, CONFIG, folder / "checkpoint", texts)[0]
    assert [item["prediction"] for item in made] == expected
    assert len(set(expected)) >= len(SYSTEMS), "answers that differ"


def test_a_window_too_small_for_the_history_leaves_it_out_but_keeps_the_number(ranks: RankPools, folder: Path) -> None:
    questions = [QUESTION | {"system": system} for system in SYSTEMS]
    made = answers(ranks, folder, questions, "--chat-format", "chatml", "--max-window-size", "20")
    texts = [(written_out(system, 2, ""), [folder / "b.png"]) for system in SYSTEMS]
    assert [item["prediction"] for item in made] == ranks(1).run(answer_texts, CONFIG, folder / "checkpoint", texts)[0]


def test_a_raw_question_has_no_turns(ranks: RankPools, folder: Path) -> None:
    made = answers(ranks, folder, [{"image": ["a.png", "b.png"], "prompt": "<ref>What</ref> Answer:"}])
    texts = [(f"{SLOTS}{SLOTS}<ref>What</ref> Answer:", [folder / "a.png", folder / "b.png"])]
    assert [made[0]["prediction"]] == ranks(1).run(answer_texts, CONFIG, folder / "checkpoint", texts)[0]
