"""Devices, memory, disk, limits and names of one machine: facts in, findings out."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from megatron_vl.doctor.facts import Address, Device, Facts
from megatron_vl.doctor.findings import Finding, missing, ok, wrong
from megatron_vl.errors import ConfigError

GIB = 2**30
_NO_DEVICE, _STUB = 100, 34
"""``CUresult``: no device is visible; libcuda is the one to link against, without a driver."""
_LEAST_SHARED = 1 * GIB
"""What NCCL's troubleshooting guide gives a container (``--shm-size=1g``)."""
_LEAST_DISK = 1 * GIB
_CHECKPOINT_7B = 9_655_886_592 * 14
"""Bytes, calculated: 2 for a weight in bf16, and 12 for its master and moments."""
_FILES, _FILES_A_RANK = 256, 8
"""Files of a run by itself, and sockets to each other rank: one for each group of gloo that both are in, and more for
NCCL. A generous estimate."""
_OF_VARIABLES = {
    "NCCL_P2P_DISABLE": "if 1, GPUs of a machine exchange through its memory, which is slow",
    "NCCL_SHM_DISABLE": "if 1, GPUs of a machine may exchange over the network, which is slow",
    "NCCL_IB_DISABLE": "if 1, machines exchange over TCP, which is slow",
    "CUDA_LAUNCH_BLOCKING": "if 1, the CPU waits for each kernel, which is slow",
    "CUDA_DEVICE_MAX_CONNECTIONS": "tensor parallelism wants 1, which tools/train.py sets where it is not set",
}


def judge_machine(facts: Facts) -> list[Finding]:
    """Return the findings of one machine, as one rank sees it."""
    findings = [*judge_devices(facts), _cores(facts), _memory(facts), _folder(facts), _open_files(facts)]
    findings += [*_shared_memory(facts), *judge_names(facts)]
    for name, value in facts.environment.items():
        remark = f" ({_OF_VARIABLES[name]})" if name in _OF_VARIABLES else ""
        findings.append(ok(name, f"{value or 'empty'}{remark}"))
    return findings


def judge_devices(facts: Facts) -> list[Finding]:
    """Return the findings of the CUDA devices, their driver, and what torch can do with them."""
    torch = facts.torch
    if not torch.devices:
        return [*_driver(facts), *([_no_device(facts)] if facts.package("torch").works else [])]
    kinds = Counter((device.name, device.memory, device.capability) for device in torch.devices)
    told = ", ".join(
        f"{number} x {name} ({memory / GIB:.0f} GiB, sm_{capability[0]}{capability[1]})"
        for (name, memory, capability), number in kinds.items()
    )
    findings = [*_driver(facts), ok("CUDA devices", told)]
    unsupported = [device for device in torch.devices if not supports(torch.architectures, device)]
    if unsupported:
        built = " ".join(torch.architectures)
        found = f"this torch has no kernels for {unsupported[0].name} (built for {built})"
        findings.append(wrong("architecture", found, "install a build of torch that supports the device"))
    if torch.nccl:
        findings.append(ok("NCCL", torch.nccl))
    else:
        findings.append(
            wrong("NCCL", "this torch has none", "install a build of torch with NCCL: ranks on GPUs need it")
        )
    try:
        facts.launch.device_index(len(torch.devices))
    except ConfigError as error:
        findings.append(wrong("device of the rank", str(error), ""))
    return findings


def supports(architectures: Sequence[str], device: Device) -> bool:
    """Return whether a build of torch has code for a device, or code from which the driver can make it.

    Machine code (``sm_80``) runs on the same major version from its minor version on, and PTX (``compute_80``) on all
    newer devices. A suffix limits it to one version (``a``) or to its family (``f``): CUDA's programming guide,
    "Compute capability". Without any architecture nothing is known, and nothing is held against the device.
    """
    for name in architectures:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", name)
        if match is None:
            continue
        kind, built, suffix = match[1], (int(match[2]), int(match[3])), match[4]
        same_major = built[0] == device.capability[0]
        if suffix == "a":
            fits = built == device.capability
        else:
            fits = built <= device.capability and (same_major or (kind == "compute" and not suffix))
        if fits:
            return True
    return not architectures


def _driver(facts: Facts) -> list[Finding]:
    driver = facts.driver
    if driver.cuda.cuda is None and not driver.release:
        return []
    newest = driver.cuda.cuda
    told = f"for CUDA up to {newest[0]}.{newest[1]}" if newest else "no libcuda.so.1 for this process"
    return [ok("driver", f"{driver.release or 'of unknown version'}, {told}")]


