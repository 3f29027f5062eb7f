"""Versions of the packages that the backends were written for. No torch is needed to read them.

``setup.py`` and ``constraints-cpu.txt`` say the same, for pip; a test compares them. What differs between the versions
of Megatron-Core is in docs/megatron_core.md, and in the code in ``backends/core.py``.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from importlib.metadata import version

from megatron_vl.errors import ConfigError

Release = tuple[int, ...]


@dataclass(frozen=True)
class Releases:
    """Releases from the first and below a limit, where there is one."""

    lowest: Release
    limit: Release | None = None

    def __contains__(self, found: Release) -> bool:
        return self.lowest <= found and (self.limit is None or found < self.limit)

    def __str__(self) -> str:
        return f"from {dotted(self.lowest)}" + (f" and below {dotted(self.limit)}" if self.limit else "")


MEGATRON_CORE = {"0.16.1": Releases((3, 11), (3, 12)), "0.19.2": Releases((3, 12), (3, 14))}
"""The supported versions, from old to new, and the Python for which pip installs each."""

PYTHON = Releases((3, 11), (3, 14))

TORCH_LEAST = (2, 10)
TORCH_TESTED = "2.13.0"
"""The one with which the tests run."""

TRANSFORMER_ENGINE = {"0.16.1": Releases((2, 9), (2, 12)), "0.19.2": Releases((2, 9))}
"""What each Megatron-Core takes. The limit is that of its metadata; 0.19.2 sets none."""

FLASH_ATTN = (2, 1)
"""The flash-attn that Transformer Engine needs for packed rows before Hopper, where cuDNN has no kernel for them."""

HOPPER = (9, 0)
"""Compute capability from which Transformer Engine needs no flash-attn."""

FP8_LEAST = (8, 9)
"""Compute capability from which there are matrix products in FP8."""

BLACKWELL = Releases((10, 0), (12, 0))
"""Compute capabilities with MXFP8 products of every layout."""

BLOCKWISE_CUDA = (12, 9)
"""CUDA from which there are FP8 products with scales of blocks, on Hopper and newer."""


def pinned_core(python: Release) -> str:
    """Return the version of Megatron-Core for a Python, and the nearest one for a Python that is not supported."""
    return [core for core, pythons in MEGATRON_CORE.items() if pythons.lowest <= max(python, PYTHON.lowest)][-1]


def installed_core() -> str:
    """Return the version of Megatron-Core that is installed.

    Raises:
        ConfigError: if it is not supported: parts of it that are replaced may have other names, or do other things.
    """
    found = version("megatron-core")
    if found not in MEGATRON_CORE:
        raise ConfigError(
            f"megatron-core {found} is installed, expected {' or '.join(MEGATRON_CORE)}: "
            f"pip install megatron-core=={pinned_core(sys.version_info[:2])}"
        )
    return found


def release(text: str) -> Release:
    """Return the numbers that a version begins with: ``2.10.0a0+nv26.1`` gives (2, 10, 0). Nothing gives ()."""
    match = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(map(int, match[0].split("."))) if match else ()


def dotted(numbers: Release) -> str:
    """Return (2, 10) as ``2.10``."""
    return ".".join(map(str, numbers))
