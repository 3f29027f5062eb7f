"""Versions of the packages that the backends were written for. No torch is needed to read them.

``setup.py`` and ``constraints-cpu.txt`` say the same, for pip; a test compares them.
"""

from __future__ import annotations

import re

Release = tuple[int, ...]

PYTHON = ((3, 11), (3, 13))
"""From the first, below the second."""

TORCH_LEAST = (2, 10)
TORCH_TESTED = "2.13.0"
"""The one with which the tests run."""

MEGATRON_CORE = "0.16.1"

TRANSFORMER_ENGINE = ((2, 9), (2, 12))
"""Versions that Megatron-Core 0.16.1 supports: from the first, below the second."""

FLASH_ATTN = (2, 1)
"""The flash-attn that Transformer Engine needs for packed rows before Hopper, where cuDNN has no kernel for them."""

HOPPER = (9, 0)
"""Compute capability from which Transformer Engine needs no flash-attn."""


def release(version: str) -> Release:
    """Return the numbers that a version begins with: ``2.10.0a0+nv26.1`` gives (2, 10, 0). Nothing gives ()."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()


def dotted(numbers: Release) -> str:
    """Return (2, 10) as ``2.10``."""
    return ".".join(map(str, numbers))
