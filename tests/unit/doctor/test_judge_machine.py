"""What follows from devices, limits, disks and names that are not as a training needs them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_vl.config.presets import PRESETS
from megatron_vl.doctor.facts import Address, Device, Driver, Facts, Folder, Package, Torch
from megatron_vl.doctor.findings import Kind
from megatron_vl.doctor.judge_machine import _CHECKPOINT_7B, judge_machine, supports
from megatron_vl.launch import CudaDriver, Launch
from megatron_vl.planning.parameters import count_parameters
from tests.unit.doctor.made_up import GIB, H100, LAPTOP, NODE, only, with_limits, with_packages

OK, MISSING, WRONG = Kind
CUDA_BUILD = Torch("13.0", error="no CUDA-capable device is detected")


def test_a_laptop_lacks_only_a_device() -> None:
    worse = [finding for finding in judge_machine(LAPTOP) if finding.kind > OK]
    assert [(finding.name, finding.kind) for finding in worse] == [("CUDA devices", MISSING)]


def test_a_node_lacks_nothing() -> None:
    findings = judge_machine(NODE)
    assert {finding.kind for finding in findings} == {OK}
    assert only(findings, "CUDA devices").found == "8 x NVIDIA H100 (80 GiB, sm_90)"
    assert only(findings, "driver").found == "590.44.01, for CUDA up to 13.1"
    assert only(findings, "NCCL").found == "2.29.2"


@pytest.mark.parametrize(
    ("torch", "driver", "kind", "said", "advice"),
    [
        (Torch(), Driver(CudaDriver(2, (13, 0))), WRONG, "driver sees 2, but this torch is a CPU build", "CUDA build"),
        (CUDA_BUILD, Driver(CudaDriver(2, (12, 4))), WRONG, "torch uses none (no CUDA", "torch built for CUDA 12.4"),
        (CUDA_BUILD, Driver(CudaDriver(2, (13, 0))), WRONG, "torch uses none (no CUDA-capable", "nvidia-smi"),
        (CUDA_BUILD, Driver(CudaDriver(0, None, 803), "590.1"), WRONG, "does not start (CUresult 803)", "restart"),
        (CUDA_BUILD, Driver(CudaDriver(0, (13, 0), 100), "590.1", 8), MISSING, "8 of the machine (docker", "CPU too"),
        (CUDA_BUILD, Driver(CudaDriver(0, (13, 0), 34)), MISSING, "none", "CPU too"),
        (Torch(), Driver(CudaDriver(0, None, 999)), MISSING, "none", "CPU too"),
    ],
    ids=("CPU build", "old driver", "unlike", "stopped", "hidden", "stub", "no driver"),
)  # fmt: skip
def test_no_device(torch: Torch, driver: Driver, kind: Kind, said: str, advice: str) -> None:
    found = only(judge_machine(replace(LAPTOP, torch=torch, driver=driver)), "CUDA devices")
    assert found.kind == kind and said in found.found and advice in found.advice


def test_devices_that_a_variable_hides_are_not_wrong() -> None:
    driver = Driver(CudaDriver(0, (13, 0), 100), "590.1", 8)
    found = only(
        judge_machine(replace(LAPTOP, driver=driver, environment={"CUDA_VISIBLE_DEVICES": ""})), "CUDA devices"
    )
    assert found.kind == MISSING and "CUDA_VISIBLE_DEVICES hides them" in found.found


def test_nothing_is_said_of_devices_where_torch_does_not_work() -> None:
    facts = with_packages(LAPTOP, torch=Package("2.13.0", "OSError"))
    assert "CUDA devices" not in [finding.name for finding in judge_machine(facts)]


@pytest.mark.parametrize(
    ("architectures", "capability", "fits"),
    [
        (("sm_80", "sm_90"), (9, 0), True),
        (("sm_80",), (8, 6), True),  # machine code runs on later minor versions
        (("sm_86",), (8, 0), False),
        (("sm_80", "sm_90"), (10, 0), False),
        (("sm_80", "compute_90"), (10, 0), True),  # PTX is compiled for later devices
        (("compute_120",), (9, 0), False),
        (("sm_90a",), (9, 0), True),
        (("sm_100a",), (10, 3), False),
        (("sm_100f",), (10, 3), True),
        (("compute_90a",), (10, 0), False),
        (("gfx942",), (9, 0), False),
        ((), (9, 0), True),  # nothing is known
    ],
)
def test_code_for_a_device(architectures: tuple[str, ...], capability: tuple[int, int], fits: bool) -> None:
    assert supports(architectures, Device("x", GIB, capability)) == fits


def test_a_torch_without_code_for_the_device_or_without_nccl_is_wrong() -> None:
    facts = replace(NODE, torch=replace(NODE.torch, architectures=("sm_120",), nccl=""))
    findings = judge_machine(facts)
    assert only(findings, "architecture").found == "this torch has no kernels for NVIDIA H100 (built for sm_120)"
    assert only(findings, "architecture").kind == only(findings, "NCCL").kind == WRONG


def test_two_ranks_on_one_device_are_wrong() -> None:
    launch = Launch(1, 2, 1, shows_all_devices=True)
    found = only(
        judge_machine(replace(NODE, torch=replace(NODE.torch, devices=(H100,)), launch=launch)), "device of the rank"
    )
    assert found.kind == WRONG and "start one rank for each device" in found.found


def test_limits_of_a_container_are_told() -> None:
    findings = judge_machine(
        with_limits(LAPTOP, cores=2, cores_of_machine=64, memory=8 * GIB, memory_of_machine=64 * GIB)
    )
    assert only(findings, "cores").found == "2 of the machine's 64"
    assert only(findings, "memory").found == "8.0 GiB, a limit of the container or job; the machine has 64.0 GiB"


@pytest.mark.parametrize(
    ("folder", "kind", "said"),
    [
        (Folder(Path("runs"), 0, 0, "Read-only file system"), WRONG, "runs: Read-only file system"),
        (Folder(Path("runs"), GIB - 1, 9 * GIB), WRONG, "runs: 1.0 GiB free of 9.0 GiB"),
        # 9,655,886,592 parameters x 14 bytes = 135.2e9 bytes = 125.9 GiB
        (Folder(Path("runs"), 125 * GIB, 900 * GIB), OK, "(a checkpoint of qwen_vl_7b in bf16 takes 135 GB)"),
        (Folder(Path("runs"), 126 * GIB, 900 * GIB), OK, "write, fsync and rename work"),
    ],
)
def test_disk(folder: Folder, kind: Kind, said: str) -> None:
    found = only(judge_machine(replace(LAPTOP, folder=folder)), "disk")
    assert found.kind == kind and found.found.endswith(said)


def test_the_size_of_a_checkpoint_is_that_of_the_preset() -> None:
    parameters = sum(count_parameters(PRESETS["qwen_vl_7b"]).values())
    assert 14 * parameters == _CHECKPOINT_7B


@pytest.mark.parametrize(
    ("limits", "world_size", "kind", "advice"),
    [
        ((1024, 4096), 96, OK, ""),  # 256 + 8 x 96 = 1024
        ((1024, 4096), 97, WRONG, "ulimit -n 4096 before"),
        ((1024, -1), 97, WRONG, "ulimit -n 65536 before"),
        ((1024, 1024), 97, WRONG, "--ulimit nofile=65536"),
        ((-1, -1), 10_000, OK, ""),
        ((256, 256), 1, WRONG, "limits.conf"),
    ],
)
def test_open_files(limits: tuple[int, int], world_size: int, kind: Kind, advice: str) -> None:
    facts = replace(with_limits(LAPTOP, open_files=limits), launch=Launch(0, world_size, 0))
    found = only(judge_machine(facts), "open files")
    assert found.kind == kind and advice in found.advice


def test_small_shared_memory_is_wrong_where_gpus_exchange_over_it() -> None:
    small = (GIB // 16, GIB // 16)
    found = only(judge_machine(with_limits(NODE, shared_memory=small)), "/dev/shm")
    assert found.kind == WRONG and "docker run --ipc=host" in found.advice and "64 MiB" in found.advice
    one = replace(NODE, torch=replace(NODE.torch, devices=(H100,)))
    for facts in (LAPTOP, one):
        assert only(judge_machine(with_limits(facts, shared_memory=small)), "/dev/shm").kind == OK
    assert only(judge_machine(with_limits(NODE, shared_memory=(2 * GIB, GIB))), "/dev/shm").kind == OK
    assert "/dev/shm" not in [finding.name for finding in judge_machine(with_limits(NODE, shared_memory=None))]


def test_variables_are_listed_where_they_are_set() -> None:
    variables = {"OMP_NUM_THREADS": "4", "NCCL_P2P_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""}
    findings = judge_machine(replace(NODE, environment=variables))
    assert only(findings, "OMP_NUM_THREADS").found == "4"
    assert only(findings, "CUDA_VISIBLE_DEVICES").found == "empty"
    assert only(findings, "NCCL_P2P_DISABLE").found.startswith("1 (if 1, GPUs of a machine exchange through its memory")


def _in_a_group(master: Address, own: Address, environment: dict[str, str] | None = None) -> Facts:
    launch = Launch(8, 16, 0)
    return replace(NODE, host="b", launch=launch, master=master, own_name=own, environment=environment or {})


LOCAL = Address("b", ("127.0.1.1",), is_here=True)
FIRST_NODE = Address("a", ("10.0.0.1",))


def test_a_master_that_cannot_be_resolved_is_wrong() -> None:
    facts = _in_a_group(Address("nod1", error="Name or service not known"), LOCAL)
    found = only(judge_machine(facts), "MASTER_ADDR")
    assert found.kind == WRONG and found.found == "nod1 cannot be resolved on b (Name or service not known)"


@pytest.mark.parametrize(
    ("master", "own", "environment", "is_wrong"),
    [
        (FIRST_NODE, LOCAL, {}, True),  # Debian's /etc/hosts
        (FIRST_NODE, Address("b", error="Name or service not known"), {}, True),
        (FIRST_NODE, LOCAL, {"GLOO_SOCKET_IFNAME": "eth0"}, False),
        (FIRST_NODE, Address("b", ("10.0.0.2",), is_here=True), {}, False),
        (Address("b", ("10.0.0.2",), is_here=True), LOCAL, {}, False),  # one machine
        (Address("localhost", ("127.0.0.1", "::1"), is_here=True), LOCAL, {}, False),
    ],
)
def test_an_own_name_that_no_other_machine_reaches_is_wrong(
    master: Address, own: Address, environment: dict[str, str], is_wrong: bool
) -> None:
    findings = judge_machine(_in_a_group(master, own, environment))
    assert ("own name" in [finding.name for finding in findings if finding.kind == WRONG]) == is_wrong
    assert only(findings, "MASTER_ADDR").kind == OK
