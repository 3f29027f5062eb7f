"""What the GPUs of a plan reach: memory, rates, and the links between them.

Nothing here was measured on the machine that a plan is for. Rates are published maxima, so a plan is a lower bound of
the time of a step. ``--measured FILE`` replaces them by rates of the user's own machine (:class:`MeasuredRates`). A
profile of a training gives no rates but times of stages; ``calibration.py`` makes a factor for each part of them.

Sources:

* peak, memory size and memory bandwidth: NVIDIA's data sheets of A100-80 SXM, H100 SXM, H200 SXM, B200 and GB200;
* matrix products: the highest rate that was measured for any shape in bf16 (maximum achievable matmul FLOPS, Stas
  Bekman's "Machine Learning Engineering", chapter on accelerators): 271.2 TFLOP/s of an A100, 794.5 of an H100, 1,745
  of a B200. An H200 has the matrix units of an H100;
* collectives: the same book's measurements of 8 H200: all-gather 361 and reduce-scatter 363 GB/s of the 450 GB/s of
  NVLink (80 %), network cards 36.5 of 50 GB/s (73 %). Their latency follows from its times of small messages: an
  all-reduce of 16 MiB moves 255 GB/s on 8 B200, which is 80 microseconds more than its bytes need, and 64 GB/s on four
  nodes, 420 microseconds more. An all-reduce counts as two collectives here;
* memory: 90 % of the data sheet. A copy reached 87 % on the H200 of docs/results/gpu.md;
* the CPU: 5 milliseconds to launch forward and backward of a layer, the lower end of what docs/results/gpu.md measured.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from megatron_vl.config.records import Between, Builder
from megatron_vl.config.schema import TrainingConfig
from megatron_vl.config.suggestions import suggestion_or_list
from megatron_vl.errors import ConfigError
from megatron_vl.planning.stage_profile import StageProfile

TERA, GIGA = 1e12, 1e9
_MEMORY_REACHED, _NVLINK_REACHED, _NETWORK_REACHED = 0.90, 0.80, 0.73
_HOST_SECONDS = 5e-3

Rate = Annotated[float, Between(above=0)]


@dataclass(frozen=True)
class Link:
    """A connection, as one GPU sees it."""

    bandwidth: float
    """Bytes per second in one direction, as collectives reach it."""
    latency: float
    """Seconds of an all-gather or a reduce-scatter without content, or of a message."""

    def seconds(self, num_bytes: float, messages: float = 1) -> float:
        """Return the time of ``messages`` that move ``num_bytes`` together."""
        return num_bytes / self.bandwidth + messages * self.latency if num_bytes else 0.0


@dataclass(frozen=True)
class Slowness:
    """How many times as long as the rates say the passes of a part take."""

    forward: float = 1.0
    backward: float = 1.0


@dataclass(frozen=True)
class PartFactors:
    """The slowness of each part of the model; 1 where nothing was measured. Collectives and messages have none."""

    vision: Slowness = Slowness()
    """Vision tower and resampler."""
    language: Slowness = Slowness()
    """Layers of the language model."""
    head: Slowness = Slowness()
    """Final norm, output layer and loss."""


AS_RATED = PartFactors()
"""No part is slower than the rates say."""


@dataclass(frozen=True)
class Gpu:
    """One GPU and its links."""

    name: str
    memory: float
    """Bytes, as the data sheet gives them: 80 GB are 80e9. The device shows a little more."""
    peak: float
    """Dense bf16 FLOP/s of the data sheet, to which MFU refers."""
    products: float
    """FLOP/s that matrix products reach."""
    attention: float
    """FLOP/s that fused attention reaches."""
    memory_rate: float
    """Bytes per second that element-wise kernels reach."""
    nvlink: Link
    network: Link
    per_node: int = 8
    """GPUs of a host."""
    nvlink_domain: int = 8
    """GPUs that NVLink connects."""
    host_seconds: float = _HOST_SECONDS
    """Time that the CPU takes to launch forward and backward of one layer; a layer takes no less."""
    fp8: tuple[str, ...] = ()
    """``training.fp8_recipe`` that it computes (docs/fp8.md)."""
    overlaps: bool = True
    """Whether a collective can run beside products."""
    factors: PartFactors = AS_RATED
    """What a profile has found of each part."""
    assumed: tuple[str, ...] = ()
    """What no published measurement supports."""

    def within(self, num_gpus: int) -> Gpu:
        """Return this GPU with the NVLink domain that a job of ``num_gpus`` can count on.

        A rack of 72 holds no power of two but 64, so larger jobs are planned with 64 of each rack.
        """
        domain = 64 if self.nvlink_domain == 72 and num_gpus > 72 else self.nvlink_domain
        return replace(self, nvlink_domain=domain)


@dataclass(frozen=True)
class MeasuredRates:
    """The file of ``--measured``: rates of the user's own machine, each of them optional."""

    matmul_tflops: Rate | None = None
    """TFLOP/s of the model's matrix products, forward and backward."""
    attention_tflops: Rate | None = None
    """TFLOP/s of fused attention, forward and backward, causal ones counted by half."""
    memory_gb_per_s: Rate | None = None
    """GB/s that element-wise kernels read and write."""
    nvlink_gb_per_s: Rate | None = None
    """GB/s of an all-gather inside a node, for each GPU."""
    network_gb_per_s: Rate | None = None
    """GB/s of a GPU's share of the network between nodes."""
    host_ms_per_layer: Rate | None = None
    """Milliseconds that the CPU takes to launch forward and backward of a layer."""
    stage_times: StageProfile | None = None
    """Times of stages, as ``tools/train.py --profile`` has written them."""


