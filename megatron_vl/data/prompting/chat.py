"""ChatML: what the model reads in a dialogue, and which part of it is to be learned.

Each turn is ``<|im_start|>ROLE \\n TEXT <|im_end|> \\n``. Two ways of supervising it are in use, and both are here:

- ``paper`` (Appendix B.2): of the assistant's turns the answer, ``<|im_start|>`` and ``<|im_end|>``;
  nothing of the other turns;
- ``released``: the published fine-tuning script, which learns ``<|im_start|>``, ``<|im_end|>`` and the line end after
  it of every turn, the user's and the system's too, besides the answers.

Roles, the user's and the system's words, and image slots are never supervised. What a turn's text may hold is said in
``markup.py``: ChatML markers are not among it, so nobody can end a turn by typing. An answer cannot hold an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from megatron_vl.data.prompting.markup import parse_markup
from megatron_vl.data.prompting.tasks import Piece
from megatron_vl.data.sample import Sample, Turn
from megatron_vl.errors import SkipSample

ChatStyle = Literal["paper", "released"]
DEFAULT_SYSTEM = "You are a helpful assistant."


def render_chat(sample: Sample, style: ChatStyle = "paper") -> tuple[Piece, ...]:
    """All turns of a dialogue, behind a system turn.

    Raises SkipSample: ``no_answer`` without an assistant turn after a user turn, ``image_mismatch`` if the
    user's turns do not name as many images as the sample has.
    """
    turns = complete_turns(sample.turns)
    if not any(turn.role == "assistant" and turn.text for turn in turns):
        raise SkipSample("no_answer", "the dialogue has no answer of the assistant")
    pieces = render_turns(turns, style)
    named = sum(piece.kind == "image" for piece in pieces)
    if named != len(sample.images):
        raise SkipSample("image_mismatch", f"the user names {named} images, the sample has {len(sample.images)}")
    return pieces


def complete_turns(turns: Sequence[Turn]) -> list[Turn]:
    """The turns as the released script takes them: a system turn first, if there is none the default one, and without
    a first turn that is not the user's."""
    system = [turn for turn in turns if turn.role == "system"][:1] or [Turn("system", DEFAULT_SYSTEM)]
    spoken = [turn for turn in turns if turn.role != "system"]
    return system + (spoken[1:] if spoken and spoken[0].role != "user" else spoken)


def render_turns(turns: Sequence[Turn], style: ChatStyle = "paper") -> tuple[Piece, ...]:
    """These turns as they are."""
    return tuple(piece for turn in turns for piece in _turn(turn, style))


def open_turn(role: str = "assistant", *, learned: bool = False) -> tuple[Piece, ...]:
    """The beginning of a turn: what the model goes on from, if it is the assistant's."""
    return Piece("special", "<|im_start|>", supervised=learned), Piece("text", role), Piece("text", "\n")


def write_prompt(turns: Sequence[Turn]) -> str:
    """The text of these turns and of the beginning of the assistant's, for people to read."""
    return "".join(f"<|im_start|>{turn.role}\n{turn.text}<|im_end|>\n" for turn in turns) + "<|im_start|>assistant\n"


def _turn(turn: Turn, style: ChatStyle) -> list[Piece]:
    answer = turn.role == "assistant"
    marked = answer or style == "released"
    return [
        *open_turn(turn.role, learned=marked),
        *(piece._replace(supervised=answer) for piece in parse_markup(turn.text, images=not answer)),
        Piece("special", "<|im_end|>", supervised=marked),
        Piece("text", "\n", supervised=style == "released"),
    ]
