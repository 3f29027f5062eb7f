"""Ranks, devices and process groups. Only this module uses Megatron-Core's ``parallel_state``.

A :class:`Topology` is a context manager. It starts ``torch.distributed`` from the variables of the launcher (torchrun,
Slurm, MPI, or none: a world of one). It builds Megatron-Core's groups, and destroys both at the end. Model and trainer
receive the groups and their ranks from it.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass, field
from datetime import timedelta
from types import TracebackType

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_vl.config.schema import ParallelConfig
from megatron_vl.launch import Launch, read_launch
from megatron_vl.parallel.process_group import start_process_group


@dataclass
class Topology:
    """Ranks in the order tensor x data x pipeline.

    Tensor-parallel ranks are neighbors, then come data-parallel ranks, then pipeline stages (Megatron-Core's default
    order). So groups that communicate most stay on one node.
    """

    config: ParallelConfig
    launch: Launch = field(default_factory=read_launch)
    init_method: str | None = None
    """Where the ranks meet, if not where their launcher says."""
    _started: bool = field(default=False, init=False)
    _world_gloo: dist.ProcessGroup | None = field(default=None, init=False)

    def __enter__(self) -> Topology:
        if not dist.is_initialized():
            self._start_process_group()
        config = self.config
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=config.tensor_model_parallel_size,
            pipeline_model_parallel_size=config.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=config.virtual_pipeline_model_parallel_size,
            distributed_timeout_minutes=config.distributed_timeout_minutes,
            create_gloo_process_groups=True,  # a save sends parts of the optimizer over them
        )
        if config.vision_parallel == "data":
            on_cpu = dist.get_backend() != "nccl"
            limit = timedelta(minutes=config.distributed_timeout_minutes)
            self._world_gloo = dist.group.WORLD if on_cpu else dist.new_group(backend="gloo", timeout=limit)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        parallel_state.destroy_model_parallel()
        self._world_gloo = None
        if self._started:
            gc.collect()  # remains of a model may still hold groups
            dist.destroy_process_group()

    def _start_process_group(self) -> None:
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(self.launch.device_index(torch.cuda.device_count()))
        start_process_group(
            "nccl" if cuda else "gloo",
            self.launch,
            init_method=self.init_method,
            timeout=timedelta(minutes=self.config.distributed_timeout_minutes),
        )
        self._started = True

    @property
    def device(self) -> torch.device:
        """The device on which this rank computes."""
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")

    @property
    def groups(self) -> ProcessGroupCollection:
        """Every process group, for the parts of Megatron-Core that take them as an argument."""
        return ProcessGroupCollection.use_mpu_process_groups()

    @property
    def vision_groups(self) -> ProcessGroupCollection:
        """Groups for a vision part that every rank holds whole: tensor and pipeline size 1, data over all ranks."""
        alone, world = self.groups.cp, dist.group.WORLD
        return ProcessGroupCollection(
            tp=alone,
            pp=alone,
            mp=alone,
            cp=alone,
            ep=alone,
            tp_ep_pp=alone,
            expt_dp=alone,
            embd=None,
            pos_embd=None,
            dp=world,
            dp_cp=world,
            intra_dist_opt=world,
        )

    @property
    def world_gloo(self) -> dist.ProcessGroup:
        """All ranks, over gloo; exists under ``vision_parallel data``."""
        assert self._world_gloo is not None
        return self._world_gloo

    @property
    def mp_group(self) -> dist.ProcessGroup:
        """The ranks that hold one replica of the language model, stage by stage: tensor x pipeline."""
        return parallel_state.get_model_parallel_group()

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
        """Number of model chunks on this rank."""
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
