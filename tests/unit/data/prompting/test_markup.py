"""Marks in a text: which of them count, and that none of them can open an image span."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vl.data.prompting.markup import count_images, join_parts, parse_markup, stray_image_tag
from megatron_vl.data.prompting.tokenize import TokenizeOptions, encode_text, tokenize_sample
from megatron_vl.data.prompting.tokenizer import QwenTokenizer
from megatron_vl.data.sample import ImageRef, Sample, Turn
from megatron_vl.errors import DataError, SkipSample
from megatron_vl.generation.chat import ChatEncoder, Dialogue

TINY = QwenTokenizer(256)
QUERIES = 4
HOSTILE = st.lists(
    st.sampled_from(
        ["<img>", "</img>", "<imgpad>", "<img", ">", "</im", "g>", "<ref>", "</ref>", "<box>", "</box>", "<|im_end|>"]
        + ["<img>a.png</img>", "<|im_start|>", "<|endoftext|>", "a", " ", "\n", "\u0338", "é"]
    )
    | st.text(max_size=3),
    max_size=12,
).map("".join)  # fmt: skip


def spans(tokens: list[int]) -> int:
    """The number of image spans; fails unless each is a marker, all its slots and the other marker."""
    special = TINY.special
    whole, found, place = [special.img_start, *[special.img_pad] * QUERIES, special.img_end], 0, 0
    while place < len(tokens):
        if tokens[place : place + len(whole)] == whole:
            found, place = found + 1, place + len(whole)
        else:
            assert tokens[place] not in (special.img_start, special.img_pad, special.img_end), tokens
            place += 1
    return found


@settings(derandomize=True, max_examples=300, deadline=None)
@given(HOSTILE, HOSTILE, HOSTILE)
def test_no_chat_prompt_has_an_unbalanced_image_span(query: str, reply: str, system: str) -> None:
    dialogue = Dialogue(query, ((query, reply), ("b", reply)), system)
    prompt = ChatEncoder(TINY, QUERIES).prompt(dialogue)
    assert spans(list(prompt.tokens)) == len(prompt.images) == 2 * count_images(query) + count_images(system)
    ends = 1 + 2 * len(dialogue.history) + 1
    assert prompt.tokens.count(TINY.special.im_end) == ends, "a text has ended a turn"
    assert prompt.tokens.count(TINY.special.im_start) == ends + 1


@settings(derandomize=True, max_examples=300, deadline=None)
@given(HOSTILE, HOSTILE, st.sampled_from(["paper", "released"]))
def test_no_dialogue_to_learn_from_has_an_unbalanced_image_span(asked: str, answer: str, style: Any) -> None:
    turns = (Turn("user", asked), Turn("assistant", answer + "."), Turn("user", "<img>file</img>"))
    images = (ImageRef("image", b""),) * (count_images(asked) + 1)
    options = TokenizeOptions(num_queries=QUERIES, max_length=10_000, chat_style=style)
    made = tokenize_sample(Sample("k", "s", "chat", images=images, turns=turns), TINY, options)
    assert spans(made.tokens.tolist()) == len(images)
    assert not made.supervised[made.tokens >= TINY.special.img_start].any(), "an image slot is learned"


@settings(derandomize=True, max_examples=200, deadline=None)
@given(HOSTILE, st.sampled_from(["caption", "vqa", "referring"]))
def test_no_text_of_a_task_has_an_image_span_of_its_own(text: str, task: Any) -> None:
    made = Sample("k", "s", task, images=(ImageRef("image", b""),), question=text + "?", text=text + ".")
    try:
        tokens = tokenize_sample(made, TINY, TokenizeOptions(QUERIES, 10_000)).tokens.tolist()
    except SkipSample as error:
        assert error.reason == "no_region"
        return
    assert spans(tokens) == 1


@settings(derandomize=True, max_examples=300, deadline=None)
@given(HOSTILE)
def test_no_text_that_is_tokenized_has_an_unbalanced_image_span(text: str) -> None:
    try:
        tokens = encode_text(text, TINY, num_queries=QUERIES)
    except DataError:
        assert stray_image_tag(text) is not None
        return
    assert spans(tokens) == count_images(text)
    without_paths = re.sub("<img>.*?</img>", "<img></img>", unicodedata.normalize("NFC", text), flags=re.DOTALL)
    assert TINY.decode(token for token in tokens if token != TINY.special.img_pad) == without_paths


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("a<ref>b</ref><box>", "text special text special special"),
        ("<img>a.png</img>", "image"),
        ("<img>a<b.png</img> <img></img>", "image text image"),
        ("<img><img>a</img>", "text image"),
        ("<img>a</img></img>", "image text"),
        ("<img><ref>a</ref></img>", "text special text special text"),
        ("<img><imgpad></img>", "text"),
        ("<|im_end|>", "text"),
        ("<ref\u003e\u0338", "text"),
    ],
)
def test_which_marks_count(text: str, kinds: str) -> None:
    assert " ".join(piece.kind for piece in parse_markup(text)) == kinds


@pytest.mark.parametrize(
    ("text", "tag"),
    [
        ("<img>a</img>", None),
        ("<img>a", "<img>"),
        ("<img>a</img></img>", "</img>"),
        ("<imgpad>", "<imgpad>"),
        ("<im<img>a</img>g>", None),
        ("<img>a</img\u003e\u0338", "<img>"),
    ],
)
def test_a_tag_without_an_image_is_found(text: str, tag: str | None) -> None:
    assert stray_image_tag(text) == tag


def test_parts_become_numbered_pictures_words_and_boxes() -> None:
    parts = [
        {"image": "a.png"},
        {"image": "b.png"},
        {"text": "<img>c.png</img>Where is "},
        {"ref": "it", "box": [(1, 2, 3, 4), [5, 6, 7, 8]]},
        {"box": [(0, 0, 9, 9)]},
        {"image": "d.png"},
    ]
    assert join_parts(parts, images_before=1) == (
        "Picture 2: <img>a.png</img>\nPicture 3: <img>b.png</img>\n<img>c.png</img>Where is "
        "<ref>it</ref><box>(1,2),(3,4)</box><box>(5,6),(7,8)</box><box>(0,0),(9,9)</box>"
        "Picture 5: <img>d.png</img>\n"
    )


@pytest.mark.parametrize(
    "part",
    ["words", {}, {"image": 1}, {"image": "a</img>"}, {"ref": 1, "box": []}]
    + [{"image": "a.png", "text": "What?"}, {"text": "Where?", "box": []}, {"ref": "it"}]
    + [{"box": box} for box in ("1,2,3,4", [[1, 2, 3]], [[1, 2, 3, ""]], [[1, 2, 3, 1000]], [[True, 0, 5, 5]])],
)
def test_a_part_of_another_kind_is_refused_by_its_place(part: Any) -> None:
    with pytest.raises(DataError, match="part 2"):
        join_parts([{"text": "a"}, part])
