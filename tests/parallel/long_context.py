"""Runs on a rank: texts above the native length; and what the published model makes of them.

The reference follows the original one sequence at a time, without a cache: a token's key has the rotary base of the
prompt that was read before it, whether it was part of that prompt or came after it, and its query the scale of its own
position. So what a cache gives is what one pass over the whole sequence gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_vl.backends.attention_inputs import PackedLine
from megatron_vl.config.schema import ModelConfig, RunConfig
from megatron_vl.config.special_tokens import SpecialTokens
from megatron_vl.conversion.hf_config import hf_config
from megatron_vl.conversion.qwen_vl import correspondences
from megatron_vl.data.loading.batch import MicroBatch
from megatron_vl.generation.engine import Engine
from megatron_vl.generation.requests import Choices, GenerationOptions, Request
from megatron_vl.model.build import build_model
from megatron_vl.parallel.rng import seed_all
from megatron_vl.training.parallel_model import build_parallel_model
from megatron_vl.training.step import evaluate, forward_backward
from tests.helpers.ranks import Start
from tests.helpers.reference import reference_forward
from tests.helpers.tiny import MODEL, tiny_config
from tests.parallel.generating import new_tokens

NATIVE = 16
NEW_TOKENS = 5
ALPHAS = {NATIVE: 1, 2 * NATIVE: 3, 4 * NATIVE: 7, 8 * NATIVE: 15}
"""What stretches the rotary base for lengths up to these."""


def long_config(**sections: dict[str, Any]) -> RunConfig:
    """The tiny model with a native length of 16."""
    config = tiny_config(**sections)
    return replace(config, model=with_language(native_seq_length=NATIVE))


def with_language(**fields: Any) -> ModelConfig:
    """The tiny model with other fields of its language model."""
    return replace(MODEL, language=replace(MODEL.language, **fields))


def random_tokens(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Texts of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, MODEL.num_bpe_tokens, (length,), generator=generator).tolist() for length in lengths]


def packed(texts: Sequence[Sequence[int]]) -> MicroBatch:
    """Texts as the spans of one line, every token but a span's first a target."""
    lengths = torch.tensor([len(text) for text in texts])
    borders = F.pad(lengths.cumsum(0), (1, 0))
    tokens = torch.tensor([token for text in texts for token in text])
    positions = torch.cat([torch.arange(len(text)) for text in texts])
    targets = torch.nonzero(positions > 0).flatten()
    size = MODEL.image_size
    return MicroBatch(
        tokens=tokens,
        positions=positions,
        cu_seqlens=borders.int(),
        span_lengths=tuple(lengths.tolist()),
        supervised=targets - 1,
        targets=tokens[targets],
        slots=torch.zeros(0, dtype=torch.int64),
        pixels=torch.zeros(1, 3, size, size, dtype=torch.uint8),
        span_images=torch.zeros(0, dtype=torch.int64),
        num_images=1,
        num_samples=len(texts),
        num_tokens=len(tokens),
        squared_spans=int((lengths**2).sum()),
    )


# --- the original's arithmetic ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """The formulas of ``tests/helpers/reference.py`` with one model's weights."""

    tensors: dict[str, Tensor]
    """The language model's, under their published names."""
    hf: dict[str, Any]
    """Content of ``config.json``."""

    def logits(self, text: Sequence[int]) -> Tensor:
        """float32[t, vocabulary] of a text that is read at once, in evaluation."""
        return reference_forward(self.tensors, self.hf, torch.tensor([text]), None, training=False)[0]

    def answer(self, prompt: Sequence[int]) -> tuple[list[int], Tensor]:
        """Greedy tokens after a prompt, never <|endoftext|>, and float32[NEW_TOKENS, vocabulary], their logits."""
        alpha = next(alpha for limit, alpha in ALPHAS.items() if len(prompt) <= limit)
        size = self.hf["kv_channels"]
        base = self.hf["rotary_emb_base"] * alpha ** (size / (size - 2))
        kept = replace(self, hf=self.hf | {"rotary_emb_base": base, "use_dynamic_ntk": False})
        text, rows = list(prompt), []
        for _ in range(NEW_TOKENS):
            logits = kept.logits(text)[-1]
            logits[SpecialTokens(MODEL.num_bpe_tokens).endoftext] = float("-inf")
            rows.append(logits)
            text.append(int(logits.argmax()))
        return text[len(prompt) :], torch.stack(rows)


