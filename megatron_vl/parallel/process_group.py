"""Start the process group: where the ranks of a run meet.

A world of one rank has its store in its own memory. A port might be in use. Besides, torchrun tells its ranks by
``TORCHELASTIC_USE_AGENT_STORE`` that torchrun itself serves the store. torch would then connect as a client to an
address of our choice, where nobody listens.

The store of torchrun outlives the ranks. When torchrun starts them again (``--max-restarts``), the entries of the dead
ranks are still in it. A rank that starts early then takes a dead rank's address for that of its successor (torch 2.13;
gloo fails to connect, NCCL waits). The number of the restart does not help, for each agent of torchrun counts its own.
So the ranks first agree on a name for this start, and use only the part of the store under that name.
"""

from __future__ import annotations

import time
from datetime import timedelta
from uuid import uuid4

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from megatron_vl.errors import ConfigError
from megatron_vl.launch import Launch

_POLL_S = 0.02


def start_process_group(backend: str, launch: Launch, *, init_method: str | None, timeout: timedelta) -> None:
    """Start ``torch.distributed`` on this rank.

    Args:
        init_method: where the ranks meet, if not where their launcher says.

    Raises:
        ConfigError: if there is no place to meet, it is taken, or ranks do not come within ``timeout``.
    """
    if init_method is None:
        launch.check_meeting_place()
    try:
        dist.init_process_group(
            backend,
            init_method=init_method,
            store=None if init_method else _open_store(launch, timeout),
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=timeout,
        )
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        reason = str(error).splitlines()[0].rstrip(" .")
        raise ConfigError(
            f"rank {launch.rank} of {launch.world_size} cannot meet the others at {launch.meeting_place} (MASTER_ADDR, "
            f"MASTER_PORT): {reason}. If the port is in use, choose another one; else see that the name "
            "is rank 0's machine and can be reached"
        ) from error


def _open_store(launch: Launch, timeout: timedelta) -> dist.Store:
    if launch.world_size == 1:
        return dist.HashStore()
    store, _, _ = next(rendezvous("env://", launch.rank, launch.world_size, timeout=timeout))
    return dist.PrefixStore(agree_on_start(store, launch, timeout), store)


def agree_on_start(store: dist.Store, launch: Launch, timeout: timedelta) -> str:
    """Return a name that all ranks of this start have, and no rank of an earlier start.

    Each other rank writes a random word under its number, and waits for the answer to that word. Rank 0 answers each
    word that it finds, until all ranks have confirmed its name. It also answers the words of dead ranks, which nobody
    reads.

    Raises:
        DistStoreError: if not all ranks have come within ``timeout``.
    """
    own = uuid4().hex
    if launch.rank > 0:
        store.set(f"hello/{launch.rank}", own)
        store.wait([f"answer/{own}"], timeout)
        name = store.get(f"answer/{own}").decode()
        store.set(f"confirmed/{name}/{launch.rank}", "")
        return name
    deadline = time.monotonic() + timeout.total_seconds()
    awaited = set(range(1, launch.world_size))
    answered: set[bytes] = set()
    while awaited:
        for rank in sorted(awaited):
            if store.check([f"confirmed/{own}/{rank}"]):
                awaited.remove(rank)
            elif store.check([f"hello/{rank}"]) and (word := store.get(f"hello/{rank}")) not in answered:
                store.set(f"answer/{word.decode()}", own)
                answered.add(word)
        if awaited and time.monotonic() > deadline:
            raise dist.DistStoreError(f"ranks {sorted(awaited)} have not come within {timeout.total_seconds():.0f} s")
        time.sleep(_POLL_S)
    return own
