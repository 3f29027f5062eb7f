"""Several ranks on one GPU, over gloo: NCCL refuses two ranks on a device, and one GPU should still show that layouts
agree. For equality only, never for timing.

gloo takes CUDA tensors for all-reduce, broadcast, all-gather and, through all-reduce, reduce-scatter. It does not send
them, so sends and receives go through the CPU here. Without CUDA the same code runs on CPU tensors, which is how it is
tested.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def _staged_messages() -> Iterator[None]:
    """Send and receive through the CPU.

    A group of one rank skips the collectives that gloo cannot run in place, which ``megatron_vl/backends/cpu.py``
    arranges where there is no CUDA.
    """
    from megatron.core.distributed import param_and_grad_buffer

    from megatron_vl.backends import cpu

    names = ("dist_all_gather_func", "dist_reduce_scatter_func")
    plain = {name: getattr(param_and_grad_buffer, name) for name in names}
    replaced = {
        "isend": _isend,
        "irecv": _irecv,
        "P2POp": _Operation,
        "batch_isend_irecv": _batch_isend_irecv,
        "send": lambda *args, **kwargs: _isend(*args, **kwargs).wait(),
        "recv": lambda *args, **kwargs: _irecv(*args, **kwargs).wait(),
    }
    with mock.patch.multiple(dist, **replaced):
        if torch.cuda.is_available():
            cpu._skip_collectives_of_one()
        try:
            yield
        finally:
            for name, function in plain.items():
                setattr(param_and_grad_buffer, name, function)
