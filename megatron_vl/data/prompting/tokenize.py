"""Tokenization of a Sample into a TokenizedSample: pieces become ids, and an image becomes its span of slots.

An image span is ``<img>``, ``num_queries`` times ``<imgpad>``, ``</img>``. Only an image piece makes a span. So the
spans of a tokenized sample are always balanced, and there is one for each image. (The original writes the image path
into the slots, byte by byte. Features overwrite the slots, so pads give the same result.) A sample longer than the
limit is skipped and reported, never truncated. The exception is a text document, which packing splits over rows.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_vl.data.prompting.chat import ChatStyle, render_chat
from megatron_vl.data.prompting.markup import parse_markup, stray_image_tag
from megatron_vl.data.prompting.tasks import Piece, render
from megatron_vl.data.prompting.tokenizer import QwenTokenizer
from megatron_vl.data.sample import Sample, TokenizedSample
from megatron_vl.errors import DataError, SkipSample


@dataclass(frozen=True)
class EncodedPieces:
    """Ids of a rendered text, and which of them are targets."""

    tokens: npt.NDArray[np.int32]
    """int32[length]: token ids."""
    supervised: npt.NDArray[np.bool_]
    """bool[length]: whether each token is a target."""


@dataclass(frozen=True)
class TokenizeOptions:
    """Facts about the model and the recipe that tokenizing needs."""

    num_queries: int
    max_length: int
    """Greatest length of a sample in tokens. Text documents may be longer."""
    chat_style: ChatStyle = "paper"


def tokenize_sample(sample: Sample, tokenizer: QwenTokenizer, options: TokenizeOptions) -> TokenizedSample:
    """Render and encode one sample.

    Raises:
        SkipSample: ``too_long``, or as for rendering.
    """
    pieces = render_chat(sample, options.chat_style) if sample.task == "chat" else render(sample)
    encoded = encode_pieces(pieces, tokenizer, num_queries=options.num_queries)
    if len(encoded.tokens) > options.max_length and sample.task != "text":
        raise SkipSample("too_long", f"{len(encoded.tokens)} tokens, the limit is {options.max_length}")
    return TokenizedSample(
        key=sample.key,
        source=sample.source,
        task=sample.task,
        tokens=encoded.tokens,
        supervised=encoded.supervised,
        images=sample.images,
    )


def encode_pieces(pieces: Sequence[Piece], tokenizer: QwenTokenizer, *, num_queries: int) -> EncodedPieces:
    """Return the ids of rendered pieces, in training and in generation alike."""
    span = _image_span(tokenizer, num_queries)
    tokens = array("i")
    sizes: list[int] = []
    for kind, text, _ in pieces:
        before = len(tokens)
        if kind == "image":
            tokens.extend(span)
        elif kind == "special":
            tokens.append(tokenizer.special_ids[text])
        else:
            tokenizer.append(tokens, text)
        sizes.append(len(tokens) - before)
    supervised = np.repeat(np.array([piece.supervised for piece in pieces], dtype=np.bool_), sizes)
    return EncodedPieces(np.frombuffer(tokens, dtype=np.int32), supervised)


def encode_text(text: str, tokenizer: QwenTokenizer, *, num_queries: int) -> list[int]:
    """Return the ids of a text, parsing the surface form of every special token, as the original does by default.

    Use this for own text and to compare tokens, never for text from data.

    Raises:
        DataError: An image tag of the text belongs to no image.
    """
    stray = stray_image_tag(text)
    if stray is not None:
        raise DataError(f"found a {stray} that belongs to no image; expected <img>PATH</img>")
    span = _image_span(tokenizer, num_queries)
    tokens: list[int] = []
    for piece in parse_markup(text):
        tokens += span if piece.kind == "image" else tokenizer.encode_with_specials(piece.text)
    return tokens


def _image_span(tokenizer: QwenTokenizer, num_queries: int) -> list[int]:
    """Return the ids of an image: its slots between the two markers."""
    special = tokenizer.special
    return [special.img_start, *[special.img_pad] * num_queries, special.img_end]
