"""A thin call to Megatron-Core's schedules: plain, 1F1B, or interleaved, over stages cut anywhere.

Boundary tensors of the vision tower, the resampler and the language model have different shapes, so shapes travel with
the tensors (``variable_seq_lengths`` in ``model/configs.py``), and the sizes that the schedules ask for are not used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import nn

from megatron_vl.data.batch import MicroBatch

LossRecord = dict[str, torch.Tensor]


def run_schedule(
    chunks: Sequence[nn.Module],
    batches: Sequence[MicroBatch],
    *,
    forward_step: Callable[..., tuple[torch.Tensor, Callable[..., Any]]],
    forward_only: bool,
) -> list[LossRecord]:
    """Forward (and backward) of all micro-batches of a step.

    Args:
        chunks: this rank's model chunks, in order of their virtual stage.
        batches: the micro-batches of this data-parallel rank.
        forward_step: ``(iterator, chunk) -> (output, loss function)``.

    Returns:
        What the loss function recorded for each micro-batch; empty on ranks without the head.
    """
    iterators = [iter(batches) for _ in chunks]
    single = len(chunks) == 1
    records: list[LossRecord] = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators[0] if single else iterators,
        model=chunks[0] if single else list(chunks),
        num_microbatches=len(batches),
        seq_length=1,
        micro_batch_size=1,
        forward_only=forward_only,
    )
    return records
