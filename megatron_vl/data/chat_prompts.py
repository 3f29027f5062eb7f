"""ChatML: what the model reads in a dialogue, and which part of it is to be learnt.

Each turn is ``<|im_start|>ROLE \\n TEXT <|im_end|> \\n``. Two ways of supervising it are in use, and both are
here:

- ``paper`` (Appendix B.2): the assistant's answers and the ChatML tokens;
- ``released``: the published fine-tuning script, which also learns the line end after every ``<|im_end|>``.

Roles, the user's and the system's words, and image slots are never supervised. The text of a turn may hold
``<img>...</img>`` (an image, in the order of the sample's images) and well-formed ``<ref>``, ``<box>`` and
``<quad>`` markup; anything else that looks like a special token is plain text, so no turn can open a span
that it does not close.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from megatron_vl.data.prompts import Piece
from megatron_vl.data.sample import Sample, Turn
from megatron_vl.errors import SkipSample

ChatStyle = Literal["paper", "released"]
DEFAULT_SYSTEM = "You are a helpful assistant."
_MARKUP = re.compile(
    r"<img>[^<>]*</img>|<(ref|box|quad)>((?:(?!</?(?:ref|box|quad|img)>).)*)</\1>", re.DOTALL
)


def render_chat(sample: Sample, style: ChatStyle = "paper") -> tuple[Piece, ...]:
    """All turns of a dialogue; a system turn is put first if there is none.

    Raises SkipSample: ``no_answer`` without an assistant turn after a user turn, ``image_mismatch`` if the
    turns do not name as many images as the sample has.
    """
    turns = _well_formed(sample.turns)
    if not any(turn.role == "assistant" and turn.text for turn in turns):
        raise SkipSample("no_answer", "the dialogue has no answer of the assistant")
    pieces = [piece for turn in turns for piece in _turn(turn, style)]
    _check_images(pieces, len(sample.images))
    return tuple(pieces)


def render_chat_prompt(turns: Sequence[Turn]) -> tuple[Piece, ...]:
    """The dialogue so far and the opening of the assistant's next turn, for generation; nothing is
    supervised."""
    pieces = [
        replace(piece, supervised=False) for turn in _well_formed(turns) for piece in _turn(turn, "paper")
    ]
    return (*pieces, *_opening("assistant", learnt=False))


def parse_markup(text: str) -> list[Piece]:
    """Pieces of a turn's text, unsupervised: images, special tokens of well-formed markup, and plain text."""
    pieces: list[Piece] = []
    done = 0
    for match in _MARKUP.finditer(text):
        pieces += _text(text[done : match.start()])
        tag = match.group(1)
        if tag is None:
            pieces.append(Piece("image"))
        else:
            pieces += [Piece("special", f"<{tag}>"), *_text(match.group(2)), Piece("special", f"</{tag}>")]
        done = match.end()
    return pieces + _text(text[done:])


def _well_formed(turns: Sequence[Turn]) -> list[Turn]:
    """System turn first; turns of the assistant before the first user turn are dropped, as the original
    does."""
    system = [turn for turn in turns if turn.role == "system"][:1] or [Turn("system", DEFAULT_SYSTEM)]
    spoken = [turn for turn in turns if turn.role != "system"]
    while spoken and spoken[0].role != "user":
        spoken.pop(0)
    return system + spoken


def _turn(turn: Turn, style: ChatStyle) -> list[Piece]:
    learnt = turn.role == "assistant"
    content = parse_markup(turn.text)
    if learnt and any(piece.kind == "image" for piece in content):
        raise SkipSample("image_in_answer", "the assistant cannot produce an image")
    return [
        *_opening(turn.role, learnt=True),
        *(replace(piece, supervised=learnt) for piece in content),
        Piece("special", "<|im_end|>", supervised=True),
        Piece("text", "\n", supervised=style == "released"),
    ]


def _opening(role: str, *, learnt: bool) -> list[Piece]:
    return [Piece("special", "<|im_start|>", supervised=learnt), Piece("text", role), Piece("text", "\n")]


def _text(text: str) -> list[Piece]:
    return [Piece("text", text)] if text else []


def _check_images(pieces: Sequence[Piece], num_images: int) -> None:
    named = sum(piece.kind == "image" for piece in pieces)
    if named != num_images:
        raise SkipSample("image_mismatch", f"the turns name {named} images, the sample has {num_images}")
