"""The original's own numbers, and what computes ours beside them on a rank.

The weights go the user's way: the published folder is imported into a checkpoint once, and each layout loads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_vl.checkpoint import contents
from megatron_vl.config.schema import DataConfig, ModelConfig, ParallelConfig, RunConfig, TrainingConfig
from megatron_vl.config.special_tokens import SpecialTokens
from megatron_vl.conversion.checkpoints import write_checkpoint
from megatron_vl.conversion.convert import import_folder
from megatron_vl.data.batch import CollateOptions, MicroBatch, collate
from megatron_vl.data.sample import PackedRow
from megatron_vl.generation.engine import Engine, GenerationOptions, Prompt
from megatron_vl.model.build import build_model
from megatron_vl.model.qwen_vl import QwenVL
from megatron_vl.training.step import forward_backward
from tests.helpers.ranks import Start

FOLDER = Path(__file__).parents[1] / "golden" / "qwen_vl" / "qwen_vl_hf_tiny"


@dataclass(frozen=True)
class Case:
    """One sequence of the original, and what it made of it."""

    input_ids: Tensor
    """int64[s]."""
    labels: Tensor
    """int64[s], not shifted; -100 where nothing is learnt."""
    logits: Tensor
    """float32[s, vocabulary]."""
    pixels: Tensor | None
    """float32[1, 3, H, W], normalised."""

    @property
    def row(self) -> PackedRow:
        """The case as a row of one segment."""
        return PackedRow(
            tokens=self.input_ids.numpy().astype(np.int32),
            supervised=(self.labels != -100).numpy(),
            segment_lengths=np.array([len(self.input_ids)], dtype=np.int32),
            image_ids=np.zeros(0 if self.pixels is None else 1, dtype=np.int64),
        )


def read_expected() -> dict[str, Tensor]:
    """Everything that the original computed."""
    return load_file(FOLDER / "expected.safetensors")


def read_case(expected: dict[str, Tensor], name: str) -> Case:
    """``multimodal`` or ``text_only``."""
    return Case(
        input_ids=expected[f"{name}.input_ids"][0],
        labels=expected[f"{name}.labels_unshifted"][0],
        logits=expected[f"{name}.logits"][0],
        pixels=expected["pixels"] if name == "multimodal" else None,
    )


def micro_batch(model: ModelConfig, row: PackedRow, pixels: Tensor | None, *, length: int) -> MicroBatch:
    """A micro-batch of one row, each segment on its own; pixels are the original's, not decoded anew."""
    options = CollateOptions(
        special=SpecialTokens(model.num_ranks),
        seq_length=length,
        num_queries=model.resampler.num_queries,
        image_size=model.image_size,
        attention_span="segment",
    )
    stand_in = None if pixels is None else np.zeros(pixels.shape, dtype=np.uint8)
    batch = collate([row], stand_in, options, names=["golden"])
    return batch if pixels is None else replace(batch, pixels=pixels)


def run_config(parallel: dict[str, Any], *, length: int, bf16: bool = False) -> RunConfig:
    """A step of one row of the golden model at a layout, in fp32 or bf16."""
    return RunConfig(
        model=import_folder(FOLDER).model,
        parallel=ParallelConfig(use_distributed_optimizer=False, backend="local", **parallel),
        data=DataConfig(seq_length=length, attention_span="segment", num_workers=0),
        training=TrainingConfig(micro_batch_size=1, global_batch_size=1, bf16=bf16),
    )


def import_on_rank(_: Start, root: Path) -> Path:
    """Import the published folder into a checkpoint, in a world of one; returns its directory."""
    return write_checkpoint(import_folder(FOLDER), root)


@dataclass(frozen=True)
class Outputs:
    """What one rank saw of a forward pass."""

    loss: float
    visual: Tensor | None
    """float32[queries, n, h], where the resampler is."""
    logits: Tensor | None
    """float32[t, padded vocabulary / tp], where the head is."""


def forward_on_rank(start: Start, config: RunConfig, batch: MicroBatch, checkpoint: Path) -> Outputs:
    """The loss of ``batch``, and logits at every position."""
    with start.topology(config.parallel) as topology:
        chunks = build_model(config, topology, fresh_weights=False)
        contents.load(contents.Trained(chunks, None), checkpoint, config=config, topology=topology)
        loss, _ = forward_backward(chunks, [batch], topology=topology, forward_only=True)
        everywhere = torch.arange(len(batch.tokens))
        with _capture(chunks) as captured:
            all_positions = replace(batch, supervised=everywhere, targets=torch.zeros_like(everywhere))
            forward_backward(chunks, [all_positions], topology=topology, forward_only=True)
        return Outputs(loss.mean, captured.get("visual"), captured.get("logits"))


@contextmanager
def _capture(chunks: Sequence[QwenVL]) -> Iterator[dict[str, Tensor]]:
    """Record what the resampler and the head give, before the loss computes in place."""
    captured: dict[str, Tensor] = {}

    def recording(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def record(*args: Any, **kwargs: Any) -> Tensor:
            output = function(*args, **kwargs)
            captured[name] = output.detach().clone()
            return output

        return record

    with ExitStack() as patches:
        for chunk in chunks:
            if chunk.resampler is not None:
                patched = recording("visual", chunk.resampler.forward)
                patches.enter_context(mock.patch.object(chunk.resampler, "forward", patched))
            if chunk.stage.head:
                patched = recording("logits", chunk.language_model.logits)
                patches.enter_context(mock.patch.object(chunk.language_model, "logits", patched))
        yield captured


def generate_on_rank(
    start: Start, parallel: ParallelConfig, prompts: list[Prompt], options: GenerationOptions, checkpoint: Path
) -> list[list[int]]:
    """Greedy tokens with the key-value cache."""
    with start.topology(parallel) as topology:
        engine = Engine.from_checkpoint(checkpoint, parallel=parallel, topology=topology)
        return engine.generate(prompts, options)


