"""Where an answer ends: sequences of tokens, and texts.

A model may write one text in several tokenizations. So a stop text is looked for in the decoded end of the answer, not
among its tokens. A token may also hold the end of the answer and the beginning of the stop text. So the engine only
stops there, and the text is cut when it is decoded (:meth:`StopTexts.cut`). Special tokens have a text too, and may be
part of a stop text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_vl.data.prompting.tokenizer import QwenTokenizer
from megatron_vl.errors import ConfigError


@dataclass(frozen=True)
class StopTexts:
    """Texts that end an answer."""

    texts: tuple[str, ...]
    tokenizer: QwenTokenizer

    def __post_init__(self) -> None:
        """Raise ConfigError if a text is empty."""
        if not all(self.texts):
            raise ConfigError("a stop text is empty; every answer would end before it begins")

    def reached(self, tokens: Sequence[int]) -> bool:
        """Return whether the text of an answer holds a stop text; ask after each new token."""
        # Every token has at least one byte, so a text that the newest token completes lies in this many tokens.
        longest = max((len(text.encode()) for text in self.texts), default=0)
        end = self.tokenizer.decode(tokens[-longest:]) if longest else ""
        return any(text in end for text in self.texts)

    def cut(self, text: str) -> str:
        """Return what stands before the first stop text."""
        places = [place for stop in self.texts if (place := text.find(stop)) >= 0]
        return text[: min(places)] if places else text


def cut_stop_sequence(answer: list[int], stops: Sequence[tuple[int, ...]]) -> bool:
    """Return whether an answer ends in one of ``stops``; remove that stop sequence."""
    for stop in stops:
        if tuple(answer[-len(stop) :]) == stop:
            del answer[-len(stop) :]
            return True
    return False
