"""Work that talks to no other rank, after which all ranks know whether any has failed.

A rank that left alone would keep its peers in their next collective until the time-out, where no launcher ends them.
So an error of one rank, whatever it is, ends all of them at once: the rank that has it raises it, its peers raise what
they are told of it. Interrupts are not shared: a terminal sends them to every rank, so the peers may have left already.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from megatron_vl import machine_errors
from megatron_vl.errors import MegatronVLError, PeerError

T = TypeVar("T")
_Told = tuple[type[MegatronVLError], str]


def together(action: Callable[[], T]) -> T:
    """Run ``action`` on every rank; what it gives on this one.

    Raises:
        Exception: that of this rank, if it has one.
        MegatronVLError: another rank has failed: its own kind of error with its rank, if it is one for a user;
            :class:`PeerError` for a bug, of which that rank shows the traceback.
    """
    failure: Exception | None = None
    try:
        value = action()
    except Exception as error:  # noqa: BLE001 - raised below, when the peers know
        failure = error
    told: list[_Told | None] = [None] * dist.get_world_size()
    dist.all_gather_object(told, None if failure is None else _tell(failure))
    if failure is not None:
        raise failure
    for kind, text in filter(None, told):
        raise kind(text)
    return value


def by_all(action: Callable[[], T]) -> list[T]:
    """Run ``action`` on every rank; the results in the order of ranks. Raises as :func:`together` does."""
    own = together(action)
    gathered = [own] * dist.get_world_size()
    dist.all_gather_object(gathered, own)
    return gathered


def by_rank_0(action: Callable[[], T]) -> T:
    """Run ``action`` on rank 0; its result, on every rank. Raises as :func:`together` does."""
    value: T = by_all(lambda: action() if dist.get_rank() == 0 else None)[0]  # type: ignore[assignment]
    return value


def _tell(error: Exception) -> _Told:
    """What the peers of this rank raise."""
    rank = dist.get_rank()
    if isinstance(error, MegatronVLError):
        return type(error), f"rank {rank}: {error}"
    if text := machine_errors.describe(error):
        return MegatronVLError, f"rank {rank}: {text}"
    return PeerError, f"rank {rank} has failed by a bug and shows its traceback; all other ranks end with it"
