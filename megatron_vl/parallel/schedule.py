"""A thin call to Megatron-Core's schedules: plain, 1F1B, or interleaved, over stages that are split anywhere.

Boundary tensors of the vision tower, the resampler and the language model have different shapes. So shapes travel with
the tensors (``variable_seq_lengths`` in ``model/configs.py``), and the sizes that the schedules ask for are not used.

A schedule frees the memory of an output after sending it (``deallocate_pipeline_outputs``): it gives the tensor another
storage. The interleaved schedule does so while the asynchronous send may still read. It waits for a send one step
later. It must do so, since the peer receives only after it has sent something itself. :class:`P2P` sends an alias,
which keeps the storage until the request is finished.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.utils import get_model_config
from torch import nn

from megatron_vl.data.loading.batch import MicroBatch
from megatron_vl.parallel.arrival import Arrivals
from megatron_vl.parallel.topology import Topology

LossRecord = dict[str, torch.Tensor]


@dataclass(frozen=True)
class StepInputs:
    """What a chunk takes in a step: each micro-batch, and the features of its images if other ranks encode them."""

    arrivals: Arrivals
    features: Iterable[torch.Tensor | None]

    def __len__(self) -> int:
        return len(self.arrivals)

    def __iter__(self) -> Iterator[tuple[MicroBatch, torch.Tensor | None]]:
        return zip(self.arrivals, self.features, strict=False)  # features may be an endless None


class P2P(P2PCommunicator):
    """Messages between stages; each one keeps the storage of what it sends.

    A request of torch holds the tensor that it was given: gloo's until the request is dropped, NCCL's until the stream
    of the schedule waits for it. However, it holds the tensor object, not the storage that the tensor had at that
    moment.
    """

    def _communicate(
        self, *, tensor_send_next: torch.Tensor | None, tensor_send_prev: torch.Tensor | None, **rest: Any
    ) -> Any:
        """Send aliases. Every message of every schedule passes through this method."""
        return super()._communicate(
            tensor_send_next=None if tensor_send_next is None else tensor_send_next.detach(),
            tensor_send_prev=None if tensor_send_prev is None else tensor_send_prev.detach(),
            **rest,
        )


def run_schedule(
    chunks: Sequence[nn.Module],
    inputs: Sequence[StepInputs],
    *,
    forward_step: Callable[..., tuple[torch.Tensor, Callable[..., Any]]],
    forward_only: bool,
    topology: Topology,
) -> list[LossRecord]:
    """Run forward (and backward) of all micro-batches of a step.

    Args:
        chunks: this rank's model chunks, in order of their virtual stage.
        inputs: for each chunk, its micro-batches, which are those of this data-parallel rank.
        forward_step: ``(iterator, chunk) -> (output, loss function)``.

    Returns:
        The records of the loss function, one for each micro-batch; empty on ranks without the head.
    """
    iterators = [iter(own) for own in inputs]
    single = len(chunks) == 1
    records: list[LossRecord] = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators[0] if single else iterators,
        model=chunks[0] if single else list(chunks),
        num_microbatches=len(inputs[0]),
        seq_length=1,
        micro_batch_size=1,
        forward_only=forward_only,
        p2p_communicator=P2P(topology.pp_group, get_model_config(chunks[0])),
        pg_collection=topology.groups,
    )
    return records