def _no_device(facts: Facts) -> Finding:
    name, driver, torch = "CUDA devices", facts.driver, facts.torch
    if driver.cuda.devices and torch.cuda is None:
        found = f"the driver sees {driver.cuda.devices}, but this torch is a CPU build, and training would use the CPU"
        return wrong(name, found, 'install a CUDA build of torch, or hide the devices with CUDA_VISIBLE_DEVICES=""')
    if driver.cuda.devices:
        newest, built = driver.cuda.cuda, tuple(int(part) for part in re.findall(r"\d+", torch.cuda or "")[:2])
        found = f"the driver sees {driver.cuda.devices}, but torch uses none ({torch.error or 'it does not say why'})"
        advice = "see what nvidia-smi says, and that torch and driver belong together"
        if newest is not None and newest < built:
            advice = f"update the driver, or install a torch built for CUDA {newest[0]}.{newest[1]}"
        return wrong(name, found, advice)
    if driver.release and driver.cuda.status not in (0, _NO_DEVICE, _STUB):
        found = f"the driver does not start (CUresult {driver.cuda.status})"
        return wrong(name, found, "see what nvidia-smi says; after an update of the driver, restart the machine")
    gives = "one would allow training at the published sizes; everything runs on a CPU too"
    if driver.devices:
        hidden = "CUDA_VISIBLE_DEVICES" in facts.environment
        why = (
            "CUDA_VISIBLE_DEVICES hides them"
            if hidden
            else "docker run --gpus all, or srun --gpus-per-node, shows them"
        )
        return missing(name, f"none for this process, and {driver.devices} of the machine ({why})", gives)
    return missing(name, "none", gives)


def _cores(facts: Facts) -> Finding:
    cores, of_machine = facts.limits.cores, facts.limits.cores_of_machine
    return ok("cores", f"{cores}" if cores == of_machine else f"{cores} of the machine's {of_machine}")


def _memory(facts: Facts) -> Finding:
    memory, of_machine = facts.limits.memory, facts.limits.memory_of_machine
    if memory is None:
        return ok("memory", "the system does not say")
    limit = f", a limit of the container or job; the machine has {gib(of_machine)}" if memory != of_machine else ""
    return ok("memory", gib(memory) + limit)


def _folder(facts: Facts) -> Finding:
    folder, name = facts.folder, "disk"
    if folder.error:
        return wrong(
            name, f"{folder.path}: {folder.error}", "choose another --path, or make it a folder you can write to"
        )
    room = f"{folder.path}: {gib(folder.free)} free of {gib(folder.size)}"
    if folder.free < _LEAST_DISK:
        return wrong(name, room, "free some space, or choose another --path: no run fits")
    small = f" (a checkpoint of qwen_vl_7b in bf16 takes {_CHECKPOINT_7B / 1e9:.0f} GB)"
    return ok(name, f"{room}; write, fsync and rename work{small if folder.free < _CHECKPOINT_7B else ''}")


def _open_files(facts: Facts) -> Finding:
    soft, hard = facts.limits.open_files
    told = f"soft limit {_limit(soft)}, hard limit {_limit(hard)}"
    least = _FILES + _FILES_A_RANK * facts.launch.world_size
    if soft < 0 or soft >= least:
        return ok("open files", told)
    if hard < 0 or hard >= least:
        advice = f"ulimit -n {max(least, min(hard, 2**16)) if hard > 0 else 2**16} before the start"
    else:
        advice = f"ask for a hard limit of {least} or more (limits.conf, or docker run --ulimit nofile=65536)"
    return wrong("open files", f"{told}; {facts.launch.world_size} ranks need about {least}", advice)


def _limit(value: int) -> str:
    return "none" if value < 0 else str(value)


def _shared_memory(facts: Facts) -> list[Finding]:
    """Of this project nothing uses it. NCCL does, between the GPUs of a machine."""
    if facts.limits.shared_memory is None:
        return []
    size, free = facts.limits.shared_memory
    told = f"{gib(free)} free of {gib(size)}"
    if free >= _LEAST_SHARED:
        return [ok("/dev/shm", told)]
    if len(facts.torch.devices) > 1:
        advice = "NCCL ends with a bus error or 'No space left on device' where it is full: docker run --ipc=host (or "
        return [wrong("/dev/shm", told, advice + "--shm-size=1g); docker's default is 64 MiB")]
    return [
        ok("/dev/shm", f"{told}; enough here, but several GPUs need 1 GiB: docker run --ipc=host, or --shm-size=1g")
    ]


def judge_names(facts: Facts) -> list[Finding]:
    """Return the findings of MASTER_ADDR and of the machine's own name, if there are peers."""
    master = facts.master
    if master is None:
        return []
    own = facts.own_name
    if master.error:
        where = f"{master.name} cannot be resolved on {facts.host} ({master.error})"
        return [wrong("MASTER_ADDR", where, "export the first node's name or address, as the other nodes know it")]
    findings = [ok("MASTER_ADDR", f"{master.name} is {' '.join(master.addresses)}")]
    if not master.is_here and is_out_of_reach(facts):
        found = f"{own.name} is {' '.join(own.addresses) or 'no address'} here, which no other machine reaches"
        findings.append(wrong("own name", found, OUT_OF_REACH))
    return findings


OUT_OF_REACH = "correct /etc/hosts, or export GLOO_SOCKET_IFNAME (the name of the network interface)"
"""What to do where gloo has no other address than the loopback."""


def is_out_of_reach(facts: Facts) -> bool:
    """Return whether gloo would listen where no other machine reaches it, although the ranks meet elsewhere.

    It listens at the address of the machine's own name, and at the loopback if that name has none
    (``c10d/GlooDeviceFactory.hpp`` of torch).
    """
    if facts.master is None or _is_loopback(facts.master) or "GLOO_SOCKET_IFNAME" in facts.environment:
        return False
    return _is_loopback(facts.own_name)


def _is_loopback(address: Address) -> bool:
    return all(one.startswith("127.") or one == "::1" for one in address.addresses)


def gib(size: int | None) -> str:
    """Return bytes in GiB."""
    return "unknown" if size is None else f"{size / GIB:.1f} GiB"
