"""Load the model of a checkpoint to compute with it and not to train it further: answers, logits, a loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_vl.checkpoint import contents, store
from megatron_vl.checkpoint.verification import choose_together
from megatron_vl.config.schema import RunConfig
from megatron_vl.config.validate import check_tensor_parallel
from megatron_vl.model.build import build_model
from megatron_vl.model.qwen_vl import QwenVL
from megatron_vl.parallel.topology import Topology


@dataclass(frozen=True)
class LoadedModel:
    """This rank's part of a checkpoint's model."""

    chunks: list[QwenVL]
    config: RunConfig
    """What the chunks were built from."""
    checkpoint: Path
    """The checkpoint that all ranks have read."""


def load_for_inference(path: Path, adapt: Callable[[RunConfig], RunConfig], topology: Topology) -> LoadedModel:
    """Choose and verify a checkpoint, and load its weights at another layout; every rank calls it.

    Args:
        path: a checkpoint, or a directory of them (the newest is taken).
        adapt: returns, from the configuration that was saved, the one to build the model from.

    Raises:
        CheckpointError: if there is no usable checkpoint at ``path``.
        ConfigError: if its model cannot be split over this layout.
    """
    checkpoint = choose_together(path, topology)
    config = adapt(store.read_config(checkpoint.path))
    check_tensor_parallel(config.model, config.parallel)
    chunks = build_model(config, topology, fresh_weights=False)
    contents.load(contents.Trained(chunks, None), checkpoint, config=config, topology=topology, load_rng=False)
    return LoadedModel(chunks, config, checkpoint.path)
