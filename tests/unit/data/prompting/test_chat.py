"""What of a dialogue is read and what of it is learned, in both styles."""

from __future__ import annotations

import pytest

from megatron_vl.data.prompting.chat import ChatStyle, complete_turns, render_chat, render_turns
from megatron_vl.data.prompting.tasks import Piece
from megatron_vl.data.sample import ImageRef, Sample, Turn
from megatron_vl.errors import SkipSample

HI = Turn("user", "<ref>hi</ref> <img>a.png</img>")
YES = Turn("assistant", "<ref>yes</ref>")


def chat(*turns: Turn, images: int = 0) -> Sample:
    return Sample("k", "s", "chat", images=(ImageRef("image", b""),) * images, turns=turns)


def show(pieces: tuple[Piece, ...]) -> str:
    """The text with what is learned in brackets."""
    text, learned = "", False
    for piece in (*pieces, Piece("text")):
        if piece.supervised != learned:
            text += "[" if piece.supervised else "]"
        text, learned = text + ("IMAGE" if piece.kind == "image" else piece.text), piece.supervised
    return text


@pytest.mark.parametrize(
    ("style", "expected"),
    [
        (
            "paper",
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
            "<|im_start|>user\n<ref>hi</ref> IMAGE<|im_end|>\n"
            "[<|im_start|>]assistant\n[<ref>yes</ref><|im_end|>]\n",
        ),
        (
            "released",
            "[<|im_start|>]system\nYou are a helpful assistant.[<|im_end|>\n"
            "<|im_start|>]user\n<ref>hi</ref> IMAGE[<|im_end|>\n"
            "<|im_start|>]assistant\n[<ref>yes</ref><|im_end|>\n]",
        ),
    ],
)
def test_what_is_learned_of_a_dialogue(style: ChatStyle, expected: str) -> None:
    assert show(render_chat(chat(HI, YES, images=1), style)) == expected


def test_the_style_is_the_papers_unless_asked() -> None:
    assert render_chat(chat(HI, YES, images=1)) == render_chat(chat(HI, YES, images=1), "paper")


def test_one_leading_turn_that_is_not_the_users_is_dropped() -> None:
    greeting, other = Turn("assistant", "welcome"), Turn("assistant", "anybody?")
    assert complete_turns([greeting, HI, YES])[1:] == [HI, YES]
    assert complete_turns([greeting, other, HI, YES])[1:] == [other, HI, YES]
    assert complete_turns([greeting]) == complete_turns([])


def test_the_system_turn_is_the_dialogues_or_the_default() -> None:
    short = Turn("system", "Be short.")
    assert complete_turns([short, HI])[0] == short
    assert complete_turns([HI])[0] == Turn("system", "You are a helpful assistant.")


def test_chatml_markers_and_image_tags_of_an_answer_stay_text() -> None:
    pieces = render_turns([Turn("assistant", "<|im_end|>\n<|im_start|>user <img>a</img>")])
    assert [piece.text for piece in pieces if piece.kind == "special"] == ["<|im_start|>", "<|im_end|>"]
    assert not any(piece.kind == "image" for piece in pieces)


@pytest.mark.parametrize(
    ("sample", "reason"),
    [
        (chat(Turn("user", "hi")), "no_answer"),
        (chat(Turn("assistant", "hi"), Turn("user", "hi")), "no_answer"),
        (chat(Turn("user", "hi"), Turn("assistant", "")), "no_answer"),
        (chat(HI, YES), "image_mismatch"),
        (chat(HI, YES, images=2), "image_mismatch"),
        (chat(Turn("user", "hi"), Turn("assistant", "<img>a</img>"), images=1), "image_mismatch"),
    ],
)
def test_a_dialogue_that_cannot_be_used_is_skipped(sample: Sample, reason: str) -> None:
    with pytest.raises(SkipSample) as error:
        render_chat(sample)
    assert error.value.reason == reason
