"""Where the ranks of a run meet.

A world of one meets nobody: its store is in its own memory. A port would be one more thing to be in use; and torchrun
tells its ranks, by ``TORCHELASTIC_USE_AGENT_STORE``, that torchrun itself serves the store, so that torch would join an
address of our choice as a client, where nobody listens.
"""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist

from megatron_vl.errors import ConfigError
from megatron_vl.launch import Launch


def start_process_group(backend: str, launch: Launch, *, init_method: str | None, timeout: timedelta) -> None:
    """Start ``torch.distributed`` on this rank.

    Args:
        init_method: where the ranks meet, if not where their launcher says.

    Raises:
        ConfigError: there is no place to meet, or it is taken.
    """
    store = None
    if init_method is None:
        launch.check_meeting_place()
        if launch.world_size > 1:
            init_method = "env://"
        else:
            store = dist.HashStore()
    try:
        dist.init_process_group(
            backend,
            init_method=init_method,
            store=store,
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=timeout,
        )
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"rank {launch.rank} of {launch.world_size} cannot meet the others at {launch.meeting_place} (MASTER_ADDR, "
            f"MASTER_PORT): {reason}. If the port is in use, choose another one; else see that the name "
            "is rank 0's machine and can be reached"
        ) from error
