"""Each launcher's variables say the same thing, and a batch script's own shell is a world of one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_vl.errors import ConfigError
from megatron_vl.launch import Launch, hide_devices, library_environment, read_launch, set_device_environment

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
    launch.check_meeting_place()


@pytest.mark.parametrize(
    "environment", [{}, {"RANK": "0", "WORLD_SIZE": "1"}, {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}]
)
def test_world_of_one(environment: dict[str, str]) -> None:
    launch = read_launch(environment)
    assert launch == Launch(0, 1, 0)
    launch.check_meeting_place()


def test_peers_need_a_place_to_meet() -> None:
    launch = read_launch({"RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "1"})
    with pytest.raises(ConfigError, match="2 ranks.*MASTER_ADDR is not set"):
        launch.check_meeting_place()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"RANK": "x"}, "RANK is 'x'.*from 0 to 1"),
        ({"RANK": "2"}, "RANK is '2'.*from 0 to 1"),
        ({"RANK": "-1"}, "RANK is '-1'"),
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE is 'x'.*unset it, or start with torchrun"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'.*from 1"),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK is ''"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT is 'http'.*from 1 to 65535"),
    ],
)
def test_what_no_launcher_sets_is_refused(changes: dict[str, str], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        read_launch({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"} | ADDRESS | changes)


@pytest.mark.parametrize(("local", "visible", "index"), [(0, 1, 0), (3, 1, 0), (3, 4, 3)])
def test_a_rank_takes_its_own_device(local: int, visible: int, index: int) -> None:
    """A launcher may show each task one device, which is its own whatever the task's number."""
    assert Launch(local, 4, local).device_index(visible) == index


def test_more_ranks_than_devices_are_refused() -> None:
    with pytest.raises(ConfigError, match="rank 5 is number 2 on its machine.*2 CUDA devices"):
        Launch(5, 8, 2).device_index(2)


def test_two_ranks_of_torchrun_do_not_share_the_only_device() -> None:
    """NCCL would refuse it late and in its own words. torchrun sets LOCAL_WORLD_SIZE, and hides no device."""
    meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    first, second = (
        read_launch({"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", **meeting})
        for rank in "01"
    )
    assert first.device_index(1) == 0
    with pytest.raises(ConfigError, match=r"rank 1 is number 1 on its machine.*1 CUDA device: .*CUDA_VISIBLE_DEVICES"):
        second.device_index(1)


def test_a_wrapper_of_torchrun_may_give_each_rank_its_device() -> None:
    meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    ranks = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    assert read_launch(ranks | meeting | {"CUDA_VISIBLE_DEVICES": "1"}).device_index(1) == 0


@pytest.mark.parametrize("tensor_parallel", [False, True])
@pytest.mark.parametrize("deterministic", [False, True])
def test_the_libraries_of_a_gpu_are_told_and_what_is_set_stays(tensor_parallel: bool, deterministic: bool) -> None:
    environment = {"CUBLAS_WORKSPACE_CONFIG": ":16:8"}
    set_device_environment(tensor_parallel=tensor_parallel, deterministic=deterministic, environment=environment)
    expected = {"CUBLAS_WORKSPACE_CONFIG": ":16:8", "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    expected |= {"CUDA_DEVICE_MAX_CONNECTIONS": "1"} if tensor_parallel else {}
    assert environment == expected | ({"NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0"} if deterministic else {})


def test_the_older_name_of_a_variable_counts_as_well() -> None:
    environment = {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512"}
    set_device_environment(tensor_parallel=False, deterministic=False, environment=environment)
    assert environment == {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512"}


def test_the_documentation_lists_what_is_set() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "cluster.md").read_text(encoding="utf-8")
    table = page.partition("| set | when | why |")[2].partition("\n\n")[0]
    environment: dict[str, str] = {}
    set_device_environment(tensor_parallel=True, deterministic=True, environment=environment)
    assert dict(re.findall(r"^\| `(\w+)=(\S+)` \|", table, re.MULTILINE)) == environment


def test_variables_of_libraries_are_shown_and_no_others() -> None:
    ours = {"CUDA_VISIBLE_DEVICES": "", "NCCL_DEBUG": "INFO", "NVTE_X": "1", "OMP_NUM_THREADS": "2"}
    assert library_environment({"HOME": "/", "NCCLX": "1", "RANK": "0"} | ours) == ours


def test_hidden_devices_are_none() -> None:
    environment = {"CUDA_VISIBLE_DEVICES": "0,1"}
    hide_devices(environment)
    assert environment == {"CUDA_VISIBLE_DEVICES": ""}
