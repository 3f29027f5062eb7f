"""Each launcher's variables say the same thing, and a batch script's own shell is a world of one."""

from __future__ import annotations

import pytest

from megatron_vl.errors import ConfigError
from megatron_vl.launch import Launch, read_launch, set_device_environment

ADDRESS = {"MASTER_ADDR": "node0", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"},
        {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_NTASKS": "99"},
        {"OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
        {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1"},
        {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"},
    ],
)
def test_launchers(environment: dict[str, str]) -> None:
    launch = read_launch(environment | ADDRESS)
    assert (launch.rank, launch.world_size, launch.local_rank) == (5, 8, 1)
    assert launch.init_method == "env://"


@pytest.mark.parametrize(
    "environment", [{}, {"RANK": "0", "WORLD_SIZE": "1"}, {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}]
)
def test_world_of_one(environment: dict[str, str]) -> None:
    launch = read_launch(environment)
    assert launch == Launch(0, 1, 0)
    assert launch.init_method.startswith("tcp://127.0.0.1:")


def test_peers_need_a_place_to_meet() -> None:
    launch = read_launch({"RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "1"})
    with pytest.raises(ConfigError, match="2 ranks.*MASTER_ADDR is not set"):
        _ = launch.init_method


@pytest.mark.parametrize("tensor_parallel", [False, True])
@pytest.mark.parametrize("deterministic", [False, True])
def test_the_libraries_of_a_gpu_are_told_and_what_is_set_stays(tensor_parallel: bool, deterministic: bool) -> None:
    environment = {"CUBLAS_WORKSPACE_CONFIG": ":16:8"}
    set_device_environment(tensor_parallel=tensor_parallel, deterministic=deterministic, environment=environment)
    expected = {"CUBLAS_WORKSPACE_CONFIG": ":16:8", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    expected |= {"CUDA_DEVICE_MAX_CONNECTIONS": "1"} if tensor_parallel else {}
    assert environment == expected | ({"NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0"} if deterministic else {})
