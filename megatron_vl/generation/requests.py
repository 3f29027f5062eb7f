"""What the engine is asked, and what it returns.

A request holds ids, so the engine needs no tokenizer. Its images may be a function that decodes them. The engine calls
it when the request is due, and only on ranks that hold the patch embedding. So a million requests take the memory of a
few batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_vl.generation.sampling import GREEDY, Sampling
from megatron_vl.generation.stops import StopTexts

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Request:
    """A prompt: token ids with image slots, and the images that fill them."""

    tokens: tuple[int, ...]
    pixels: Tensor | Callable[[], Tensor] | None = None
    """uint8[k, 3, H, W], one for each image span of ``tokens``, or what decodes them. It may raise SkipSample."""
    number: int = 0
    """Number of the question. Drawn tokens depend on it, so questions of one run should have different numbers."""


@dataclass(frozen=True)
class Answer:
    """The new tokens of a request."""

    number: int
    """That of the request."""
    tokens: tuple[int, ...] = ()
    """Without the stop sequence that has ended it; with the tokens of a stop text."""
    skipped: str | None = None
    """Why an image could not be used; then there are no tokens."""


@dataclass(frozen=True)
class Choices:
    """A prompt, and continuations of it whose probability is asked for."""

    request: Request
    continuations: tuple[tuple[int, ...], ...]
    """Each has at least one token."""

    def __post_init__(self) -> None:
        if not self.request.tokens or not self.continuations or not all(self.continuations):
            raise ValueError("a log-likelihood needs a prompt and at least one continuation, each with a token")


@dataclass(frozen=True)
class Likelihoods:
    """The log-likelihoods of the continuations of a prompt."""

    number: int
    """That of the request."""
    per_token: tuple[tuple[float, ...], ...] = ()
    """For each continuation, the natural logarithm of the probability of each token after all that precede it."""
    skipped: str | None = None
    """Why an image could not be used; then there are none."""

    @property
    def sums(self) -> tuple[float, ...]:
        """The log-likelihood of each continuation."""
        return tuple(map(math.fsum, self.per_token))

    @property
    def means(self) -> tuple[float, ...]:
        """The same per token: the negative of the mean cross-entropy."""
        return tuple(math.fsum(values) / len(values) for values in self.per_token)


@dataclass(frozen=True)
class GenerationOptions:
    """How tokens are chosen, which are excluded, and when an answer ends."""

    max_new_tokens: int = 64
    batch_size: int = 32
    sampling: Sampling = GREEDY
    stop_sequences: tuple[tuple[int, ...], ...] = ()
    """Sequences of tokens that end an answer and are not part of it; <|endoftext|> always is one."""
    stop_texts: StopTexts | None = None
    """Texts that end an answer, however they are tokenized."""
    banned_ids: tuple[int, ...] = ()
    """Tokens that are never chosen."""
