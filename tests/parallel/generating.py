"""Runs on a rank: greedy tokens of a few prompts, with the key-value cache and by full recomputation."""

from __future__ import annotations

import torch

from megatron_vl.backends.attention_inputs import PackedLine
from megatron_vl.config.schema import RunConfig
from megatron_vl.config.special_tokens import SpecialTokens
from megatron_vl.generation.engine import Engine, GenerationOptions, Prompt
from megatron_vl.model.build import build_model
from megatron_vl.model.fusion import fuse
from tests.helpers.ranks import Start

NEW_TOKENS = 6


def prompts(config: RunConfig) -> list[Prompt]:
    """Prompts of different lengths with 0, 1 and 2 images."""
    special, generator = SpecialTokens(config.model.num_bpe_tokens), torch.Generator().manual_seed(3)
    image = [special.img_start] + [special.img_pad] * config.model.resampler.num_queries + [special.img_end]
    made = []
    for images, length in ((1, 5), (0, 7), (2, 3), (1, 11), (0, 2)):
        text = torch.randint(0, config.model.num_bpe_tokens, (length,), generator=generator).tolist()
        size = (images, 3, config.model.image_size, config.model.image_size)
        pixels = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8) if images else None
        made.append(Prompt((*image * images, *text), pixels))
    return made


def generate_on_rank(start: Start, config: RunConfig) -> list[list[int]]:
    """Tokens of all prompts from the engine at the layout of ``config``."""
    with start.topology(config.parallel) as topology:
        engine = Engine(build_model(config, topology), config, topology)
        return engine.generate(prompts(config), GenerationOptions(max_new_tokens=NEW_TOKENS, batch_size=3))


def generate_from_ties(start: Start, config: RunConfig) -> list[list[int]]:
    """The same where all logits are equal, those of padded rows of the vocabulary aside."""
    with start.topology(config.parallel) as topology:
        chunks = build_model(config, topology)
        for chunk in chunks:
            if chunk.language_model is not None and chunk.stage.head:
                chunk.language_model.output_layer.weight.data.zero_()
        return Engine(chunks, config, topology).generate(prompts(config), GenerationOptions(max_new_tokens=2))


def recompute_on_rank(start: Start, config: RunConfig) -> list[list[int]]:
    """The same tokens in one process without cache or padding: each new token from a pass over the whole sequence."""
    with start.topology(config.parallel) as topology, torch.no_grad():
        chunk = build_model(config, topology)[0].eval()
        endoftext, answers = SpecialTokens(config.model.num_bpe_tokens).endoftext, []
        for prompt in prompts(config):
            tokens = list(prompt.tokens)
            for _ in range(NEW_TOKENS):
                token = int(_last_logits(chunk, config, tokens, prompt).argmax())
                if token == endoftext:
                    break
                tokens.append(token)
            answers.append(tokens[len(prompt.tokens) :])
        return answers


def _last_logits(chunk: object, config: RunConfig, tokens: list[int], prompt: Prompt) -> torch.Tensor:
    line, language = torch.tensor(tokens), chunk.language_model
    embedded = language.embed(line)
    if prompt.pixels is not None:
        slots = torch.nonzero(line == SpecialTokens(config.model.num_bpe_tokens).img_pad).flatten()
        spans = torch.arange(len(prompt.pixels))
        embedded = fuse(embedded, chunk.see(None, prompt.pixels), slots=slots, span_images=spans)
    inputs = language.attention_inputs(PackedLine.of([len(tokens)]))
    hidden = language(embedded.unsqueeze(1), inputs)
    return language.logits(hidden, positions=torch.tensor([len(tokens) - 1]))[0]
