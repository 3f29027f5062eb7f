"""Convert a dialogue to a prompt: select how much of its history the model sees, and where its reply ends.

Both follow the original. The window is filled with whole exchanges, newest first. An exchange is added while the system
turn, the exchange and those already added have fewer than ``max_window_size`` tokens. The new query is not counted and
always stays. A reply ends at the first stop sequence, or at ``<|endoftext|>`` as every answer of the engine does. This
module handles only text and ids, so a prompt can be inspected without a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megatron_vl.data.prompting.chat import DEFAULT_SYSTEM, open_turn, render_turns, write_prompt
from megatron_vl.data.prompting.tokenize import encode_pieces
from megatron_vl.data.prompting.tokenizer import QwenTokenizer
from megatron_vl.data.sample import Turn
from megatron_vl.errors import DataError

ChatFormat = Literal["raw", "chatml"]
MAX_WINDOW_SIZE = 6144
"""From the published ``generation_config.json``."""


@dataclass(frozen=True)
class Dialogue:
    """The previous exchanges, and the query to be answered."""

    query: str
    history: tuple[tuple[str, str], ...] = ()
    """Queries and their replies, oldest first."""
    system: str = DEFAULT_SYSTEM


@dataclass(frozen=True)
class ChatPrompt:
    """The input of the model."""

    tokens: tuple[int, ...]
    text: str
    """The same for people, images as ``<img>path</img>``."""
    images: tuple[str, ...]
    """Paths in the order of their spans, of the turns that are in the window."""
    left_out: int
    """Number of exchanges of the history that are not in the window."""


@dataclass(frozen=True)
class ChatEncoder:
    """Convert dialogues to prompts of one model."""

    tokenizer: QwenTokenizer
    num_queries: int
    max_window_size: int = MAX_WINDOW_SIZE

    def prompt(self, dialogue: Dialogue) -> ChatPrompt:
        """Return the prompt of a dialogue in ChatML; images in replies are plain text."""
        system, query = Turn("system", dialogue.system), Turn("user", dialogue.query)
        kept = self._within_window(system, dialogue.history)
        turns = [system, *(turn for exchange in kept for turn in exchange), query]
        pieces = (*render_turns(turns), *open_turn())
        encoded = encode_pieces(pieces, self.tokenizer, num_queries=self.num_queries)
        images = tuple(piece.text for piece in pieces if piece.kind == "image")
        left_out = len(dialogue.history) - len(kept)
        return ChatPrompt(tuple(encoded.tokens.tolist()), write_prompt(turns), images, left_out)

    def _within_window(self, system: Turn, history: Sequence[tuple[str, str]]) -> list[tuple[Turn, Turn]]:
        kept: list[tuple[Turn, Turn]] = []
        used = self._count([system]) - 1  # the original does not count the line end after this turn
        for query, reply in reversed(history):
            exchange = Turn("user", query), Turn("assistant", reply)
            used += self._count(exchange)
            if used >= self.max_window_size:
                break
            kept.insert(0, exchange)
        return kept

    def _count(self, turns: Sequence[Turn]) -> int:
        return len(encode_pieces(render_turns(turns), self.tokenizer, num_queries=self.num_queries).tokens)


def read_history(value: Any) -> tuple[tuple[str, str], ...]:
    """Read the history of a dialogue from JSON: a list of ``[query, reply]``, or None.

    Raises:
        DataError: if it is anything else; names the exchange.
    """
    if value is None:
        return ()
    if not isinstance(value, list):
        raise DataError(f"history is {str(value)[:80]!r}, expected a list of [query, reply]")
    for number, exchange in enumerate(value, 1):
        if not isinstance(exchange, list) or [type(text) for text in exchange] != [str, str]:
            raise DataError(f"exchange {number} of history is {str(exchange)[:80]!r}, expected [query, reply]")
    return tuple((query, reply) for query, reply in value)


def stop_sequences(chat_format: ChatFormat, tokenizer: QwenTokenizer) -> tuple[tuple[int, ...], ...]:
    """Return what ends a reply besides <|endoftext|>: in ChatML either marker, in raw text the next speaker's name."""
    if chat_format == "chatml":
        return (tokenizer.special.im_end,), (tokenizer.special.im_start,)
    return (tuple(tokenizer.encode("Human:")), (tokenizer.special.endoftext,))