def read_rates(path: Path) -> MeasuredRates:
    """Read measured rates from a JSON file; raises ``ConfigError`` for a key or a value that is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON ({error}); expected an object of measured rates") from error
    return Builder().build(MeasuredRates, values, str(path))


def with_rates(gpu: Gpu, rates: MeasuredRates) -> Gpu:
    """Return ``gpu`` with the rates that were measured."""
    changed: dict[str, Any] = {}
    for name, value, unit in (
        ("products", rates.matmul_tflops, TERA),
        ("attention", rates.attention_tflops, TERA),
        ("memory_rate", rates.memory_gb_per_s, GIGA),
        ("host_seconds", rates.host_ms_per_layer, 1e-3),
    ):
        if value is not None:
            changed[name] = value * unit
    if rates.nvlink_gb_per_s is not None:
        changed["nvlink"] = replace(gpu.nvlink, bandwidth=rates.nvlink_gb_per_s * GIGA)
    if rates.network_gb_per_s is not None:
        changed["network"] = replace(gpu.network, bandwidth=rates.network_gb_per_s * GIGA)
    return replace(gpu, **changed)


def find_gpu(name: str) -> Gpu:
    """Return the GPU of this name; raises ``ConfigError`` for one that is not known."""
    if name not in GPUS:
        raise ConfigError(f"--gpu {name} is not known{suggestion_or_list(name, GPUS)}")
    return GPUS[name]


def check_fp8(gpu: Gpu, training: TrainingConfig) -> None:
    """Raise ``ConfigError`` if a run is to compute in FP8 in a way that a GPU does not have."""
    if training.fp8_format is not None and training.fp8_recipe not in gpu.fp8:
        has = f"it computes {', '.join(gpu.fp8)}" if gpu.fp8 else "it has no FP8; leave out --fp8-format"
        raise ConfigError(f"training.fp8_recipe {training.fp8_recipe} is not for --gpu {gpu.name}: {has}")


def _links(nvlink: float, network: float) -> dict[str, Any]:
    """Return the links of a GPU with these data sheet bandwidths in GB/s, in one direction."""
    return {
        "nvlink": Link(nvlink * GIGA * _NVLINK_REACHED, 40e-6),
        "network": Link(network * GIGA * _NETWORK_REACHED, 210e-6),
    }


_ATTENTION = "attention reaches {} TFLOP/s"
_H100 = Gpu(
    "h100", 80 * GIGA, 989 * TERA, 794.5 * TERA, 450 * TERA, 3350 * GIGA * _MEMORY_REACHED, **_links(450, 50),
    assumed=(_ATTENTION.format(450),), fp8=("tensorwise", "delayed", "blockwise"),
)  # fmt: skip
_B200 = Gpu(
    "b200", 180 * GIGA, 2250 * TERA, 1745 * TERA, 900 * TERA, 8000 * GIGA * _MEMORY_REACHED, **_links(900, 50),
    assumed=(_ATTENTION.format(900),), fp8=("tensorwise", "delayed", "blockwise", "mxfp8"),
)  # fmt: skip

GPUS: dict[str, Gpu] = {
    "a100": Gpu(
        "a100", 80 * GIGA, 312 * TERA, 271.2 * TERA, 180 * TERA, 2000 * GIGA * _MEMORY_REACHED, **_links(300, 25),
        assumed=(_ATTENTION.format(180), "a 200 Gb/s network card for each GPU"),
    ),
    "h100": _H100,
    "h200": replace(_H100, name="h200", memory=141 * GIGA, memory_rate=4800 * GIGA * _MEMORY_REACHED),
    "b200": _B200,
    "gb200": replace(
        _B200, name="gb200", memory=186 * GIGA, peak=2500 * TERA, products=1745 / 2250 * 2500 * TERA, per_node=4,
        nvlink_domain=72,
        assumed=(
            _ATTENTION.format(900),
            "matrix products reach the share of the peak that they reach on a B200",
            "4 GPUs a host, and up to 72 on one NVLink (NVL72): a job of up to 72 GPUs lies in one rack, larger jobs "
            "use 64 of each rack",
        ),
    ),
}  # fmt: skip
"""By the name that ``--gpu`` takes."""
