"""Where an answer ends, in tokens and in text."""

from __future__ import annotations

import pytest

from megatron_vl.data.prompting.tokenizer import QwenTokenizer
from megatron_vl.errors import ConfigError
from megatron_vl.generation.stops import StopTexts, cut_stop_sequence

TOKENIZER = QwenTokenizer(2048)


def tokens_until(stops: StopTexts, text: str) -> str:
    """The text of the tokens that are read before the engine stops."""
    tokens = TOKENIZER.encode_with_specials(text)
    return next(
        (TOKENIZER.decode(tokens[:end]) for end in range(1, len(tokens) + 1) if stops.reached(tokens[:end])), text
    )


@pytest.mark.parametrize(
    ("stop", "text", "before"),
    [
        ("\n\n", "one\ntwo\n\nthree", "one\ntwo"),
        ("Human:", "Yes.Human: what", "Yes."),
        ("er", "a number", "a numb"),  # within a token
        ("né", "un chien né ici", "un chien "),
        ("</box>", "<ref>it</ref><box>(1,2),(3,4)</box> more", "<ref>it</ref><box>(1,2),(3,4)"),
        ("absent", "all of it", "all of it"),
    ],
)
def test_an_answer_ends_before_a_stop_text(stop: str, text: str, before: str) -> None:
    stops = StopTexts((stop,), TOKENIZER)
    read = tokens_until(stops, text)
    assert stops.cut(read) == before
    assert read == text or stop in read, "the engine stops as soon as the text is there"
    assert not read.endswith(" more")


def test_the_first_of_several_texts_counts() -> None:
    assert StopTexts(("c", "b"), TOKENIZER).cut("abcd") == "a"
    assert StopTexts((), TOKENIZER).cut("abcd") == "abcd" and not StopTexts((), TOKENIZER).reached([1, 2])


def test_an_empty_text_is_refused() -> None:
    with pytest.raises(ConfigError, match="a stop text is empty"):
        StopTexts(("a", ""), TOKENIZER)


def test_a_stop_sequence_is_removed_from_the_end_alone() -> None:
    answer = [5, 7, 5, 6]
    assert not cut_stop_sequence(answer, [(7,), (9, 5, 7, 5, 6)]) and answer == [5, 7, 5, 6]
    assert cut_stop_sequence(answer, [(5, 6)]) and answer == [5, 7]
