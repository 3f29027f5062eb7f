"""Flags of the tools that generate text: how tokens are chosen, and where an answer ends."""

from __future__ import annotations

import argparse

from megatron_vl.cli.command import check_at_least
from megatron_vl.data.prompting.tokenizer import QwenTokenizer
from megatron_vl.errors import ConfigError
from megatron_vl.generation.requests import GenerationOptions
from megatron_vl.generation.sampling import Sampling
from megatron_vl.generation.stops import StopTexts


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of :class:`Sampling`, the longest answer, the batch size and the stop texts."""
    group = parser.add_argument_group("sampling", "how a token is chosen; the default is the most probable one")
    group.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0: always the most probable token")
    group.add_argument("--top-k", type=int, default=0, metavar="K", help="draw from the K most probable; 0: from all")
    group.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="draw from the most probable ones that add up to P"
    )
    group.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="X", help="above 1, repeated tokens become rarer"
    )
    group.add_argument(
        "--seed", type=int, default=0, metavar="N", help="with the line of a question, decides its draws"
    )
    group.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="longest answer")
    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end an answer before this text; may be repeated"
    )
    group.add_argument("--batch-size", type=int, default=32, metavar="N", help="questions answered together")


def sampling_of(options: argparse.Namespace) -> Sampling:
    """Return how tokens are chosen. Raises ConfigError for a value of these flags that cannot be."""
    check_at_least("--max-new-tokens", options.max_new_tokens, 1)
    check_at_least("--batch-size", options.batch_size, 1)
    if not all(options.stop):
        raise ConfigError("--stop: the text is empty; every answer would end before it begins")
    return Sampling(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        repetition_penalty=options.repetition_penalty,
        seed=options.seed,
    )


def generation_options(
    options: argparse.Namespace, tokenizer: QwenTokenizer, stop_sequences: tuple[tuple[int, ...], ...]
) -> GenerationOptions:
    """Return the engine's options of those flags. Raises ConfigError for a value that cannot be."""
    return GenerationOptions(
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
        sampling=sampling_of(options),
        stop_sequences=stop_sequences,
        stop_texts=StopTexts(tuple(options.stop), tokenizer),
    )
