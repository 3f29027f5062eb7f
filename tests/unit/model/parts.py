"""Runs on a rank: each part of the network on given inputs, with weights that are all random."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_vl.backends.attention_inputs import AttentionInputs, PackedLine
from megatron_vl.config.schema import RunConfig
from megatron_vl.model.build import build_model
from megatron_vl.model.context import run_layers
from tests.helpers.ranks import Start


@dataclass(frozen=True)
class Inputs:
    """What the parts are given."""

    patches: Tensor
    """float[patches, n, vision width], for the vision layers and for the resampler."""
    embedded: Tensor
    """float[t, 1, h], for the language layers."""
    spans: list[int]
    """Lengths of the attention spans of that line."""


@dataclass(frozen=True)
class Outputs:
    """What they make of it, and with which weights."""

    weights: dict[str, Tensor]
    """Parameters and buffers by global name."""
    vision: Tensor
    resampler: Tensor
    language: Tensor
    resampler_gradients: dict[str, Tensor]
    """Of the sum of squares of the resampler's output."""


def run_parts(start: Start, config: RunConfig, inputs: Inputs) -> Outputs:
    """Vision layers, resampler and language layers, each alone, in a world of one."""
    with start.topology(config.parallel) as topology:
        (chunk,) = build_model(config, topology)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in chunk.parameters():  # norms and biases too, which start as ones and zeros
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
        language = chunk.language_model
        features = chunk.resampler(inputs.patches)
        features.square().sum().backward()
        with torch.no_grad():
            tower = chunk.vision
            vision = run_layers(tower.layers, inputs.patches, inputs=AttentionInputs(), execution=tower.execution)
            line = language(inputs.embedded, language.attention_inputs(PackedLine.of(inputs.spans)))
        return Outputs(
            weights={name: value.detach() for name, value in [*chunk.named_parameters(), *chunk.named_buffers()]},
            vision=vision.detach(),
            resampler=features.detach(),
            language=line.detach(),
            resampler_gradients={name: value.grad for name, value in chunk.resampler.named_parameters()},
        )
