"""Runs on a rank: answers that end at a stop sequence."""

from __future__ import annotations

from megatron_vl.config.schema import RunConfig
from megatron_vl.generation.engine import Engine, GenerationOptions
from megatron_vl.model.build import build_model
from tests.helpers.ranks import Start
from tests.parallel.generating import prompts

LONG = 12


def stop_on_rank(
    start: Start, config: RunConfig, stop_sequences: tuple[tuple[int, ...], ...], batch_size: int
) -> list[list[int]]:
    """Answers of up to ``LONG`` tokens, cut at ``stop_sequences``."""
    with start.topology(config.parallel) as topology:
        engine = Engine(build_model(config, topology), config, topology)
        options = GenerationOptions(max_new_tokens=LONG, batch_size=batch_size, stop_sequences=stop_sequences)
        return engine.generate(prompts(config), options)
