"""Runs on a rank: one step in which messages are received late, and in which freed memory does not keep its contents.

What an asynchronous message reads after its memory was freed is mostly still there, so a race shows once in a while.
Here the receiver waits before it offers a buffer, until when gloo reads nothing; and the memory of every tensor that
the schedule frees is overwritten at once, if nobody else holds it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from megatron.core.pipeline_parallel import p2p_communication, schedules

from megatron_vl.config.schema import RunConfig
from megatron_vl.data.loading.batch import MicroBatch
from megatron_vl.model.build import build_model
from megatron_vl.training.step import evaluate
from tests.helpers.ranks import Start
from tests.parallel.gradients import RankGradients, step_on_rank

DELAY_S = 0.03
_HOLDERS = 2
"""Of a storage that nobody needs: the tensor that is about to give it up, and the Python object that counts."""


def step_with_late_rank(start: Start, config: RunConfig, batches: list[MicroBatch], late: int) -> RankGradients:
    """One training step whose messages rank ``late`` receives late."""
    with _late_receives(start.launch.rank == late), _nothing_left_behind():
        return step_on_rank(start, config, batches)


def evaluate_with_late_rank(start: Start, config: RunConfig, batches: list[MicroBatch], late: int) -> float:
    """The validation loss of a step whose messages rank ``late`` receives late."""
    with start.topology(config.parallel) as topology, _late_receives(topology.rank == late), _nothing_left_behind():
        return evaluate(build_model(config, topology), [batches], topology=topology).mean


@contextmanager
def _late_receives(late: bool) -> Iterator[None]:
    def after_a_while(exchange: Callable[..., Any]) -> Callable[..., Any]:
        def exchange_late(**tensors: Any) -> Any:
            time.sleep(DELAY_S if late else 0.0)
            return exchange(**tensors)

        return exchange_late

    exchanges = {name: after_a_while(getattr(p2p_communication, name)) for name in ("_p2p_ops", "_batched_p2p_ops")}
    with mock.patch.multiple(p2p_communication, **exchanges):
        yield


@contextmanager
def _nothing_left_behind() -> Iterator[None]:
    deallocate: Callable[..., None] = schedules.deallocate_output_tensor

    def overwrite(out: torch.Tensor | list[torch.Tensor] | None, *args: Any) -> None:
        if isinstance(out, torch.Tensor):  # 0.19 also frees lists, and comes back here for each entry
            storage = out.untyped_storage()
            if torch._C._storage_Use_Count(storage._cdata) == _HOLDERS:
                out.detach().fill_(float("nan"))
            del storage
        deallocate(out, *args)

    with mock.patch.object(schedules, "deallocate_output_tensor", overwrite):
        yield