# --- on a rank -------------------------------------------------------------------------------------------------------


def reference_on_rank(start: Start, config: RunConfig) -> Reference:
    """The reference with the fresh weights of the model."""
    with start.topology(config.parallel) as topology:
        (chunk,) = build_model(config, topology)
        weights = {name: parameter.detach() for name, parameter in chunk.named_parameters()}
        entries = [entry for entry in correspondences(config.model) if entry.spec.part == "language_model"]
        tensors = {
            name: tensor.clone()
            for entry in entries
            for name, tensor in zip(
                entry.hf_names, entry.rule.to_hf(weights[entry.spec.name], config.model), strict=True
            )
        }
        return Reference(tensors, hf_config(config.model, "float32"))


def packed_logits_on_rank(start: Start, config: RunConfig, batch: MicroBatch, training: bool) -> Tensor:
    """float32[t, vocabulary] of a packed line of text in one process."""
    with start.topology(config.parallel) as topology, torch.no_grad():
        (chunk,) = build_model(config, topology)
        chunk.train(training)
        language = chunk.language_model
        inputs = language.attention_inputs(PackedLine.of(batch.span_lengths))
        hidden = language(language.embed(batch.tokens).unsqueeze(1), inputs)
        return language.logits(hidden, positions=torch.arange(len(batch.tokens)))[:, : config.model.language.vocab_size]


def evaluated_loss_on_rank(start: Start, config: RunConfig, batch: MicroBatch) -> float:
    """The validation loss of a step of equal micro-batches, as many as a virtual pipeline of two stages wants."""
    with start.topology(config.parallel) as topology:
        return evaluate(build_model(config, topology), [[batch, batch]], topology=topology).mean


@dataclass(frozen=True)
class Trained:
    """What a step in training mode gave."""

    loss: float
    gradients: dict[str, Tensor]
    evaluated: float | None
    """The validation loss before it, if there was one."""


def step_after_evaluation_on_rank(start: Start, config: RunConfig, batch: MicroBatch, evaluated: bool) -> Trained:
    """Loss and gradients in one process: at once, or after a validation and a generation above the native length."""
    with start.topology(config.parallel) as topology:
        seed_all(config.training.seed)
        model = build_parallel_model(config, topology)
        before = None
        if evaluated:
            before = evaluate(model.wrapped, [[batch]], topology=topology).mean
            assert all(module.training for chunk in model.wrapped for module in chunk.modules())
            prompt = Request(tuple(batch.tokens.tolist()))
            new_tokens(Engine(model.chunks, config, topology), [prompt], GenerationOptions(max_new_tokens=2))
            for chunk in model.wrapped:
                chunk.train()
        for chunk in model.wrapped:
            chunk.zero_grad_buffer()
        loss, _ = forward_backward(model.wrapped, [batch], topology=topology, forward_only=False)
        gradients = {name: p.main_grad.clone() for chunk in model.chunks for name, p in chunk.named_parameters()}
        return Trained(loss.mean, gradients, before)


def answers_on_rank(
    start: Start, config: RunConfig, texts: Sequence[Sequence[int]], batch_size: int
) -> tuple[list[list[int]], list[Tensor]]:
    """Greedy tokens of each prompt; and, where the head is whole, the logits of every pass."""
    with start.topology(config.parallel) as topology:
        engine = Engine(build_model(config, topology), config, topology)
        logits: list[Tensor] = []
        for chunk in engine.chunks:
            if chunk.stage.head:
                chunk.language_model.output_layer.register_forward_hook(lambda *args: logits.append(args[2][0].clone()))
        banned = (SpecialTokens(config.model.num_bpe_tokens).endoftext,)
        options = GenerationOptions(max_new_tokens=NEW_TOKENS, batch_size=batch_size, banned_ids=banned)
        return new_tokens(engine, [Request(tuple(text)) for text in texts], options), logits


def scores_on_rank(start: Start, config: RunConfig, text: Sequence[int], prompt: int, ends: Sequence[int]) -> Any:
    """Log-likelihoods of what follows the first ``prompt`` tokens of a text, up to each of ``ends``."""
    with start.topology(config.parallel) as topology:
        asked = Choices(Request(tuple(text[:prompt])), tuple(tuple(text[prompt:end]) for end in ends))
        return next(Engine(build_model(config, topology), config, topology).log_likelihoods([asked])).per_token
