"""The original's own numbers, and what computes ours beside them on a rank.

All goes the user's way: the published folder is imported into a checkpoint once, each layout loads it, and what is
compared is what ``tools/forward.py`` computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_vl.checkpoint.inference import LoadedModel, load_for_inference
from megatron_vl.config.batch import model_parallel_size
from megatron_vl.config.schema import ParallelConfig
from megatron_vl.config.special_tokens import SpecialTokens
from megatron_vl.conversion.checkpoints import write_checkpoint
from megatron_vl.conversion.convert import import_folder
from megatron_vl.data.loading.batch import CollateOptions, MicroBatch, collate
from megatron_vl.data.sample import PackedRow
from megatron_vl.evaluation.forward import forward, forward_config, outputs_of, run_eval_forward
from megatron_vl.evaluation.forward_inputs import ForwardInputs
from megatron_vl.generation.engine import Engine
from megatron_vl.generation.requests import GenerationOptions, Request
from megatron_vl.parallel.topology import Topology
from tests.helpers.pieces import Piece, take_pieces
from tests.helpers.ranks import Start
from tests.parallel.generating import new_tokens

FOLDER = Path(__file__).parents[1] / "golden" / "qwen_vl" / "qwen_vl_hf_tiny"
MODEL = import_folder(FOLDER).model


def read_expected() -> dict[str, Tensor]:
    """Everything that the original computed."""
    return load_file(FOLDER / "expected.safetensors")


def read_inputs_of(expected: dict[str, Tensor], name: str) -> ForwardInputs:
    """What the original was given: ``multimodal`` or ``text_only``."""
    return ForwardInputs(
        name,
        expected[f"{name}.input_ids"],
        expected["pixels"] if name == "multimodal" else None,
        expected[f"{name}.labels_unshifted"],
    )


@dataclass(frozen=True)
class Layout:
    """Where a checkpoint is loaded to."""

    parallel: dict[str, Any]
    """Fields of :class:`ParallelConfig`."""
    data: int = 1
    """Data-parallel ranks."""
    bf16: bool = False

    @property
    def world_size(self) -> int:
        return model_parallel_size(self.config) * self.data

    @property
    def config(self) -> ParallelConfig:
        return ParallelConfig(backend="local", **self.parallel)


def import_on_rank(_: Start, root: Path, folder: Path = FOLDER) -> Path:
    """Import a published folder into a checkpoint, in a world of one; returns its directory."""
    return write_checkpoint(import_folder(folder), root)


@dataclass(frozen=True)
class Outputs:
    """What one rank reports."""

    tensors: dict[str, Tensor]
    """What ``tools/forward.py`` writes; on rank 0."""
    gradients: dict[str, Piece]
    """With labels: this rank's part of each gradient."""


def forward_on_rank(start: Start, layout: Layout, inputs: ForwardInputs, checkpoint: Path) -> Outputs:
    """What ``tools/forward.py`` does, and the gradients that it leaves behind."""
    length = inputs.input_ids.shape[1]
    with start.topology(layout.config) as topology:
        loaded = load(checkpoint, layout, length, topology)
        tensors = forward(loaded.chunks, inputs, config=loaded.config, topology=topology)
        gradients = take_pieces(
            loaded.chunks, topology.tp_rank, lambda parameter: getattr(parameter, "main_grad", None)
        )
        return Outputs(tensors, gradients if topology.dp_rank == 0 else {})


def packed_on_rank(start: Start, layout: Layout, batch: MicroBatch, checkpoint: Path) -> list[Tensor]:
    """Logits of the supervised positions of a micro-batch: this rank's part, where it has the head."""
    with start.topology(layout.config) as topology:
        loaded = load(checkpoint, layout, len(batch.tokens), topology)
        return run_eval_forward(loaded.chunks, [batch], topology=topology).logits


def load(checkpoint: Path, layout: Layout, length: int, topology: Topology) -> LoadedModel:
    """The checkpoint at a layout, for rows of a length."""
    return load_for_inference(
        checkpoint,
        lambda saved: forward_config(saved, layout.config, seq_length=length, bf16=layout.bf16),
        topology,
    )


def packed_batch(segments: Sequence[ForwardInputs]) -> MicroBatch:
    """Sequences as segments of one row, with every position through the head; at most one has an image."""
    ids = [segment.input_ids[0] for segment in segments]
    pixels = [segment.pixels for segment in segments if segment.pixels is not None]
    everywhere = torch.arange(sum(map(len, ids)))
    row = PackedRow(
        tokens=torch.cat(ids).numpy().astype(np.int32),
        supervised=np.zeros(len(everywhere), dtype=np.bool_),
        segment_lengths=np.array([len(segment) for segment in ids], dtype=np.int32),
        image_ids=np.arange(len(pixels)),
    )
    options = CollateOptions(
        special=SpecialTokens(MODEL.num_bpe_tokens),
        seq_length=len(everywhere),
        num_queries=MODEL.resampler.num_queries,
        image_size=MODEL.image_size,
        attention_span="segment",
        with_pixels=False,
    )
    batch = collate([row], None, options, names=["golden"])
    return replace(batch, pixels=torch.cat(pixels), supervised=everywhere, targets=torch.zeros_like(everywhere))


@dataclass(frozen=True)
class Generated:
    """What one rank reports of answers."""

    tokens: list[list[int]]
    logits: list[Tensor]
    """float32[b, padded vocabulary / tp] of each pass, where the head is."""


def generate_on_rank(
    start: Start, layout: Layout, prompts: list[Request], options: GenerationOptions, checkpoint: Path
) -> Generated:
    """Greedy tokens with the key-value cache."""
    with start.topology(layout.config) as topology:
        engine = Engine.from_checkpoint(checkpoint, parallel=layout.config, topology=topology)
        heads = [chunk.language_model.output_layer for chunk in engine.chunks if chunk.stage.head]
        with outputs_of(heads) as logits:
            return Generated(new_tokens(engine, prompts, options), logits)
