"""Where things run: start-up of the process group, and the only door to Megatron-Core's ``parallel_state``.

A :class:`Topology` is a context manager. It starts ``torch.distributed`` from whatever launched the process (torchrun,
Slurm, MPI, or nothing at all: a world of one), builds Megatron-Core's groups, and takes both down at the end. Model
and trainer receive the groups from it; nobody else asks who or where it is.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, field
from datetime import timedelta
from types import TracebackType

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_vl.config.schema import ParallelConfig
from megatron_vl.errors import ConfigError


@dataclass(frozen=True)
class Launch:
    """Who this process is among its peers, as told by the launcher."""

    rank: int
    world_size: int
    local_rank: int
    init_method: str


# Rank, world size and local rank under the names of each launcher, in the order in which they are looked for.
_LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
)


def read_launch(environment: dict[str, str] | None = None) -> Launch:
    """Find out who this process is from the launcher's variables; a world of one without a launcher.

    Raises:
        ConfigError: more than one rank, and no MASTER_ADDR or MASTER_PORT to meet at.
    """
    env = dict(os.environ) if environment is None else environment
    for rank, size, local in _LAUNCHERS:
        if rank in env and int(env.get(size, "1")) > 1:
            for name in ("MASTER_ADDR", "MASTER_PORT"):
                if name not in env:
                    raise ConfigError(
                        f"{size}={env[size]} ranks were started, but {name} is not set: export it (the first node's "
                        "name, and a free port there), or start with torchrun"
                    )
            return Launch(int(env[rank]), int(env[size]), int(env.get(local, "0")), "env://")
    return Launch(0, 1, 0, f"tcp://127.0.0.1:{_free_port()}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass
class Topology:
    """Ranks laid out as tensor x pipeline x data.

    Tensor-parallel ranks are neighbours, then come data-parallel ranks, then pipeline stages (Megatron-Core's default
    order), so that the chattiest groups stay within a node.
    """

    config: ParallelConfig
    launch: Launch = field(default_factory=read_launch)
    _started: bool = field(default=False, init=False)

    def __enter__(self) -> Topology:
        if not dist.is_initialized():
            self._start_process_group()
        config = self.config
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=config.tensor_model_parallel_size,
            pipeline_model_parallel_size=config.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=config.virtual_pipeline_model_parallel_size,
            distributed_timeout_minutes=config.distributed_timeout_minutes,
            create_gloo_process_groups=torch.cuda.is_available(),
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        parallel_state.destroy_model_parallel()
        if self._started:
            dist.destroy_process_group()

    def _start_process_group(self) -> None:
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(self.launch.local_rank)
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            init_method=self.launch.init_method,
            rank=self.launch.rank,
            world_size=self.launch.world_size,
            timeout=timedelta(minutes=self.config.distributed_timeout_minutes),
        )
        self._started = True

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")

    @property
    def groups(self) -> ProcessGroupCollection:
        """Every process group, for the parts of Megatron-Core that take them as an argument."""
        return ProcessGroupCollection.use_mpu_process_groups()

    @property
    def world_size(self) -> int:
        return dist.get_world_size()

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def tp_rank(self) -> int:
        return parallel_state.get_tensor_model_parallel_rank()

    @property
    def tp_size(self) -> int:
        return parallel_state.get_tensor_model_parallel_world_size()

    @property
    def pp_rank(self) -> int:
        return parallel_state.get_pipeline_model_parallel_rank()

    @property
    def pp_size(self) -> int:
        return parallel_state.get_pipeline_model_parallel_world_size()

    @property
    def vp_size(self) -> int:
        """Model chunks on this rank."""
        return self.config.virtual_pipeline_model_parallel_size or 1

    @property
    def dp_rank(self) -> int:
        return parallel_state.get_data_parallel_rank()

    @property
    def dp_size(self) -> int:
        return parallel_state.get_data_parallel_world_size()

    @property
    def tp_group(self) -> dist.ProcessGroup:
        return parallel_state.get_tensor_model_parallel_group()

    @property
    def pp_group(self) -> dist.ProcessGroup:
        return parallel_state.get_pipeline_model_parallel_group()

    @property
    def dp_group(self) -> dist.ProcessGroup:
        return parallel_state.get_data_parallel_group()

    @property
    def tp_source(self) -> int:
        """Global rank of the first rank of this tensor-parallel group."""
        return parallel_state.get_tensor_model_parallel_src_rank()

    @property
    def pp_last(self) -> int:
        """Global rank of the last stage of this rank's pipeline."""
        return parallel_state.get_pipeline_model_parallel_last_rank()

    @property
    def on_last_stage(self) -> bool:
        """Whether this rank holds the head."""
        return self.pp_rank == self.pp_size - 1
