"""ChatML: the text of a dialogue, and which part of it is supervised.

Each turn is ``<|im_start|>ROLE \\n TEXT <|im_end|> \\n``. There are two ways of supervision:

- ``paper`` (Appendix B.2): the answers of the assistant's turns, and their ``<|im_start|>`` and ``<|im_end|>``;
  nothing of the other turns;
- ``released``: the published fine-tuning script. It supervises the answers, and ``<|im_start|>``, ``<|im_end|>`` and
  the line end after it in every turn, including the user's and the system's.

Roles, the words of user and system, and image slots are never supervised. Text from data cannot contain ChatML markers
(see ``markup.py``), so a user cannot end a turn. An answer cannot hold an image.
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
    """Render all turns of a dialogue, after a system turn.

    Raises:
        SkipSample: ``no_answer`` if no assistant turn follows a user turn, ``image_mismatch`` if the user's turns do
            not name as many images as the sample has.
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
    """Return the turns as the released script uses them.

    A system turn comes first, by default the script's own. A first turn that is not the user's is removed.
    """
    system = [turn for turn in turns if turn.role == "system"][:1] or [Turn("system", DEFAULT_SYSTEM)]
    spoken = [turn for turn in turns if turn.role != "system"]
    return system + (spoken[1:] if spoken and spoken[0].role != "user" else spoken)


def render_turns(turns: Sequence[Turn], style: ChatStyle = "paper") -> tuple[Piece, ...]:
    """Render these turns without changes."""
    return tuple(piece for turn in turns for piece in _turn(turn, style))


def open_turn(role: str = "assistant", *, learned: bool = False) -> tuple[Piece, ...]:
    """Return the beginning of a turn. The assistant's is the end of a prompt for generation."""
    return Piece("special", "<|im_start|>", supervised=learned), Piece("text", role), Piece("text", "\n")


def write_prompt(turns: Sequence[Turn]) -> str:
    """Return the text of these turns and of the beginning of the assistant's turn, for display."""
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
