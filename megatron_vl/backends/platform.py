"""Prepare this process for Megatron-Core: one call, before anything of it is built."""

from __future__ import annotations

from megatron_vl.backends import core, cpu


def prepare_process() -> None:
    """Install what has to be replaced in Megatron-Core, and the CPU platform where there is no CUDA.

    Raises:
        ConfigError: there is no CUDA, and Megatron-Core has another version than the CPU platform knows.
    """
    cpu.install()
    core.install()
