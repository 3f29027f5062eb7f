"""The device of a part: its clock, its memory, its peak, and what machine this is."""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from statistics import median

import torch
from torch import Tensor

# Dense bf16 of the data sheets, in operations a second; the first name that is in the device's name counts.
_PEAKS = (
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("GH200", 989e12),
    ("H200", 989e12),
    ("H100", 989e12),
    ("GB200", 2500e12),
    ("B200", 2250e12),
    ("A100", 312e12),
    ("L40S", 362e12),
)
_PACKAGES = ("megatron-core", "transformer-engine", "flash-attn", "apex", "triton", "numpy")


def current_device() -> torch.device:
    """The first GPU, or the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def synchronize() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(function: Callable[[], object], *, repeat: int, warm_up: int = 2) -> list[float]:
    """Wall-clock seconds of each call, the device waited for before and after."""
    times = []
    for number in range(warm_up + repeat):
        synchronize()
        began = time.perf_counter()
        function()
        synchronize()
        if number >= warm_up:
            times.append(time.perf_counter() - began)
    return times


def median_ms(function: Callable[[], object], *, repeat: int, warm_up: int = 2) -> float:
    """The median of :func:`seconds_of`, in milliseconds."""
    return 1e3 * median(seconds_of(function, repeat=repeat, warm_up=warm_up))


def peak_flops() -> tuple[float, str]:
    """Operations a second that count as all of the device, and where the number is from."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        for part, peak in _PEAKS:
            if part in name:
                return peak, "data sheet"
    return _measured_peak(), "largest product measured"


def memory_bytes() -> int:
    """Memory of the device that is free now; on a CPU a token amount, nothing is sized there."""
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0


def describe_device() -> list[str]:
    """Lines that say what the figures are of."""
    packages = ", ".join(f"{name} {_version(name)}" for name in _PACKAGES)
    lines = [f"packages: torch {torch.__version__}, {packages}"]
    if not torch.cuda.is_available():
        return ["device: CPU (small sizes; says nothing about a GPU)", *lines]
    properties = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info()
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return [
        f"device: {properties.name}, {properties.multi_processor_count} multiprocessors, {total / 2**30:.1f} GiB "
        f"({free / 2**30:.1f} free), capability {properties.major}.{properties.minor}",
        f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, NCCL {nccl}",
        *lines,
    ]


def _measured_peak() -> float:
    side = 8192 if torch.cuda.is_available() else 256
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    left, right = (torch.randn(side, side, device=current_device(), dtype=dtype) for _ in range(2))
    milliseconds = median_ms(lambda: left @ right, repeat=5)
    return 2 * side**3 / milliseconds * 1e3


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def norm_scaled(tensor: Tensor) -> Tensor:
    """Random numbers like ``tensor``, small enough that gradients of them stay ordinary."""
    return torch.randn_like(tensor) * 1e-3
