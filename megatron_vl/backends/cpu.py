"""Let Megatron-Core run on a machine without CUDA, over gloo.

Megatron-Core names the CUDA device explicitly. It asks ``torch.cuda`` for the current device, builds scalars with
``device="cuda"``, calls ``Tensor.cuda`` and compares ``Tensor.type()`` with ``torch.cuda.FloatTensor``. This module
answers all of these with the CPU, by replacing attributes. There is no function mode around every operation, so a
patched process computes at full speed.

It is installed on request, and only where there is no CUDA. ``tests/unit/backends/test_cpu.py`` counts the places that
name CUDA in each supported version of Megatron-Core, and fails when another one moves them.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._device import _device_constructors

_FACTORIES = ("zeros", "ones", "empty", "full", "tensor", "arange", "empty_like", "zeros_like", "rand", "randn")


class _NullStream:
    """A CUDA stream or event that has nothing to wait for."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        pass

    def _nothing(self, *_args: Any, **_kwargs: Any) -> None:
        return None

    wait_stream = wait_event = wait = synchronize = record = record_event = _nothing

    def query(self) -> bool:
        """Return True: all work is done."""
        return True


def _is_cuda(device: object) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Wrap a tensor factory so that ``device="cuda"`` means the CPU."""

    @functools.wraps(factory)
    def wrapped(*args: Any, **kwargs: Any) -> torch.Tensor:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return wrapped


def is_installed() -> bool:
    """Return whether :func:`install` has run in this process."""
    return torch.Tensor.cuda is _tensor_cuda


def install() -> None:
    """Patch torch and Megatron-Core for this process. Do nothing if CUDA is present or the patch is installed."""
    if torch.cuda.is_available() or is_installed():
        return
    _patch_tensor_methods()
    _patch_torch_cuda()
    _patch_rng_states()
    _share_process_groups()
    _drop_process_groups()
    _skip_collectives_of_one()


def _tensor_cuda(self: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
    return self


def _uncompiled(function: Any = None, **_kwargs: Any) -> Any:
    return function if function is not None else _uncompiled


def _patch_tensor_methods() -> None:
    plain_type, plain_to = torch.Tensor.type, torch.Tensor.to

    def tensor_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = plain_type(self, *args, **kwargs)
        # Megatron-Core's optimizers sort parameters by comparing this string with torch.cuda.FloatTensor.
        return f"torch.cuda.{answer.rpartition('.')[2]}" if isinstance(answer, str) else answer

    def tensor_to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        args = tuple("cpu" if _is_cuda(arg) else arg for arg in args)
        kwargs = {key: "cpu" if _is_cuda(value) else value for key, value in kwargs.items()}
        return plain_to(self, *args, **kwargs)

    # torch.device as a context knows the factories by identity, and makes its list when it is first used.
    _device_constructors()
    # Megatron-Core decorates small functions with torch.compile; here each would call a C++ compiler.
    setattr(torch, "compile", _uncompiled)
    setattr(torch.Tensor, "cuda", _tensor_cuda)
    setattr(torch.Tensor, "type", tensor_type)
    setattr(torch.Tensor, "to", tensor_to)
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))


def _patch_torch_cuda() -> None:
    def answering(value: Any) -> Callable[..., Any]:
        """Return a new function for each name: torch's tracing rules require distinct ones."""
        return lambda *_args, **_kwargs: value

    replacements: dict[str, Any] = {
        "current_device": lambda: torch.device("cpu"),
        "get_rng_state": lambda *_args, **_kwargs: torch.get_rng_state(),
        "set_rng_state": lambda state, *_args, **_kwargs: torch.set_rng_state(state),
        "manual_seed": torch.manual_seed,
        "Stream": _NullStream,
        "Event": _NullStream,
        "stream": lambda *_args: contextlib.nullcontext(),
        "current_stream": lambda *_args: _NullStream(),
        "default_stream": lambda *_args: _NullStream(),
        "get_device_capability": lambda *_args: (0, 0),
    }
    silent = ("set_device", "synchronize", "empty_cache", "reset_peak_memory_stats")
    replacements |= {name: answering(None) for name in silent}
    replacements |= {name: answering(0) for name in ("memory_allocated", "max_memory_allocated", "memory_reserved")}
    for name, value in replacements.items():
        setattr(torch.cuda, name, value)
    for name in ("range_push", "range_pop"):
        setattr(torch.cuda.nvtx, name, answering(None))


