"""Runs on a rank: tokens of a few prompts and log-likelihoods, by the engine and by full recomputation."""

from __future__ import annotations

from typing import Any

import torch

from megatron_vl.backends.attention_inputs import PackedLine
from megatron_vl.config.schema import RunConfig
from megatron_vl.config.special_tokens import SpecialTokens
from megatron_vl.data.images.pixels import normalize
from megatron_vl.evaluation.forward import forward
from megatron_vl.evaluation.forward_inputs import ForwardInputs
from megatron_vl.generation.engine import Engine
from megatron_vl.generation.logits import choose_tokens, process_logits
from megatron_vl.generation.requests import Choices, GenerationOptions, Likelihoods, Request
from megatron_vl.generation.sampling import GREEDY, Sampling, draw
from megatron_vl.model.build import build_model
from megatron_vl.model.fusion import fuse
from megatron_vl.parallel.topology import Topology
from tests.helpers.ranks import Start

NEW_TOKENS = 6


def prompts(config: RunConfig) -> list[Request]:
    """Prompts of different lengths with 0, 1 and 2 images."""
    special, generator = SpecialTokens(config.model.num_bpe_tokens), torch.Generator().manual_seed(3)
    image = [special.img_start] + [special.img_pad] * config.model.resampler.num_queries + [special.img_end]
    made = []
    for images, length in ((1, 5), (0, 7), (2, 3), (1, 11), (0, 2)):
        text = torch.randint(0, config.model.num_bpe_tokens, (length,), generator=generator).tolist()
        size = (images, 3, config.model.image_size, config.model.image_size)
        pixels = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8) if images else None
        made.append(Request((*image * images, *text), pixels, number=len(made)))
    return made


def new_tokens(engine: Engine, requests: list[Request], options: GenerationOptions) -> list[list[int]]:
    """The tokens of each answer."""
    return [list(answer.tokens) for answer in engine.generate(requests, options)]


def generate_on_rank(
    start: Start, config: RunConfig, sampling: Sampling = GREEDY, batch_size: int = 3, only: int | None = None
) -> list[list[int]]:
    """Tokens of all prompts from the engine at the layout of ``config``, or of one of them."""
    with start.topology(config.parallel) as topology:
        engine = Engine(build_model(config, topology), config, topology)
        options = GenerationOptions(max_new_tokens=NEW_TOKENS, batch_size=batch_size, sampling=sampling)
        return new_tokens(engine, prompts(config) if only is None else [prompts(config)[only]], options)


def generate_from_ties(start: Start, config: RunConfig) -> list[list[int]]:
    """The same where all logits are equal, those of padded rows of the vocabulary aside."""
    with start.topology(config.parallel) as topology:
        chunks = build_model(config, topology)
        for chunk in chunks:
            if chunk.language_model is not None and chunk.stage.head:
                chunk.language_model.output_layer.weight.data.zero_()
        return new_tokens(Engine(chunks, config, topology), prompts(config), GenerationOptions(max_new_tokens=2))


def recompute_on_rank(start: Start, config: RunConfig, sampling: Sampling = GREEDY) -> list[list[int]]:
    """The same tokens in one process without cache or padding: each new token from a pass over the whole sequence."""
    with start.topology(config.parallel) as topology, torch.no_grad():
        chunk = build_model(config, topology)[0].eval()
        endoftext, answers = SpecialTokens(config.model.num_bpe_tokens).endoftext, []
        for prompt in prompts(config):
            tokens = list(prompt.tokens)
            for position in range(NEW_TOKENS):
                logits = _last_logits(chunk, config, tokens, prompt)[None]
                seen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, torch.tensor([tokens]), value=True)
                draws = [draw(sampling.seed, prompt.number, position)]
                token = int(choose_tokens(process_logits(logits, sampling, seen), sampling, draws))
                if token == endoftext:
                    break
                tokens.append(token)
            answers.append(tokens[len(prompt.tokens) :])
        return answers


def _last_logits(chunk: object, config: RunConfig, tokens: list[int], prompt: Request) -> torch.Tensor:
    line, language = torch.tensor(tokens), chunk.language_model
    embedded = language.embed(line)
    if prompt.pixels is not None:
        slots = torch.nonzero(line == SpecialTokens(config.model.num_bpe_tokens).img_pad).flatten()
        spans = torch.arange(len(prompt.pixels))
        embedded = fuse(embedded, chunk.see(None, prompt.pixels), slots=slots, span_images=spans)
    inputs = language.attention_inputs(PackedLine.of([len(tokens)]))
    hidden = language(embedded.unsqueeze(1), inputs)
    return language.logits(hidden, positions=torch.tensor([len(tokens) - 1]))[0]


def choices(config: RunConfig) -> list[Choices]:
    """The prompts, each with continuations of 1 to 6 tokens."""
    generator = torch.Generator().manual_seed(5)
    made = []
    for number, prompt in enumerate(prompts(config)):
        lengths = [(3,), (1, 6), (2, 2, 4), (5,), (1, 1)][number]
        endings = (torch.randint(0, config.model.num_bpe_tokens, (n,), generator=generator).tolist() for n in lengths)
        made.append(Choices(prompt, tuple(map(tuple, endings))))
    return made


def score_on_rank(start: Start, config: RunConfig, batch_size: int = 3) -> list[Likelihoods]:
    """Log-likelihoods from the engine at the layout of ``config``."""
    with start.topology(config.parallel) as topology:
        engine = Engine(build_model(config, topology), config, topology)
        return list(engine.log_likelihoods(choices(config), batch_size=batch_size))


def forward_scores_on_rank(start: Start, config: RunConfig) -> list[list[list[float]]]:
    """The same from the logits of ``tools/forward.py``, one sequence at a time."""
    with start.topology(config.parallel) as topology:
        chunks = build_model(config, topology)
        return [
            [_from_forward(chunks, config, item.request, ending, topology) for ending in item.continuations]
            for item in choices(config)
        ]


def _from_forward(
    chunks: list[Any], config: RunConfig, prompt: Request, ending: tuple[int, ...], topology: Topology
) -> list[float]:
    pixels = None if prompt.pixels is None else normalize(prompt.pixels)
    inputs = ForwardInputs("test", torch.tensor([[*prompt.tokens, *ending]]), pixels)
    logits = forward(chunks, inputs, config=config, topology=topology)["logits"][0].log_softmax(-1)
    return [float(logits[len(prompt.tokens) + place - 1, token]) for place, token in enumerate(ending)]
