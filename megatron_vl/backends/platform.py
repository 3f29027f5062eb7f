"""Prepare this process for Megatron-Core, before anything of Megatron-Core is imported. A tool calls it once.

Without CUDA, a Megatron-Core that is imported earlier has already decorated its functions with torch.compile, and has
loaded torch's compiler for it. That takes a third of the time that a training needs to start.
"""

from __future__ import annotations

from megatron_vl.backends import core, cpu, presence, versions


def prepare_process() -> None:
    """Install the replacements in Megatron-Core, and the CPU platform where there is no CUDA.

    Raises:
        ConfigError: if the installed version of Megatron-Core is not supported.
    """
    versions.installed_core()
    presence.hide_unusable_packages()
    cpu.install()
    core.install()
