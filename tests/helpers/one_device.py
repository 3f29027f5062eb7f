"""Several ranks on one GPU, over gloo: NCCL refuses two ranks on a device, and one GPU should still show that layouts
agree. For equality only, never for timing.

gloo has some operations for CUDA tensors and lacks others: it neither sends them nor coalesces their reductions. So
everything goes through the CPU here, and at once, even where an asynchronous operation was asked for. Without CUDA the
same code runs on CPU tensors, which is how it is tested.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vl.config.schema import ParallelConfig
from megatron_vl.parallel.topology import Topology
from tests.helpers.ranks import Start

_SEND, _RECEIVE = dist.isend, dist.irecv


@dataclass(frozen=True)
class OneDeviceStart(Start):
    """Like :class:`Start`, but all ranks compute on the first device and meet over gloo."""

    @contextmanager
    def topology(self, config: ParallelConfig) -> Iterator[Topology]:  # type: ignore[override]
        if torch.cuda.is_available():
            torch.cuda.set_device(0)
        launch = self.launch
        dist.init_process_group("gloo", init_method=self.init_method, rank=launch.rank, world_size=launch.world_size)
        try:
            with _staged_messages(), Topology(config, launch) as topology:
                yield topology
        finally:
            dist.destroy_process_group()

    @classmethod
    def of(cls, start: Start) -> OneDeviceStart:
        """The same ranks at the same meeting place."""
        return cls(start.launch, start.init_method)


class _Staged:
    """The handle of a message; what it received goes to the device when it is waited for."""

    def __init__(self, work: Any, target: Tensor | None, buffer: Tensor) -> None:
        self._work, self._target, self._buffer = work, target, buffer

    def wait(self, *_: Any) -> bool:
        self._work.wait()
        if self._target is not None:
            self._target.detach().copy_(self._buffer)  # Megatron-Core's buffers require a gradient
            self._target = None
        return True

    def is_completed(self) -> bool:
        return bool(self._work.is_completed())


def _isend(tensor: Tensor, dst: int | None = None, group: Any = None, tag: int = 0, **_: Any) -> _Staged:
    buffer = tensor.detach().cpu().contiguous().clone()
    return _Staged(_SEND(buffer, dst, group, tag), None, buffer)


def _irecv(tensor: Tensor, src: int | None = None, group: Any = None, tag: int = 0, **_: Any) -> _Staged:
    buffer = torch.empty(tensor.shape, dtype=tensor.dtype)
    return _Staged(_RECEIVE(buffer, src, group, tag), tensor, buffer)


@dataclass
class _Operation:
    """Stands for ``torch.distributed.P2POp``, which looks at the device of its tensor."""

    op: Any
    tensor: Tensor
    peer: int
    group: Any = None


def _batch_isend_irecv(operations: list[_Operation]) -> list[_Staged]:
    return [operation.op(operation.tensor, operation.peer, operation.group) for operation in operations]


class _Done:
    """The handle of an operation that has ended."""

    def wait(self, *_: Any) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


@contextmanager
def _one_by_one(*_: Any, **__: Any) -> Iterator[_Done]:
    """Stands for torch's manager that coalesces operations."""
    yield _Done()


def _through_cpu(collective: Callable[..., Any]) -> Callable[..., _Done]:
    """The collective on copies in host memory; what it computed goes to its first argument, which is the output."""
    signature = inspect.signature(collective)

    @functools.wraps(collective)
    def run(*args: Any, **kwargs: Any) -> _Done:
        given = signature.bind(*args, **kwargs).arguments | {"async_op": False}
        staged = {name: _on_cpu(value) for name, value in given.items()}
        collective(**staged)
        output = next(iter(given))
        for tensor, copy in zip(_tensors(given[output]), _tensors(staged[output]), strict=True):
            tensor.detach().copy_(copy)
        return _Done()

    return run


def _on_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    return [_on_cpu(item) for item in value] if isinstance(value, list) else value


def _tensors(value: Any) -> list[Tensor]:
    return value if isinstance(value, list) else [value]


_COLLECTIVES = ("all_reduce", "broadcast", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor")


@contextmanager
def _staged_messages() -> Iterator[None]:
    """Let everything that ranks exchange go through the CPU."""
    from megatron.core.distributed import param_and_grad_buffer
    from megatron.core.tensor_parallel import layers, mappings, utils

    collectives = {name: _through_cpu(getattr(dist, name)) for name in _COLLECTIVES}
    messages = {
        "isend": _isend,
        "irecv": _irecv,
        "P2POp": _Operation,
        "batch_isend_irecv": _batch_isend_irecv,
        "send": lambda *args, **kwargs: _isend(*args, **kwargs).wait(),
        "recv": lambda *args, **kwargs: _irecv(*args, **kwargs).wait(),
    }
    # Megatron-Core keeps names of its own for two of them.
    gather = {"dist_all_gather_func": collectives["all_gather_into_tensor"]}
    both = gather | {"dist_reduce_scatter_func": collectives["reduce_scatter_tensor"]}
    with ExitStack() as stack:
        for module, replaced in (
            (dist, collectives | messages),
            (param_and_grad_buffer, both | {"_coalescing_manager": _one_by_one}),
            (mappings, both),
            (layers, both),
            (utils, gather),
        ):
            stack.enter_context(mock.patch.multiple(module, **replaced))
        yield
