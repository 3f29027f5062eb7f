"""The facts that one rank, or all ranks, have found. Ranks send these records to each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from megatron_vl.launch import CudaDriver, Launch


@dataclass(frozen=True)
class Package:
    """A package as Python finds it here."""

    version: str | None = None
    """None if it is not installed; empty if nothing says its version."""
    error: str = ""
    """Why it cannot be imported; empty if it can."""
    lacks: tuple[str, ...] = ()
    """Parts of it that are not there."""

    @property
    def works(self) -> bool:
        """Whether it is installed, whole and imported."""
        return self.version is not None and not self.error and not self.lacks


@dataclass(frozen=True)
class Device:
    """A CUDA device, as torch sees it."""

    name: str
    memory: int
    """Bytes."""
    capability: tuple[int, int]


@dataclass(frozen=True)
class Torch:
    """How torch was built, and the devices that it can use."""

    cuda: str | None = None
    """The version of CUDA that it was built for; None for a CPU build."""
    devices: tuple[Device, ...] = ()
    error: str = ""
    """Why a CUDA build sees no device."""
    architectures: tuple[str, ...] = ()
    """As ``torch.cuda.get_arch_list`` names them: ``sm_90``, ``compute_90``."""
    nccl: str = ""
    """Version; empty if the build has none."""
    compiles: bool = False
    """Whether it can compile kernels for CUDA."""


@dataclass(frozen=True)
class Driver:
    """NVIDIA's driver of this machine."""

    cuda: CudaDriver = CudaDriver()
    release: str = ""
    """As ``570.86.10``; empty if there is no driver."""
    devices: int = 0
    """Devices of the machine, whether this process may use them or not."""


@dataclass(frozen=True)
class Limits:
    """What this process may use of its machine."""

    cores: int
    cores_of_machine: int
    memory: int | None
    """Bytes; None where the system does not say."""
    memory_of_machine: int | None
    open_files: tuple[int, int]
    """Soft and hard limit; -1 for no limit."""
    shared_memory: tuple[int, int] | None
    """Size and free bytes of /dev/shm; None if there is none."""


@dataclass(frozen=True)
class Folder:
    """A folder to write to."""

    path: Path
    free: int = 0
    size: int = 0
    error: str = ""
    """What writing, fsync or rename there was refused with."""


@dataclass(frozen=True)
class Address:
    """What a name of a machine is resolved to."""

    name: str
    addresses: tuple[str, ...] = ()
    error: str = ""
    is_here: bool = False
    """Whether one of the addresses belongs to this machine."""


@dataclass(frozen=True)
class Facts:
    """What one rank has found."""

    launch: Launch
    host: str
    python: tuple[int, int, int]
    packages: Mapping[str, Package]
    """By the name of the distribution; see ``packages.py``."""
    torch: Torch
    driver: Driver
    limits: Limits
    folder: Folder
    own_name: Address
    master: Address | None = None
    """MASTER_ADDR, if there are peers."""
    environment: Mapping[str, str] = field(default_factory=dict)

    def package(self, name: str) -> Package:
        """Return the facts of a package, which may be that it is absent."""
        return self.packages.get(name, Package())

    @property
    def computes_on_cuda(self) -> bool:
        return bool(self.torch.devices)


@dataclass(frozen=True)
class Link:
    """Two ranks that are neighbors, and what goes between them."""

    ranks: tuple[int, int]
    rate: float
    """Bytes a second in one direction."""


@dataclass(frozen=True)
class Rates:
    """What one rank has measured with the others."""

    all_reduce: float = 0.0
    """Bus bandwidth in bytes a second: 2 (n - 1) / n of the bytes of the tensor, divided by the time."""
    links: tuple[Link, ...] = ()
    """Those that this rank has timed."""
    error: str = ""


@dataclass(frozen=True)
class Clock:
    """The clock of a rank compared with that of rank 0, in seconds."""

    rank: int
    ahead: float
    bound: float
    """Half the round trip: the largest error of ``ahead``."""


@dataclass(frozen=True)
class Group:
    """What all ranks have found together."""

    ranks: tuple[Facts, ...]
    """By rank; only this rank's if the ranks have not met."""
    backend: str = ""
    bytes: int = 0
    """Size of the tensor that was reduced."""
    rates: tuple[Rates, ...] = ()
    clocks: tuple[Clock, ...] = ()
    error: str = ""
    """Why the ranks could not meet, or what ended their exchange."""
