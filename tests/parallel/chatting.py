"""Runs on a rank: answers that end at a stop sequence, and the command that answers questions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from megatron_vl.cli.generate import main
from megatron_vl.config.schema import RunConfig
from megatron_vl.data.images.decode import to_pixels
from megatron_vl.data.prompting.tokenizer import QwenTokenizer
from megatron_vl.generation.engine import Engine
from megatron_vl.generation.requests import GenerationOptions, Request
from megatron_vl.model.build import build_model
from tests.helpers.ranks import Start
from tests.parallel.generating import new_tokens, prompts

LONG = 12


def stop_on_rank(
    start: Start, config: RunConfig, stop_sequences: tuple[tuple[int, ...], ...], batch_size: int
) -> list[list[int]]:
    """Answers of up to ``LONG`` tokens, cut at ``stop_sequences``."""
    with start.topology(config.parallel) as topology:
        engine = Engine(build_model(config, topology), config, topology)
        options = GenerationOptions(max_new_tokens=LONG, batch_size=batch_size, stop_sequences=stop_sequences)
        return new_tokens(engine, prompts(config), options)


def answer_texts(start: Start, config: RunConfig, checkpoint: Path, texts: list[tuple[str, list[Path]]]) -> list[str]:
    """Answers to prompts that are written out, slots and markers included, with their images."""
    with start.topology(config.parallel) as topology:
        engine = Engine.from_checkpoint(checkpoint, parallel=config.parallel, topology=topology)
        tokenizer, size = QwenTokenizer(config.model.num_bpe_tokens), config.model.image_size
        given = []
        for text, images in texts:
            pixels = torch.from_numpy(np.stack([to_pixels(path.read_bytes(), size) for path in images]))
            given.append(Request(tuple(tokenizer.encode_with_specials(text)), pixels))
        answers = new_tokens(engine, given, GenerationOptions(max_new_tokens=LONG))
        return [tokenizer.decode(answer).strip() for answer in answers]


def run_generate(start: Start, *arguments: str) -> int:
    """Exit status of ``tools/generate.py`` in a process of its own world."""
    return main([*arguments, "--max-new-tokens", str(LONG)])