def _share_process_groups() -> None:
    """Let groups of the same ranks be one group.

    Megatron-Core makes about twenty groups a rank, most of them of the same few sets of ranks. With gloo each group
    costs a full mesh of connections and a thread that wakes a hundred times a second. On a machine with few cores that
    is a large part of all its time. Every rank makes the same calls in the same order, so all ranks share the same
    groups.
    """
    from megatron.core import parallel_state

    # Weak references, for the reason in _drop_process_groups.
    shared: weakref.WeakValueDictionary[tuple[int, ...], Any] = weakref.WeakValueDictionary()
    elsewhere: set[tuple[int, ...]] = set()  # groups that this rank made with the others and is no member of

    def create_group(ranks: Sequence[int], timeout: timedelta | None = None, **_kwargs: Any) -> Any:
        key, size = tuple(ranks), dist.get_world_size()
        if shared.get(()) is not dist.group.WORLD:  # the process group was started anew
            shared.clear()
            elsewhere.clear()
            shared[()] = dist.group.WORLD
        if len(key) == size and key == tuple(range(size)):
            return dist.group.WORLD
        if key in elsewhere:
            return dist.GroupMember.NON_GROUP_MEMBER
        group = shared.get(key)
        if group is None:
            group = dist.new_group(list(ranks), timeout=timeout)
            if dist.get_rank() in key:
                shared[key] = group
            else:
                elsewhere.add(key)
        return group

    setattr(parallel_state, "create_group", create_group)


def _drop_process_groups() -> None:
    """Let ``destroy_model_parallel`` drop every group; it leaves some in its module.

    A gloo group ends its threads when its last reference is dropped. A thread that is still alive when the interpreter
    ends may ask for the interpreter's lock at that moment. That aborts a process that had finished its work.
    ``destroy_model_parallel`` would also destroy some groups itself, although here they are shared with others.
    """
    from megatron.core import parallel_state

    destroy = parallel_state.destroy_model_parallel

    def drop() -> None:
        for name, value in vars(parallel_state).items():
            if isinstance(value, dist.ProcessGroup):
                setattr(parallel_state, name, None)

    def destroy_model_parallel() -> None:
        drop()
        destroy()

    setattr(parallel_state, "destroy_model_parallel", destroy_model_parallel)


def _skip_collectives_of_one() -> None:
    """Let the buffers of parameters and gradients skip collectives in a group of one rank.

    NCCL sees that there is nothing to do, but gloo copies the whole buffer. The shard is then the buffer itself, so
    nothing has to move.
    """
    from megatron.core.distributed import param_and_grad_buffer

    def unless_alone(collective: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(collective)
        def wrapped(output: torch.Tensor, source: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if dist.get_world_size(kwargs["group"]) == 1 and output.data_ptr() == source.data_ptr():
                return None
            return collective(output, source, *args, **kwargs)

        return wrapped

    for name in ("dist_all_gather_func", "dist_reduce_scatter_func"):
        setattr(param_and_grad_buffer, name, unless_alone(getattr(param_and_grad_buffer, name)))


def _patch_rng_states() -> None:
    from megatron.core.tensor_parallel import random as core_random

    def get_state(*_args: Any, **_kwargs: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, *_args: Any, **_kwargs: Any) -> None:
        torch.set_rng_state(state)

    setattr(core_random, "_get_cuda_rng_state", get_state)
    setattr(core_random, "_set_cuda_rng_state", set_state)
