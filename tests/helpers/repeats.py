"""Runs on a rank: every step that has asynchronous messages several times over, with the same result to the last bit.

A race shows once in a while, so one run of a case proves little. What is repeated is the schedule alone, forward and
backward over all micro-batches with its reductions; that costs no new ranks, groups or models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from megatron.core.utils import get_model_config
from torch import nn

from megatron_vl.parallel import schedule


@contextmanager
def repeated_schedules(times: int) -> Iterator[None]:
    """Within the block each schedule with asynchronous messages runs so often; the last run counts."""
    choose = schedule.get_forward_backward_func

    def choose_repeated() -> Callable[..., Any]:
        run = choose()
        return lambda **given: _repeat(run, times, **given)

    with mock.patch.object(schedule, "get_forward_backward_func", choose_repeated):
        yield


def _repeat(run: Callable[..., Any], times: int, *, model: Any, data_iterator: Any, **given: Any) -> Any:
    chunks = model if isinstance(model, list) else [model]
    if times == 1 or not _asynchronous(
        chunks
    ):  # with the iterators as they are: what they yield is made when it is due
        return run(model=model, data_iterator=data_iterator, **given)
    iterators = data_iterator if isinstance(data_iterator, list) else [data_iterator]
    batches = [list(iterator) for iterator in iterators]
    trained = [] if given["forward_only"] else chunks
    assert not any(gradient.any() for gradient in _gradients(trained)), "repetitions start from zero"
    first = None
    for number in range(times):
        for chunk in trained if number else []:
            chunk.zero_grad_buffer()
        fresh = [iter(items) for items in batches]
        with _unheard(chunks) if number else nullcontext():
            records = run(model=model, data_iterator=fresh if isinstance(data_iterator, list) else fresh[0], **given)
        found = records, [gradient.clone() for gradient in _gradients(trained)]
        first = first or found
        _assert_same(found, first, name=f"repetition {number}")
    return records


def _assert_same(found: Any, first: Any, *, name: str) -> None:
    message = lambda text: f"{name}: {text}"
    torch.testing.assert_close(found, first, rtol=0.0, atol=0.0, equal_nan=True, msg=message)


def _asynchronous(chunks: Sequence[nn.Module]) -> bool:
    overlap = getattr(chunks[0], "ddp_config", None)
    return get_model_config(chunks[0]).pipeline_model_parallel_size > 1 or (
        overlap is not None and (overlap.overlap_grad_reduce or overlap.overlap_param_gather)
    )


def _gradients(chunks: Sequence[Any]) -> list[torch.Tensor]:
    return [buffer.grad_data for chunk in chunks for buffer in chunk.buffers]


@contextmanager
def _unheard(chunks: Sequence[nn.Module]) -> Iterator[None]:
    """What a test records in forward hooks, it records once."""
    modules = [module for chunk in chunks for module in chunk.modules() if module._forward_hooks]
    hooks = [module._forward_hooks.copy() for module in modules]
    for module in modules:
        module._forward_hooks.clear()
    try:
        yield
    finally:
        for module, kept in zip(modules, hooks, strict=True):
            module._forward_hooks.update(kept)
