"""Run work that communicates with no other rank, and let all ranks know whether any rank has failed.

If one rank left alone, its peers would wait in their next collective until the time-out, where no launcher ends them.
So an error of one rank, whatever it is, ends all ranks at once. The failing rank raises its own error, and its peers
raise what they are told of it. Interrupts are not shared: a terminal sends them to every rank, so the peers may have
left already.
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
    """Run ``action`` on every rank, and return its result on this rank.

    Raises:
        Exception: that of this rank, if it has one.
        MegatronVLError: if another rank has failed. It has the type of that rank's error and names the rank if the
            error is one for a user. For a bug it is :class:`PeerError`, and the failing rank shows the traceback.
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
    """Run ``action`` on every rank, and return the results in the order of ranks. Raises as :func:`together` does."""
    own = together(action)
    gathered = [own] * dist.get_world_size()
    dist.all_gather_object(gathered, own)
    return gathered


def by_rank_0(action: Callable[[], T]) -> T:
    """Run ``action`` on rank 0, and return its result on every rank. Raises as :func:`together` does."""
    value: T = by_all(lambda: action() if dist.get_rank() == 0 else None)[0]  # type: ignore[assignment]
    return value


def _tell(error: Exception) -> _Told:
    """Return the error that the peers of this rank raise."""
    rank = dist.get_rank()
    if isinstance(error, MegatronVLError):
        return type(error), f"rank {rank}: {error}"
    if text := machine_errors.describe(error):
        return MegatronVLError, f"rank {rank}: {text}"
    return PeerError, f"rank {rank} has failed by a bug and shows its traceback; all other ranks end with it"
