"""Prepare this process for Megatron-Core: one call of a tool, before anything of Megatron-Core is imported.

Where there is no CUDA, Megatron-Core that is imported earlier has already decorated its functions with torch.compile,
and has loaded torch's compiler for it: a third of the time that a training takes to start.
"""

from __future__ import annotations

from megatron_vl.backends import core, cpu, presence


def prepare_process() -> None:
    """Install what has to be replaced in Megatron-Core, and the CPU platform where there is no CUDA.

    Raises:
        ConfigError: there is no CUDA, and Megatron-Core has another version than the CPU platform knows.
    """
    presence.hide_broken_transformer_engine()
    cpu.install()
    core.install()
