"""What the model reads for each task, to the character, and what of it is supervised."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vl.data.chat_prompts import ChatStyle, render_chat, render_chat_prompt
from megatron_vl.data.prompts import Piece, render, render_prompt
from megatron_vl.data.sample import ImageRef, Region, Sample, Turn
from megatron_vl.data.tokenize import TokenizeOptions, encode_pieces, tokenize_sample
from megatron_vl.data.tokenizer import QwenTokenizer
from megatron_vl.errors import SkipSample

GOLDEN = json.loads(Path("tests/golden/qwen_vl/qwen_text.json").read_text(encoding="utf-8"))
IMAGE = ImageRef("image", b"")
BOX = (0.1, 0.2, 0.3, 0.9999)
BOX_TEXT = "<box>(100,200),(300,999)</box>"
QUAD = (0.1, 0.1, 0.5, 0.1, 0.5, 0.2, 0.1, 0.2)
QUAD_TEXT = "<quad>(100,100),(500,100),(500,200),(100,200)</quad>"
TINY = QwenTokenizer(256)


def sample(task: Any, **fields: Any) -> Sample:
    images = () if task in ("text", "chat") else (IMAGE,)
    return Sample(**{"key": "k", "source": "s", "task": task, "images": images, **fields})


def show(pieces: tuple[Piece, ...]) -> str:
    """The text with ▶ where supervision begins."""
    text, learnt = "", False
    for piece in pieces:
        text += "▶" * (piece.supervised and not learnt) + (piece.text or "[image]")
        learnt = piece.supervised
    return text


GROUNDED = sample(
    "grounded_caption",
    text="Two apples near a red cup.",
    regions=(Region("a red cup", (BOX,), span=(16, 25)), Region("Two apples", (BOX, BOX), span=(0, 10))),
)
CASES = [
    (sample("caption", text="a dog"), "[image]Generate the caption in English:▶ a dog<|endoftext|>"),
    (sample("caption", text="一只狗", language="zh"), "[image]用中文描述图片：▶一只狗<|endoftext|>"),
    (sample("vqa", question="How many?", text="two"), "[image]How many? Answer:▶ two<|endoftext|>"),
    (sample("vqa", question="几只？", text="两只", language="zh"), "[image]几只？ 回答：▶两只<|endoftext|>"),
    (
        GROUNDED,
        "[image]Generate the caption in English with grounding:▶"
        f"<ref> Two apples</ref>{BOX_TEXT}{BOX_TEXT} near<ref> a red cup</ref>{BOX_TEXT}.<|endoftext|>",
    ),
    (
        sample("referring", question="the ear", regions=(Region("the ear", (BOX,)),)),
        f"[image]<ref>the ear</ref>▶{BOX_TEXT}<|endoftext|>",
    ),
    (
        sample("region_caption", text="yellow gloves", regions=(Region("", (BOX,)),)),
        f"[image]<ref>This</ref>{BOX_TEXT} is▶ yellow gloves<|endoftext|>",
    ),
    (
        sample("ocr", regions=(Region("It is", quads=(QUAD,)), Region("managed", quads=(QUAD,)))),
        f"[image]OCR with grounding:▶<ref> It is</ref>{QUAD_TEXT}<ref> managed</ref>{QUAD_TEXT}<|endoftext|>",
    ),
    (sample("text", text=" All of it.\n"), "▶ All of it.\n<|endoftext|>"),
]


@pytest.mark.parametrize(("given_sample", "expected"), CASES, ids=lambda case: getattr(case, "task", ""))
def test_rendered_text_and_supervision(given_sample: Sample, expected: str) -> None:
    pieces = render(given_sample)
    assert show(pieces) == expected
    assert pieces[: len(render_prompt(given_sample))] == render_prompt(given_sample)


def test_the_prompt_needs_no_answer() -> None:
    assert show(render_prompt(sample("vqa", question="How many?"))) == "[image]How many? Answer:"
    assert show(render_prompt(sample("referring", question="the ear"))) == "[image]<ref>the ear</ref>"


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (sample("caption", text="  "), "empty_text"),
        (sample("caption", text="a", images=()), "no_image"),
        (sample("text", text="a", images=(IMAGE,)), "unexpected_image"),
        (sample("vqa", question="", text="a"), "empty_text"),
        (sample("referring", question="a"), "no_region"),
        (sample("referring", question="a", regions=(Region("a"),)), "no_region"),
        (sample("referring", question="a", regions=(Region("a", ((0.1, 0.2, 0.3),)),)), "bad_coordinates"),  # type: ignore[arg-type]
        (
            sample("referring", question="a", regions=(Region("a", ((0.1, 0.2, 0.3, float("nan")),)),)),
            "bad_coordinates",
        ),
        (replace(GROUNDED, text="Two"), "bad_span"),
        (replace(GROUNDED, regions=(*GROUNDED.regions, Region("red", (BOX,), span=(18, 21)))), "overlapping_regions"),
    ],
)
def test_a_sample_without_what_its_task_needs_is_skipped(broken: Sample, reason: str) -> None:
    with pytest.raises(SkipSample) as error:
        render(broken)
    assert error.value.reason == reason


HOSTILE = st.lists(
    st.sampled_from(
        ["<img>", "</img>", "<imgpad>", "<ref>", "</ref>", "<box>", "</box>", "<|im_end|>", "a", " ", "\n"]
    ),
    max_size=12,
).map("".join)


@settings(derandomize=True, max_examples=100, deadline=None)
@given(HOSTILE, st.sampled_from(["caption", "vqa", "chat"]))
def test_no_text_opens_an_image_span(text: str, task: Any) -> None:
    turns = (Turn("user", text), Turn("assistant", "yes " + text), Turn("user", "<img>file</img>"))
    made = sample(task, text=text + ".", question=text + "?", turns=turns, images=(IMAGE,))
    options = TokenizeOptions(num_queries=4, max_length=10_000)
    try:
        tokens = tokenize_sample(made, TINY, options).tokens.tolist()
    except SkipSample as error:
        assert error.reason in ("image_mismatch", "image_in_answer")
        return
    special = TINY.special
    assert tokens.count(special.img_start) == tokens.count(special.img_end) == 1
    assert tokens.count(special.img_pad) == 4
    begin = tokens.index(special.img_start)
    assert tokens[begin + 1 : begin + 6] == [special.img_pad] * 4 + [special.img_end]


def test_a_long_sample_is_skipped_and_a_long_document_is_not() -> None:
    options = TokenizeOptions(num_queries=4, max_length=20)
    with pytest.raises(SkipSample, match="too_long"):
        tokenize_sample(sample("caption", text="long " * 10), TINY, options)
    assert tokenize_sample(sample("text", text="long " * 10), TINY, options).length > 20


# Chat


def expand(runs: list[list[int]]) -> list[int]:
    return [value for value, count in runs for _ in range(count)]


@pytest.fixture(scope="module")
def full() -> QwenTokenizer:
    return QwenTokenizer(151643)


@pytest.mark.parametrize("case", GOLDEN["sft"], ids=lambda case: str(case["length"]))
def test_released_supervision_is_the_originals(full: QwenTokenizer, case: dict[str, Any]) -> None:
    turns = tuple(Turn(turn["from"], turn["value"]) for turn in case["conversations"])
    images = (IMAGE,) * json.dumps(case["conversations"]).count("<img>")
    options = TokenizeOptions(num_queries=256, max_length=2048, chat_style="released")
    made = tokenize_sample(sample("chat", turns=turns, images=images), full, options)
    labels = [token if learnt else -100 for token, learnt in zip(made.tokens.tolist(), made.supervised, strict=True)]
    assert made.tokens.tolist() == expand(case["ids_rle"])
    assert labels == expand(case["labels_unshifted_rle"])


@pytest.mark.parametrize("case", GOLDEN["chat"], ids=lambda case: case["query"][:10])
def test_chat_prompt_is_the_originals(full: QwenTokenizer, case: dict[str, Any]) -> None:
    turns = [Turn("system", case["system"])]
    for query, reply in case["history"]:
        turns += [Turn("user", query), Turn("assistant", reply)]
    pieces = render_chat_prompt([*turns, Turn("user", case["query"])])
    assert encode_pieces(pieces, full, num_queries=256).tokens.tolist() == expand(case["ids_rle"])
    assert not any(piece.supervised for piece in pieces)


@pytest.mark.parametrize(("style", "line_end_learnt"), [("paper", False), ("released", True)])
def test_chat_learns_answers_and_chatml_tokens(style: ChatStyle, line_end_learnt: bool) -> None:
    pieces = render_chat(sample("chat", turns=(Turn("user", "hi"), Turn("assistant", "<ref>yes</ref>"))), style)
    learnt = [piece.text for piece in pieces if piece.supervised and piece.text != "\n"]
    turn = ["<|im_start|>", "<|im_end|>"]
    assert learnt == turn + turn + ["<|im_start|>", "<ref>", "yes", "</ref>", "<|im_end|>"]
    assert any(piece.supervised and piece.text == "\n" for piece in pieces) == line_end_learnt


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ((Turn("user", "hi"),), "no_answer"),
        ((Turn("assistant", "hi"), Turn("user", "hi")), "no_answer"),
        ((Turn("user", "<img>a</img>"), Turn("assistant", "hi")), "image_mismatch"),
        ((Turn("user", "hi"), Turn("assistant", "<img>a</img>")), "image_in_answer"),
    ],
)
def test_a_dialogue_that_cannot_be_used_is_skipped(turns: tuple[Turn, ...], reason: str) -> None:
    with pytest.raises(SkipSample) as error:
        render_chat(sample("chat", turns=turns))
    assert error.value.reason == reason
