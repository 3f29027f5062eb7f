"""Chat prompts: the window over the history, what ends a reply, the history out of JSON."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_vl.data.prompting.tokenizer import QwenTokenizer
from megatron_vl.errors import DataError
from megatron_vl.generation.chat import ChatEncoder, Dialogue, read_history, stop_sequences

TINY = QwenTokenizer(256)
QUERIES = 4
HISTORY = (("<img>a.png</img> one", "first"), ("two", "second"), ("<img>b.png</img> three", "third"))
SYSTEM = 1 + len("system\n") + len("help") + 1  # <|im_start|>, bytes of the role and the text, <|im_end|>
LAST = 2 + len("\nuser\n three") + QUERIES + 2 + 2 + len("\nassistant\nthird")
MIDDLE = 2 + len("\nuser\ntwo") + 2 + len("\nassistant\nsecond")


@pytest.mark.parametrize(
    ("window", "kept"),
    [
        (1, 0),
        (SYSTEM + LAST, 0),
        (SYSTEM + LAST + 1, 1),
        (SYSTEM + LAST + MIDDLE, 1),
        (SYSTEM + LAST + MIDDLE + 1, 2),
        (6144, 3),
    ],
)
def test_the_newest_exchanges_that_fit_are_kept(window: int, kept: int) -> None:
    prompt = ChatEncoder(TINY, QUERIES, window).prompt(Dialogue("and now?", HISTORY, "help"))
    assert prompt.left_out == len(HISTORY) - kept
    turns = "".join(
        f"<|im_start|>user\n{query}<|im_end|>\n<|im_start|>assistant\n{reply}<|im_end|>\n"
        for query, reply in HISTORY[len(HISTORY) - kept :]
    )
    assert prompt.text == (
        f"<|im_start|>system\nhelp<|im_end|>\n{turns}<|im_start|>user\nand now?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert prompt.images == {0: (), 1: ("b.png",), 2: ("b.png",), 3: ("a.png", "b.png")}[kept]
    assert prompt.tokens.count(TINY.special.img_pad) == QUERIES * len(prompt.images)


def test_an_exchange_that_is_too_long_hides_the_older_ones() -> None:
    history = (("short", "one"), ("long " * 50, "one"), ("short", "one"))
    prompt = ChatEncoder(TINY, QUERIES, 150).prompt(Dialogue("now?", history))
    assert prompt.left_out == 2


def test_a_prompt_ends_in_an_open_turn_of_the_assistant() -> None:
    tokens = ChatEncoder(TINY, QUERIES).prompt(Dialogue("hi")).tokens
    opening = [TINY.special.im_start, *TINY.encode("assistant"), *TINY.encode("\n")]
    assert list(tokens[-len(opening) :]) == opening
    assert TINY.decode(tokens) == ChatEncoder(TINY, QUERIES).prompt(Dialogue("hi")).text


def test_what_ends_a_reply() -> None:
    special = TINY.special
    assert stop_sequences("chatml", TINY) == ((special.im_end,), (special.im_start,))
    human, end = stop_sequences("raw", TINY)
    assert TINY.decode(human) == "Human:" and end == (special.endoftext,)


def test_a_history_is_a_list_of_pairs() -> None:
    assert read_history(None) == read_history([]) == ()
    assert read_history([["a", "b"], ["c", "d"]]) == (("a", "b"), ("c", "d"))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("ab", "expected a list"),
        ({"a": "b"}, "expected a list"),
        ([["a", "b"], "cd"], "exchange 2"),
        ([["a"]], "exchange 1"),
        ([["a", "b", "c"]], "exchange 1"),
        ([["a", None]], "exchange 1"),
    ],
)
def test_another_history_is_refused_by_its_place(value: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_history(value)
