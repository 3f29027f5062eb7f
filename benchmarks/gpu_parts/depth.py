"""How deep a model of full width fits: estimates of what a step holds, and a ladder of attempts.

Three vision layers go with two language layers, as at full depth, so that a shallower model still spends its time where
the whole one does, but for embedding and head, which weigh more. The estimate chooses where the ladder begins; what
really fits is found by trying.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from megatron_vl.config.schema import RunConfig
from megatron_vl.planning.flops import Work
from megatron_vl.planning.layout import resolve_layout
from megatron_vl.planning.parameters import parameters_by_rank

EIGHTHS = 8
USED = 0.94
"""Share of the free memory that an estimate may take."""
SLACK = 1.15
"""Activations over the estimate. Measured with Transformer Engine on an H200: 0.9 (stage 1) and 0.7 (stage 2)."""
WORKSPACE = 3e9
T = TypeVar("T")


@dataclass(frozen=True)
class Attempt:
    """One size to try."""

    vision_layers: int
    language_layers: int

    def __str__(self) -> str:
        return f"{self.vision_layers} + {self.language_layers} layers"

    def applied(self, config: RunConfig) -> RunConfig:
        """The configuration at this size."""
        model = config.model
        model = replace(
            model,
            vision=replace(model.vision, num_layers=self.vision_layers),
            language=replace(model.language, num_layers=self.language_layers),
        )
        return replace(config, model=model)


def ladder(config: RunConfig, work: Work, *, free_bytes: int) -> Iterator[Attempt]:
    """Sizes from the largest that should fit downwards.

    Args:
        work: of one micro-batch.
        free_bytes: memory of the device; 0 for no limit.
    """
    vision, language = config.model.vision.num_layers, config.model.language.num_layers
    depths = [(vision * part // EIGHTHS, language * part // EIGHTHS) for part in range(EIGHTHS, 0, -1)]
    attempts = [Attempt(*depth) for depth in depths if min(depth) > 0]
    limit = USED * free_bytes if free_bytes else float("inf")
    fitting = [attempt for attempt in attempts if step_bytes(attempt.applied(config), work) <= limit]
    yield from fitting or attempts[-1:]


def step_bytes(config: RunConfig, work: Work) -> float:
    """Weights, gradients, optimizer and activations of a step, in one process."""
    rank = parameters_by_rank(config, resolve_layout(config))[0]
    weight = 2 if config.training.bf16 else 4
    master = 4 if config.training.bf16 else 0
    state = rank.trained * (weight + 4 + master + 8) + rank.frozen * weight + rank.quantized * 2
    return state + SLACK * _activation_bytes(config, work) + WORKSPACE


def first_that_fits(attempts: Iterator[Attempt], run: Callable[[Attempt], T]) -> tuple[Attempt, T, list[str]]:
    """Run the attempts in turn until one does not run out of memory; also what was tried before it.

    Raises:
        torch.OutOfMemoryError: none fits.
    """
    failed: list[str] = []
    for attempt in attempts:
        try:
            return attempt, run(attempt), failed
        except torch.OutOfMemoryError as error:
            failed.append(f"{attempt}: {str(error).splitlines()[0]}")
        gc.collect()  # the failed model is part of a cycle
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    raise torch.OutOfMemoryError("; ".join(failed))


def _activation_bytes(config: RunConfig, work: Work) -> float:
    model, training = config.model, config.training
    vision, language = model.vision, model.language
    positions = config.data.seq_length * training.micro_batch_size  # padding takes memory, too
    patches = max(work.num_images, 1) * model.num_patches
    token = 14 * language.hidden_size + 6 * language.ffn_hidden_size
    patch = 14 * vision.hidden_size + 4 * vision.ffn_hidden_size
    vision_layers = 0 if training.freeze_vision else vision.num_layers
    layers = language.num_layers * token * positions + vision_layers * patch * patches
    return layers + 14 * work.num_supervised * language.vocab_size
