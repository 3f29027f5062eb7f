"""Read rank and world size of this process from its launcher's environment: torchrun, Slurm's srun, or MPI.

These variables are the launchers' own interface and the only part of the environment that decides anything here.
Variables that the GPU libraries read are set, and shown to the user. All of this, and the test for a CUDA device, works
without torch. So a run that cannot work is refused before anything expensive is imported.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from megatron_vl.errors import ConfigError

# Rank, world size and local rank under the names of each launcher, in the order in which they are looked for. Slurm
# sets SLURM_PROCID and SLURM_NTASKS in a batch script's own shell as well; only srun sets the number of step tasks.
_LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
)


@dataclass(frozen=True)
class Launch:
    """Rank, world size and local rank of this process, and whether there is a place to meet."""

    rank: int
    world_size: int
    local_rank: int
    missing: tuple[str, ...] = ()
    """Of MASTER_ADDR and MASTER_PORT, those that are not set although there are peers to meet."""
    meeting_place: str = ""
    """MASTER_ADDR:MASTER_PORT, if there are peers."""
    shows_all_devices: bool = False
    """Whether the launcher (torchrun) shows each rank the devices of its whole machine."""

    def check_meeting_place(self) -> None:
        """Check that the peers can meet, at MASTER_ADDR and MASTER_PORT.

        Raises:
            ConfigError: if there are peers, and one of the two is not set.
        """
        if self.missing:
            raise ConfigError(
                f"{self.world_size} ranks were started, but {' and '.join(self.missing)} is not set: export it (the "
                "first node's name, and a free port there), or start with torchrun"
            )

    def device_index(self, visible: int) -> int:
        """Return the index of this rank's own device among the visible CUDA devices.

        Raises:
            ConfigError: if there are fewer devices than ranks here. One device is accepted if the launcher may have
                given each rank its own.
        """
        if self.local_rank < visible:
            return self.local_rank
        if visible == 1 and not self.shows_all_devices:
            return 0
        raise ConfigError(
            f"rank {self.rank} is number {self.local_rank} on its machine (from 0), which shows it {visible} CUDA "
            f"{'device' if visible == 1 else 'devices'}: start one rank for each device, give each rank one of its "
            'own, or compute on the CPU with CUDA_VISIBLE_DEVICES=""'
        )


def read_launch(environment: Mapping[str, str] | None = None) -> Launch:
    """Return the launch of this process from the launcher's variables; a world of one without a launcher.

    Raises:
        ConfigError: if a variable is not the number that its launcher would have set.
    """
    env = os.environ if environment is None else environment
    for rank, size, local in _LAUNCHERS:
        if rank in env and (world_size := _number(env, size, least=1, default=1)) > 1:
            missing = tuple(name for name in ("MASTER_ADDR", "MASTER_PORT") if not env.get(name))
            if "MASTER_PORT" not in missing:
                _number(env, "MASTER_PORT", least=1, below=2**16)
            own = _number(env, rank, below=world_size)
            place = f"{env.get('MASTER_ADDR')}:{env.get('MASTER_PORT')}"
            here = _number(env, local, below=world_size, default=0)
            # A wrapper of torchrun may have given each rank the device of its own number.
            is_torchrun = rank == "RANK" and "LOCAL_WORLD_SIZE" in env
            shows_all = is_torchrun and env.get("CUDA_VISIBLE_DEVICES") != str(here)
            return Launch(own, world_size, here, missing, place, shows_all)
    return Launch(0, 1, 0)


def _number(
    env: Mapping[str, str], name: str, *, least: int = 0, below: int = 2**31, default: int | None = None
) -> int:
    if name not in env and default is not None:
        return default
    text = env.get(name, "")
    if not (text.isascii() and text.isdigit() and least <= int(text) < below):
        raise ConfigError(
            f"environment variable {name} is {text!r}: expected a whole number from {least} to {below - 1}, as a "
            "launcher sets it; unset it, or start with torchrun, srun or mpirun"
        )
    return int(text)


def set_device_environment(
    *, tensor_parallel: bool, deterministic: bool, environment: MutableMapping[str, str] | None = None
) -> None:
    """Set the variables that CUDA and its libraries read, before torch is imported; keep what the user has set.

    Memory grows in place, since activations differ in size from step to step and fragments would be lost. Under tensor
    parallelism kernels start in the order of their launches, so that collectives overlap with products. Deterministic
    runs require kernels of cuBLAS and Transformer Engine that give the same bits every time. A table in docs/cluster.md
    has them, and those that only a user can set.
    """
    env = os.environ if environment is None else environment
    if "PYTORCH_CUDA_ALLOC_CONF" not in env:  # its older name
        env.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if tensor_parallel:
        env.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if deterministic:
        env.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        env.setdefault("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")


def hide_devices(environment: MutableMapping[str, str] | None = None) -> None:
    """Let this process and its children see no CUDA device. Call it before torch is imported."""
    env = os.environ if environment is None else environment
    env["CUDA_VISIBLE_DEVICES"] = ""


_OF_LIBRARIES = (
    "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_MAX_CONNECTIONS", "CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG",
    "OMP_NUM_THREADS", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF",
)  # fmt: skip
_OF_LIBRARIES_BEGIN = ("NCCL_", "TORCH_NCCL_", "TORCH_FR_", "GLOO_", "NVTE_")


def library_environment(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the variables that are set of those that change how CUDA, NCCL, gloo and OpenMP work, by name."""
    env = os.environ if environment is None else environment
    return {name: env[name] for name in sorted(env) if name in _OF_LIBRARIES or name.startswith(_OF_LIBRARIES_BEGIN)}


@dataclass(frozen=True)
class CudaDriver:
    """What the CUDA driver says of itself, without torch."""

    devices: int = 0
    """Those that this process may use."""
    cuda: tuple[int, int] | None = None
    """The newest CUDA that it supports; None if there is no driver."""
    status: int = 0
    """What it answered to its start (``CUresult``): 0, or 100 where it sees no device, or another error."""


def ask_cuda_driver() -> CudaDriver:
    """Ask the CUDA driver, if there is one. This takes milliseconds and no memory on a device."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return CudaDriver()
    version, count = ctypes.c_int(0), ctypes.c_int(0)
    known = driver.cuDriverGetVersion(ctypes.byref(version)) == 0  # 1000 x major + 10 x minor
    cuda = (version.value // 1000, version.value % 1000 // 10) if known else None
    status = int(driver.cuInit(0)) or int(driver.cuDeviceGetCount(ctypes.byref(count)))
    return CudaDriver(0 if status else count.value, cuda, status)


def has_cuda_device() -> bool:
    """Return whether the CUDA driver, if there is one, sees a device."""
    return ask_cuda_driver().devices > 0
