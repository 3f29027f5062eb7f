"""Facts of machines that nobody has here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_vl.doctor.facts import Address, Device, Driver, Facts, Folder, Limits, Package, Torch
from megatron_vl.doctor.findings import Finding
from megatron_vl.doctor.packages import EXTRAS, REQUIRED
from megatron_vl.launch import CudaDriver, Launch

GIB = 2**30
H100 = Device("NVIDIA H100", 80 * GIB, (9, 0))
A100 = Device("NVIDIA A100", 40 * GIB, (8, 0))
LAPTOP = Facts(
    launch=Launch(0, 1, 0),
    host="laptop",
    python=(3, 11, 7),
    packages={"torch": Package("2.13.0+cpu"), "megatron-core": Package("0.16.1")}
    | {name: Package("1.0") for name in (*REQUIRED, *(name for extra in EXTRAS.values() for name in extra))},
    torch=Torch(),
    driver=Driver(),
    limits=Limits(4, 4, 16 * GIB, 16 * GIB, (1024, 4096), (8 * GIB, 8 * GIB)),
    folder=Folder(Path("runs"), 500 * GIB, 900 * GIB),
    own_name=Address("laptop", ("127.0.1.1",), is_here=True),
)
"""A machine without GPU, on which everything works."""
NODE = replace(
    LAPTOP,
    host="a",
    packages=LAPTOP.packages
    | {"torch": Package("2.10.0a0+nv26.1"), "transformer-engine": Package("2.11.0"), "apex": Package("0.1")},
    torch=Torch("13.1", (H100,) * 8, "", ("sm_80", "sm_90", "compute_120"), "2.29.2", compiles=True),
    driver=Driver(CudaDriver(8, (13, 1)), "590.44.01", 8),
    own_name=Address("a", ("10.0.0.1",), is_here=True),
)
"""A machine with 8 GPUs, on which everything works; flash-attn is not needed there."""


def with_packages(facts: Facts, **packages: Package) -> Facts:
    """The facts with other packages; ``_`` in a name stands for ``-``."""
    return replace(facts, packages=facts.packages | {name.replace("_", "-"): one for name, one in packages.items()})


def with_limits(facts: Facts, **limits: Any) -> Facts:
    """The facts with other limits."""
    return replace(facts, limits=replace(facts.limits, **limits))


def only(findings: list[Finding], name: str) -> Finding:
    """The one finding of a name."""
    (found,) = [finding for finding in findings if finding.name == name]
    return found
